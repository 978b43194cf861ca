"""What differs between two runs: the keys of their configs, and the bits of their files."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cifar_lab.analysis.load_runs import MISSING, REPLICATES, FoundRun, show_value
from cifar_lab.runs.metrics import TIMES, EpochMetrics, columns
from cifar_lab.runs.run_dir import RunDir


def config_differences(a: FoundRun, b: FoundRun, *, replicates: bool = False) -> list[list[str]]:
    """Return options and keys that differ, as text: key, value of A, value of B.

    `replicates`: with the seed, the fold and the number of threads.
    """
    values: list[dict[str, Any]] = [{**run.choices, **run.identity} for run in (a, b)]
    if replicates:
        for run, own in zip((a, b), values, strict=True):
            own |= dict(zip(REPLICATES, run.replicate, strict=True))
            own["threads"] = run.summary.threads
    rows = []
    for key in dict.fromkeys([*values[0], *values[1]]):
        shown = [show_value(own[key]) if key in own else MISSING for own in values]
        if shown[0] != shown[1]:
            rows.append([key, *shown])
    return rows


def differences(a: RunDir, b: RunDir) -> list[str]:
    """Return the parts of two runs' results that differ in a bit, but for times.

    A part is named by its file, and its place in a checkpoint: `last.pt: model.head.weight`.
    """
    of_a, of_b = _results(a), _results(b)
    return [name for name in {**of_a, **of_b} if of_a.get(name) != of_b.get(name)]


def _results(run: RunDir) -> dict[str, Any]:
    """Return what training and evaluation left in a folder, in named parts, without times."""
    from cifar_lab.runs.files import load_checkpoint  # late: it imports torch

    parts: dict[str, Any] = {}
    for path in (run.last, run.best):
        state = load_checkpoint(path) if path.exists() else {}
        state.pop("seconds", None)
        for table in {"history", "best"} & state.keys():  # their columns are those of metrics.csv
            names = columns(EpochMetrics)[: state[table].shape[1]]
            state[table] = state[table][:, [i for i, n in enumerate(names) if n not in TIMES]]
        parts |= {f"{path.name}: {where}": _bits(leaf) for where, leaf in _leaves(state)}
    lasting = [name for name in columns(EpochMetrics) if name not in TIMES]
    parts["metrics.csv"] = [[getattr(row, n) for n in lasting] for row in run.read_metrics()]
    for path in sorted(run.path.glob("predictions*.npz")):
        arrays = run.read_arrays(path)
        parts[path.name] = {name: _bits(array) for name, array in arrays.items()}
    return parts


def _leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values in nested containers, each with its dotted path."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    if not items:
        yield where, value
    for key, item in items:
        yield from _leaves(item, f"{where}.{key}".lstrip("."))


def _bits(value: Any) -> tuple[str, ...]:
    """Return the type, the shape and the bytes of a tensor or an array, else the plain value."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), str(value.shape), value.tobytes().hex()
    if hasattr(value, "untyped_storage"):  # a tensor; numpy has no bfloat16
        import torch

        return str(value.dtype), *_bits(value.contiguous().view(-1).view(torch.uint8).numpy())
    return type(value).__name__, repr(value)
