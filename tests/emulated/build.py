"""Compile the emulated device once for each version of torch and of its source."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

SOURCE = Path(__file__).with_name("device.cpp")
CACHE = Path(__file__).resolve().parents[2] / "build" / "emulated"


def compiler() -> str | None:
    """Return the C++ compiler of this machine, if it has one."""
    return shutil.which(os.environ.get("CXX", "c++"))


def library() -> Path:
    """Return the compiled module; compiling it takes half a minute."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    path = CACHE / f"{key}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if path.exists():
        return path
    root = Path(torch.__file__).parent
    headers = [root / "include", root / "include/torch/csrc/api/include"]
    command = [
        *(str(compiler()), "-O1", "-g0", "-std=c++20", "-shared", "-fPIC", "-w"),
        "-DTORCH_EXTENSION_NAME=emulated_device",
        *(f"-I{folder}" for folder in (*headers, sysconfig.get_paths()["include"])),
        *(str(SOURCE), f"-L{root / 'lib'}"),
        *("-ltorch_cpu", "-ltorch", "-lc10", "-ltorch_python"),
    ]
    CACHE.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(f".{os.getpid()}")
    subprocess.run([*command, "-o", str(written)], check=True)
    written.replace(path)  # another process may have been faster
    return path


def load() -> ModuleType:
    """Compile the module if that was not done before, and import it."""
    spec = importlib.util.spec_from_file_location("emulated_device", library())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
