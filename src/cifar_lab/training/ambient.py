"""The settings of torch that a program around a run may have changed, and that decide its bits."""

import contextlib
import operator
import os
import threading
from collections.abc import Iterator
from typing import Any

_ALONE = threading.RLock()


@contextlib.contextmanager
def as_in_a_fresh_process() -> Iterator[None]:
    """Compute in this block as a process does that has just begun; then all is as it was.

    The same words must give the same run wherever they are called. Autocast, no_grad,
    inference_mode, default dtype and device, the precision of products and oneDNN are what a fresh
    process has; they, the generators, the number of threads and the environment come back. Other
    threads wait: these settings, the generators and Hydra's are one for the process.
    """
    import torch

    with _ALONE, contextlib.ExitStack() as stack:
        stack.callback(_restore_environment, dict(os.environ))
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
        if gpus:
            stack.callback(torch.cuda.set_device, torch.cuda.current_device())
        stack.enter_context(torch.random.fork_rng(gpus))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        _reset_precisions(stack)
        _begin(stack, torch.backends.mkldnn, "enabled", True)
        _begin(stack, torch.backends.cudnn, "enabled", True)
        _begin(stack, torch.backends.cudnn, "benchmark", False)
        _begin(stack, torch.backends.cudnn, "deterministic", False)
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        stack.callback(
            torch.use_deterministic_algorithms,
            torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        yield


# In torch.backends, as torch begins.
_PRECISIONS = {
    "none": (
        *("backends", "backends.cuda.matmul", "backends.cudnn", "backends.mkldnn"),
        *("backends.mkldnn.matmul", "backends.mkldnn.conv", "backends.mkldnn.rnn"),
    ),
    "tf32": ("backends.cudnn.conv", "backends.cudnn.rnn"),
}


def _reset_precisions(stack: contextlib.ExitStack) -> None:
    """Set the precision of products as torch begins, and have `stack` restore it.

    The older names raise RuntimeError where a program has used the newer ones, and have nothing to
    restore then. They are set after the newer ones, and restored before.
    """
    import torch

    older: list[tuple[Any, ...]] = []
    with contextlib.suppress(RuntimeError):
        older.append((torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
    with contextlib.suppress(RuntimeError):
        cudnn = torch.backends.cudnn
        older.append((setattr, cudnn, "allow_tf32", cudnn.allow_tf32))
    for precision, names in _PRECISIONS.items():
        for backend in operator.attrgetter(*names)(torch):
            _begin(stack, backend, "fp32_precision", precision)
    for restore in older:
        stack.callback(*restore)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


def _begin(stack: contextlib.ExitStack, owner: Any, name: str, value: object) -> None:
    """Give an attribute the value that torch begins with, and have `stack` restore it."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
