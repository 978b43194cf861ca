"""The emulated device in a process: registered once, watched, and taken for `cuda` or `mps`."""

import contextlib
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # before the stand-ins below: it looks at the real torch.cuda when imported
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from emulated.build import load

NAME = "emulated"
COMPILED = load()
PLENTY = 1 << 40


class DeviceModule:
    """What torch asks of the module of a device, as `torch.cuda` is for CUDA."""

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        COMPILED.default_generator().manual_seed(seed)

    manual_seed = manual_seed_all

    def get_rng_state(self, device: Any = None) -> Tensor:
        state: Tensor = COMPILED.default_generator().get_state()
        return state

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        COMPILED.default_generator().set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def synchronize(self, device: Any = None) -> None:
        """Do nothing: the host computes everything, so nothing is outstanding."""


torch.utils.rename_privateuse1_backend(NAME)
torch._register_device_module(NAME, DeviceModule())  # type: ignore[arg-type]
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)


# --- what runs on the device, and what the host waits for -----------------------------------------

# The shape or the value of the result depends on values, so the host has to read them.
_READS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim"),
    *("equal", "is_nonzero", "bincount", "histc", "repeat_interleave", "_linalg_eigh"),
}
# Allocations and views: nothing is launched for them.
_FREE = {
    *("detach", "alias", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty"),
    *("new_empty_strided", "set_", "resize_", "_reshape_alias"),
}


class Watch(TorchDispatchMode):
    """Counts the operations of the device, and by their lines the waits and what is in float64."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.float64: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        touched = [tensor for tensor in (*given, *made) if tensor.device.type == NAME]
        if not touched:
            return result
        if not func.is_view and name not in _FREE:
            self.operations[name] += 1
        if any(tensor.dtype == torch.float64 for tensor in touched):
            self.float64[f"{name} at {_line()}"] += 1
        if _waits(name, given, made, args):
            self.waits[f"{name} at {_line()}"] += 1
        return result


def _waits(name: str, given: list[Tensor], made: list[Tensor], args: Any) -> bool:
    """Return whether the host has to wait for the device until the operation is done."""
    if name in _READS or name == "lift_fresh":  # the last: torch.tensor(..., device=...)
        return True
    kinds = {tensor.device.type for tensor in (*given, *made)}
    if name in ("_to_copy", "copy_", "_copy_from"):
        return kinds == {"cpu", NAME}
    if name in ("index", "_index_put_impl_", "index_put_"):
        indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
        masks = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        return masks or any(index.device.type == "cpu" for index in indices)
    return False


def _line() -> str:
    """Return the innermost line of the package on the stack, else of torch."""
    frames = traceback.extract_stack(limit=40)
    for part in ("/cifar_lab/", "/site-packages/torch/"):
        for frame in reversed(frames):
            if part in frame.filename and "_python_dispatch" not in frame.filename:
                return f"{frame.filename.rpartition(part)[2]}:{frame.lineno}"
    return "?"


# --- taken for cuda or mps ------------------------------------------------------------------------


class Acting(str):
    """The device's name, which torch reads as it is and the package as `cuda` or `mps`."""

    role: str

    def __new__(cls, role: str) -> "Acting":
        device = super().__new__(cls, NAME)
        device.role = role
        return device

    def startswith(self, prefix: Any, *more: Any) -> bool:
        return self.role.startswith(prefix, *more)

    def split(self, *more: Any, **keywords: Any) -> list[Any]:
        return [self]

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or self.role == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__

    def __reduce__(self) -> Any:
        return str, (self.role,)


class Stream:
    """A stream of CUDA; all work is done when it is asked for."""

    def __init__(self, *more: Any, **keywords: Any) -> None:
        pass

    def wait_stream(self, other: "Stream") -> None:
        pass


class Graph:
    """A CUDA graph: the operations of a capture, repeated into the same memory."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, list[Any]]] = []
        self.generators: list[torch.Generator] = []

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    def replay(self) -> None:
        with torch.no_grad(), _disable_current_modes():  # one launch, whatever is in it
            for func, args, kwargs, outputs in self.operations:
                for output, again in zip(outputs, tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(output, Tensor) and output.data_ptr() != again.data_ptr():
                        output.copy_(again)


class Capture(TorchDispatchMode):
    """`torch.cuda.graph`: records operations; raises for what a capture on CUDA forbids."""

    def __init__(self, graph: Graph, **options: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if options.get("capture_error_mode") != "thread_local":
            raise RuntimeError("another thread may pin images while this one captures")
        self.graph = graph
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.states = [generator.get_state() for generator in graph.generators]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if tensors and all(tensor.is_cpu for tensor in tensors):
            return func(*args, **kwargs)  # done by the host, once
        if name in _READS or (
            name in ("_to_copy", "copy_") and any(tensor.is_cpu for tensor in tensors)
        ):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        known = {generator._cdata for generator in self.graph.generators}  # type: ignore[attr-defined]
        if any(isinstance(leaf, torch.Generator) and leaf._cdata not in known for leaf in leaves):  # type: ignore[attr-defined]
            raise RuntimeError("a capture uses a generator that its graph does not know")
        for index, argument in enumerate(func._schema.arguments):
            # batch norm's schema hides that it changes its statistics
            hidden = name == "native_batch_norm" and argument.name.startswith("running")
            if hidden or (argument.alias_info is not None and argument.alias_info.is_write):
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                for tensor in tree_leaves(value):
                    if isinstance(tensor, Tensor):
                        self.before.setdefault(tensor.data_ptr(), (tensor, tensor.clone()))
        result = func(*args, **kwargs)
        if not func.is_view and name != "detach":
            self.graph.operations.append((func, args, kwargs, tree_leaves(result)))
        return result

    def __exit__(self, *error: Any) -> None:
        """Undo what ran: a capture on CUDA launches nothing."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for tensor, before in self.before.values():
                tensor.copy_(before)
        for generator, state in zip(self.graph.generators, self.states, strict=True):
            generator.set_state(state)


@contextlib.contextmanager
def acting(role: str) -> Iterator[Acting]:
    """Let the package find a GPU of this kind, `cuda` or `mps`; yield its device."""
    device, module = Acting(role), DeviceModule()
    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "an emulated GPU",
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": module.synchronize,
        "mem_get_info": lambda device=None: (PLENTY, PLENTY),
        "recommended_max_memory": lambda: PLENTY,
        "get_rng_state": lambda device=None: module.get_rng_state(),
        "set_rng_state": lambda state, device=None: module.set_rng_state(state),
        "empty_cache": lambda: None,
        "Stream": Stream,
        "current_stream": lambda device=None: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": Capture,
    }
    real = torch.cuda if role == "cuda" else torch.mps
    autocast, scaler = torch.autocast, torch.amp.GradScaler
    with contextlib.ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            if hasattr(real, name):
                stack.enter_context(mock.patch.object(real, name, stand_in))
        for owner, name, stand_in in (
            (torch.backends.mps, "is_available", lambda: role == "mps"),
            (torch, "autocast", lambda name, **more: autocast(_plain(name), **more)),
            (torch.amp, "GradScaler", lambda name, **more: scaler(_plain(name), **more)),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        for name, imported in list(sys.modules.items()):
            # Not in preflight: a config is composed as for a CPU, and names its device as text.
            checks = name == "cifar_lab.training.preflight"
            if name.startswith("cifar_lab.") and hasattr(imported, "select_device") and not checks:
                chosen = mock.patch.object(imported, "select_device", return_value=device)
                stack.enter_context(chosen)
        COMPILED.forbid_float64(role == "mps")
        stack.callback(COMPILED.forbid_float64, False)
        yield device


def _plain(device: str) -> str:
    return NAME if isinstance(device, Acting) else device
