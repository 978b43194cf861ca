"""The device of a run: its precision, its threads, its memory, and the seeds of random streams.

`precision=auto` is the fastest precision that was shown to cost no accuracy on this kind of device.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from cifar_lab.config.schema import wrong
from cifar_lab.errors import UsageError, first_line, log

Precision = Literal["auto", "fp32", "bf16", "fp16"]

EVIDENCE = Path(__file__).with_name("precision_evidence.json")
"""What scripts/measure_precision found, by kind of device: what `auto` is, and the evidence.

The environment variable CIFAR_LAB_PRECISION names another file of this form, for what was measured
on a machine of one's own; the tests name one without evidence, so that they train in fp32.
"""


def select_device(name: str) -> str:
    """Return the device that `name` means on this machine.

    auto is cuda if there is one that works, else mps, else cpu. Raises UsageError for a device that
    is not available.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", name):
        raise wrong("device", name, "auto, cuda, cuda:N, mps or cpu")
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return "mps" if has_mps else "cpu" if cuda_problem() else "cuda"
    if name == "mps" and not has_mps:
        raise UsageError("device=mps: no Apple GPU here; use device=auto or cpu")
    if name.startswith("cuda"):
        if (problem := cuda_problem()) is not None:
            raise UsageError(f"device={name}: no CUDA device ({problem}); use device=auto or cpu")
        count = torch.cuda.device_count()
        if int(name.partition(":")[2] or 0) >= count:
            raise UsageError(f"device={name}: there are {count} CUDA devices, numbered from 0")
    return name


@functools.cache
def cuda_problem() -> str | None:
    """Return why CUDA cannot be used on this machine; None if a tiny operation succeeds.

    A driver that is too old, or a GPU for which this torch has no kernels, is there and unusable:
    that is said once, since device=auto falls back on the CPU.
    """
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch was built without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.ones(1, device="cuda").add_(1).item()
    except (RuntimeError, AssertionError) as error:
        if "no NVIDIA driver" in str(error):
            return "none was found"
        log.warning("warning: CUDA cannot be used here: %s", first_line(error))
        return first_line(error)
    return None


def select_precision(name: Precision, device: str) -> Precision:
    """Return the precision that `name` means on this device.

    auto is the fastest precision whose accuracy has been measured on this kind of device, over five
    seeds of each network, to be within one point of that of fp32; without such evidence it is fp32.
    """
    if name == "fp16" and device == "cpu":
        raise UsageError("precision=fp16 trains on CUDA and MPS only; use bf16 or fp32 on a CPU")
    if name != "auto":
        return name
    decided: Precision = _evidence(device).get("auto", "fp32")
    return decided


def explain_precision(precision: str, device: str) -> str:
    """Return why auto takes this precision on this device, for the log; else nothing."""
    evidence = _evidence(device)
    if precision != evidence.get("auto"):
        return ""
    kind, speed = device_kind(device), evidence["speed"]
    return f" (auto takes it: on a {kind} it is as accurate as fp32, and {speed})"


def evidence_file() -> Path:
    """Return the file of the evidence: EVIDENCE, or the one that CIFAR_LAB_PRECISION names."""
    return Path(os.environ.get("CIFAR_LAB_PRECISION") or EVIDENCE)


def _evidence(device: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(evidence_file().read_text(encoding="utf-8"))
    return dict(table.get(device_kind(device), {}))


@functools.cache
def device_kind(device: str) -> str:
    """Return what decides how fast a precision is: the GPU's generation, or what the CPU computes.

    Such as `cuda 9.0`, `mps`, `cpu with amx_bf16`, `cpu with avx512_bf16` and `cpu`.
    """
    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda {major}.{minor}"
    if device == "mps":
        return device
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    has = next((name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name)), None)
    return f"cpu with {has}" if has else "cpu"


def visible_gpus() -> list[str]:
    """Return the names by which CUDA_VISIBLE_DEVICES selects the GPUs of this process.

    CUDA ends that list at the first name that is no GPU of this machine, such as -1. Names of GPUs
    and their parts (GPU-..., MIG-...) are handed on as they are.
    """
    count, asked = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in asked.split(",")] if asked else []
    return names[:count] or [str(index) for index in range(count)]


def wait_for(device: str) -> None:
    """Wait until the device has finished its work: before a clock is read."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(torch.device(device))
    elif device == "mps":
        torch.mps.synchronize()


def check_compiler(device: str) -> None:
    """Raise UsageError if torch.compile finds no compiler for this device."""
    if device.startswith("cuda") and importlib.util.find_spec("triton") is None:
        raise UsageError(
            "training.compile=true needs the package triton on CUDA: pip install triton"
        )
    named = (os.environ.get("CXX"), "c++", "g++", "clang++", "cl")
    if device == "cpu" and not any(shutil.which(name) for name in named if name):
        raise UsageError(
            "training.compile=true: there is no C++ compiler on the PATH; install g++, or leave "
            "training.compile=false"
        )


def describe_device(device: str) -> str:
    """Return the name to show: the GPU's, or the CPU's number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    threads = torch.get_num_threads()
    return "Apple GPU" if device == "mps" else f"cpu ({threads} thread{'s' * (threads != 1)})"


def configure(device: str, threads: int | None, deterministic: bool) -> int:
    """Set torch's process-wide options; return the number of CPU threads in use.

    Called once, by the process that owns the run.
    """
    if threads is not None and threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)  # imports torch's compiler: a second
    if ":" in device:  # streams and captured graphs belong to the current device
        torch.cuda.set_device(device)
    if device.startswith("cuda"):
        torch.backends.cudnn.benchmark = not deterministic
    if device == "cpu":
        keep_freed_memory()
    return torch.get_num_threads()


def keep_freed_memory() -> None:
    """Make glibc keep the memory that a training step frees for the next one.

    By default it returns activations to the system and faults them in again at every step, which
    costs a tenth of the CPU time (docs/performance.md). Settings in the environment take
    precedence; without glibc nothing is done.
    """
    named = any(name.startswith("MALLOC_") for name in os.environ)
    if named or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
        for option, value in (  # the numbers of malloc.h
            (-3, 32 << 20),  # M_MMAP_THRESHOLD: the largest value that glibc accepts
            (-1, (2 << 30) - 1),  # M_TRIM_THRESHOLD
            (-2, 64 << 20),  # M_TOP_PAD
        ):
            libc.mallopt(option, value)


def free_memory(device: str) -> int:
    """Return the bytes of a GPU's memory that are free; on MPS, what Metal recommends to use."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(torch.device(device))
        return int(free)
    return int(torch.mps.recommended_max_memory())


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator for a block; restore its state afterwards.

    For building models: torch's initialisers use no other generator.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def autocast(device: str, precision: str) -> contextlib.AbstractContextManager[None]:
    """Return the autocast context of a precision; fp32 has none."""
    if precision == "fp32":
        return contextlib.nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.split(":")[0], dtype=dtype)


def memory_format(device: str) -> torch.memory_format:
    """Return the memory format in which convolutions are fastest.

    Not on MPS: BatchNorm's backward is silently wrong there for channels_last
    (pytorch/pytorch#175189).
    """
    return torch.contiguous_format if device.startswith("mps") else torch.channels_last


def derive_seed(seed: int, *keys: int | str) -> int:
    """Return a 63-bit seed for one random stream, such as (seed, "data", epoch)."""
    text = ":".join(str(key) for key in (seed, *keys))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
