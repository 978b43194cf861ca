"""Where a run computes: the device, its precision, its threads, and what seeds what."""

import contextlib
import ctypes
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from cifar_lab.errors import RequestError

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def select_device(name: str) -> tuple[str, str]:
    """Return the device that `name` means here and the reason, for the log.

    auto = cuda, then mps, then cpu. RequestError if a device that is not there is asked for.
    """
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if name.startswith("cuda"):
        if not cuda:
            why = "none was found" if torch.version.cuda else "this torch is built without CUDA"
            raise RequestError(f"device={name}: no CUDA device ({why}); use device=auto or cpu")
        index, count = int(name.partition(":")[2] or 0), torch.cuda.device_count()
        if index >= count:
            raise RequestError(f"device={name}: there are {count} CUDA devices, numbered from 0")
        return name, torch.cuda.get_device_name(torch.device(name))
    if name == "mps":
        if not mps:
            raise RequestError("device=mps: no Apple GPU here; use device=auto or cpu")
        return name, "Apple GPU"
    return name, "as asked" if cuda or mps else "there is no CUDA and no MPS device"


def visible_gpus() -> list[str]:
    """Return a name that CUDA_VISIBLE_DEVICES takes for each GPU that this process may use."""
    import torch

    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in asked.split(",")] if asked else []
    return names or [str(index) for index in range(torch.cuda.device_count())]


def wait_for(device: str) -> None:
    """Return when the device has done what it was given: before a clock is read."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(torch.device(device))
    elif device == "mps":
        torch.mps.synchronize()


def select_precision(name: Precision, device: str) -> Precision:
    """Return the precision that `name` means on this device; auto is fp32 everywhere.

    auto stays fp32 until the accuracy of a faster precision is shown over enough seeds
    (docs/decisions); bf16 and fp16 are one override away.
    """
    kind = device.split(":")[0]
    if name == "fp16" and kind == "cpu":
        raise RequestError("precision=fp16 trains on CUDA and MPS only; use bf16 or fp32 on a CPU")
    return "fp32" if name == "auto" else name


def check_compiler(device: str) -> None:
    """RequestError if torch.compile has nothing to compile with on this device."""
    named = (os.environ.get("CXX"), "c++", "g++", "clang++", "cl")
    if device == "cpu" and not any(shutil.which(name) for name in named if name):
        raise RequestError(
            "training.compile=true: there is no C++ compiler on the PATH; install g++, or leave "
            "training.compile=false"
        )


def describe_device(device: str) -> str:
    """Return a name for people: the GPU's, or the CPU's number of threads."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    if device == "mps":
        return "Apple GPU"
    threads = torch.get_num_threads()
    return f"cpu ({threads} thread{'s' if threads != 1 else ''})"


def configure(device: str, threads: int | None, deterministic: bool) -> int:
    """Set what torch keeps for the whole process; return the number of CPU threads in use.

    Called once by the process that owns the run, never from below the door.
    """
    import torch

    if threads is not None and threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    if device.startswith("cuda"):
        torch.backends.cudnn.benchmark = not deterministic
    if device == "cpu":
        keep_freed_memory()
    return torch.get_num_threads()


def keep_freed_memory() -> None:
    """Let glibc keep what a training step frees for the next one; elsewhere do nothing.

    Left alone it gives activations back to the system and faults them in again at every step, a
    tenth of the processor's time (docs/performance.md). Settings in the environment win.
    """
    named = any(name.startswith("MALLOC_") for name in os.environ)
    if named or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    if (libc := _glibc()) is not None:
        for option, value in (
            (_M_MMAP_THRESHOLD, 32 << 20),  # the most that glibc takes
            (_M_TRIM_THRESHOLD, (2 << 30) - 1),
            (_M_TOP_PAD, 64 << 20),
        ):
            libc.mallopt(option, value)


def release_memory() -> None:
    """Give what freed tensors leave in glibc's heap back to the system; elsewhere do nothing.

    After training this is some hundred MB, which evaluation and figures need not come on top of.
    """
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
"""Names of malloc.h."""


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from torch's global CPU generator as after `manual_seed(seed)`; then put it back.

    For building models: torch's initialisers know no other generator.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def autocast(device: str, precision: str) -> "contextlib.AbstractContextManager[None]":
    """Return the autocast context of a precision; fp32 has none."""
    import torch

    if precision == "fp32":
        return contextlib.nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.split(":")[0], dtype=dtype)


def memory_format(device: str) -> "torch.memory_format":
    """Return the layout of images and weights that convolutions are fastest in.

    Not on MPS: BatchNorm's backward is silently wrong there for channels_last
    (pytorch/pytorch#175189).
    """
    import torch

    return torch.contiguous_format if device == "mps" else torch.channels_last


def derive_seed(seed: int, *keys: int | str) -> int:
    """Return a 63-bit seed for one stream of draws, such as (seed, "data", epoch)."""
    text = ":".join(str(key) for key in (seed, *keys))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
