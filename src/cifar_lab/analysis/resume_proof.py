"""A run that is stopped again and again, beside one that never stopped: what differs."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import RunFailed, Stopped, log
from cifar_lab.runs.files import load_checkpoint, read_arrays
from cifar_lab.runs.metrics import TIMES, EpochMetrics, columns
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.loop import Progress, Stop
from cifar_lab.training.run import run_experiment


class StopAfter(Stop):
    """Stops at the yield with this number; counts the yields where it is None."""

    def __init__(self, number: int | None) -> None:
        super().__init__()
        self.number = number
        self.yields = 0

    def is_wanted(self, progress: Progress) -> bool:
        """Return whether a signal came, or this is the yield to stop at."""
        self.yields += 1
        return super().is_wanted(progress) or self.yields == self.number


def prove(config: RunConfig, folder: Path, stops: int, seed: int = 0) -> list[str]:
    """Train once without and once with stops at random steps; return what was compared.

    Each part of the stopped run starts from its files alone. RunFailed if the two differ.
    """
    # print_every=1: a yield, and so a possible stop, after each step
    training = dataclasses.replace(config.training, print_every=1, keep_last=True)
    config = dataclasses.replace(
        config, training=training, tracker=None, output_dir=str(folder), name="once"
    )
    once = RunDir.create(config)
    often = RunDir.create(dataclasses.replace(config, name="often"))
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        count = StopAfter(None)
        with count.installed():
            run_experiment(once, stop=count)
        wanted = min(stops, count.yields)
        generator = np.random.default_rng(seed)
        positions = sorted(generator.choice(count.yields, wanted, replace=False) + 1)
        steps = np.diff(positions, prepend=0)
        done = [line for line in (_run_until(often, int(step)) for step in steps) if line]
        with Stop().installed() as real:
            run_experiment(often, stop=real)
    finally:
        log.setLevel(level)
    if found := differences(once, often):
        raise RunFailed(f"after {len(done)} stops the run is another one: {'; '.join(found[:5])}")
    summary = often.read_summary()
    return [
        *(line.partition(";")[0] for line in done),
        f"{len(done)} stops on {summary.device_name}, {summary.precision}: weights, optimizer, "
        "schedule, generators, best.pt, metrics.csv but for times, and predictions are the same, "
        "bit for bit",
    ]


def _run_until(run: RunDir, number: int) -> str | None:
    """Continue a run from its files until the yield with this number; return how it stopped."""
    stop = StopAfter(number)
    with stop.installed():
        try:
            run_experiment(run, stop=stop)
        except Stopped as stopped:
            if stop.yields != stop.number:
                raise  # a real signal
            return str(stopped)
    return None


def differences(a: RunDir, b: RunDir) -> list[str]:
    """Return the parts of two runs' results that differ in a bit, but for times.

    A part is named by its file, and its place in a checkpoint: `last.pt: model.head.weight`.
    """
    of_a, of_b = _results(a), _results(b)
    return [name for name in {**of_a, **of_b} if of_a.get(name) != of_b.get(name)]


def _results(run: RunDir) -> dict[str, Any]:
    """Return what training and evaluation left in a folder, in named parts, without times."""
    parts: dict[str, Any] = {}
    for path in (run.last, run.best):
        state = load_checkpoint(path) if path.exists() else {}
        state.pop("seconds", None)
        for table in {"history", "best"} & state.keys():  # their columns are those of metrics.csv
            names = columns(EpochMetrics)[: state[table].shape[1]]
            state[table] = state[table][:, [i for i, n in enumerate(names) if n not in TIMES]]
        parts |= {f"{path.name}: {where}": bits for where, bits in _leaves(state).items()}
    lasting = [name for name in columns(EpochMetrics) if name not in TIMES]
    parts["metrics.csv"] = [[getattr(row, n) for n in lasting] for row in run.read_metrics()]
    for path in sorted(run.path.glob("predictions*.npz")):
        parts[path.name] = _leaves(read_arrays(path))
    return parts


def _leaves(value: Any, where: str = "") -> dict[str, Any]:
    """Return the values in nested containers by their dotted path.

    Of a tensor or an array, its type, shape and bytes.
    """
    if isinstance(value, Mapping | list | tuple) and value:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        of_items = [_leaves(item, f"{where}.{key}".lstrip(".")) for key, item in items]
        return {name: leaf for leaves in of_items for name, leaf in leaves.items()}
    if isinstance(value, torch.Tensor):  # numpy has no bfloat16
        content = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray):
        content = value.tobytes()
    else:
        return {where: (type(value), repr(value))}
    return {where: (str(value.dtype), tuple(value.shape), content)}
