"""A run that is stopped again and again, beside one that never stopped: what differs."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import RunFailed, Stopped
from cifar_lab.runs.checkpoints import load_checkpoint
from cifar_lab.runs.metrics import TIMES, EpochMetrics, columns
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.loop import Progress
from cifar_lab.training.run import run_experiment
from cifar_lab.training.signals import Stop


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
    once, often = (_new_run(config, folder, name) for name in ("once", "often"))
    with _quiet():
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
    found = differences(once, often)
    if found:
        raise RunFailed(f"after {len(done)} stops the run is another one: {'; '.join(found[:5])}")
    summary = often.read_summary()
    return [
        *(line.partition(";")[0] for line in done),
        f"{len(done)} stops on {summary.device_name}, {summary.precision}: weights, optimizer, "
        "schedule, generators, best.pt, metrics.csv but for times, and predictions are the same, "
        "bit for bit",
    ]


def _new_run(config: RunConfig, folder: Path, name: str) -> RunDir:
    training = dataclasses.replace(
        config.training,
        print_every=1,  # a yield, and so a possible stop, after each step
        keep_last=True,
    )
    return RunDir.create(
        dataclasses.replace(
            config, training=training, tracker=None, output_dir=str(folder), name=name
        )
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    log = logging.getLogger("cifar_lab")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


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


def differences(one: RunDir, other: RunDir) -> list[str]:
    """Return what differs between two runs' files, but for times, in words."""
    found = []
    for path in (one.last, one.best):
        mine, theirs = _lasting(one, path.name), _lasting(other, path.name)
        found += [f"{path.name}: {where}" for where in _unlike(mine, theirs)]
    rows = [
        [{k: getattr(r, k) for k in columns(type(r)) if k not in TIMES} for r in run.read_metrics()]
        for run in (one, other)
    ]
    if rows[0] != rows[1]:
        found.append("metrics.csv")
    for path in sorted(one.path.glob("predictions*.npz")):
        arrays = [run.read_arrays(run.path / path.name) for run in (one, other)]
        if any(not np.array_equal(arrays[0][k], arrays[1][k]) for k in arrays[0]):
            found.append(path.name)
    return found


def _lasting(run: RunDir, name: str) -> dict[str, Any]:
    """Return a checkpoint without its times; {} if there is none."""
    path = run.path / name
    if not path.exists():
        return {}
    state = load_checkpoint(path)
    state.pop("seconds", None)
    for table in ("history", "best"):
        if table in state:
            names = columns(EpochMetrics)[: state[table].shape[1]]
            kept = [i for i, name in enumerate(names) if name not in TIMES]
            state[table] = state[table][:, kept]
    return state


def _unlike(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Yield where two nested containers of tensors and plain values differ in a bit."""
    if isinstance(one, Mapping) and isinstance(other, Mapping) and one.keys() == other.keys():
        for key in one:
            yield from _unlike(one[key], other[key], f"{where}.{key}".lstrip("."))
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            yield where
        for index, pair in enumerate(zip(one, other, strict=False)):
            yield from _unlike(*pair, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same_kind = one.dtype == other.dtype and one.shape == other.shape
        bits = [t.contiguous().view(-1).view(torch.uint8) for t in (one, other)]
        if not same_kind or not torch.equal(*bits):
            yield where
    elif type(one) is not type(other) or one != other:
        yield where
