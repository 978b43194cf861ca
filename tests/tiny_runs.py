"""Runs of the digits with a model so small that an epoch takes a fraction of a second."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cifar_lab import execute as execute_module
from cifar_lab import training
from cifar_lab.door import compose
from cifar_lab.execute import Stop, execute
from cifar_lab.run_dir import RunDir, RunSummary
from cifar_lab.training import Progress

TINY = (
    "dataset=digits",
    "model.widths=[4,8]",
    "model.hidden=16",
    "figures=none",
    "split.validation=900",
    "training.batch_size=64",
    "training.epochs=2",
    "device=cpu",
    "threads=1",
)


def make(folder: Path, *overrides: str) -> RunDir:
    """Return a queued run below `folder`."""
    request = compose([*TINY, f"output_dir={folder}", *overrides])
    return RunDir.create(request.cells[0].config)


def train(folder: Path, *overrides: str, **options: Any) -> RunDir:
    """Return a run below `folder`, executed."""
    run = make(folder, *overrides)
    execute(run, **options)
    return run


class StopAt(Stop):
    """Behaves as if a signal had come at the yield with this number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def is_wanted(self, progress: Progress) -> bool:
        self.left -= 1
        return self.left == 0


def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `fit` yield after each step, so that a run can be stopped after any of them."""
    monkeypatch.setattr("cifar_lab.training._YIELD_SECONDS", 0.0)


def at_yield(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> None:
    """Let `action` happen as training reaches a yield."""
    fit = training.fit

    def watched(*args: Any, **kwargs: Any) -> Iterator[Progress]:
        for count, progress in enumerate(fit(*args, **kwargs), start=1):
            if count == number:
                action()
            yield progress

    monkeypatch.setattr(execute_module, "fit", watched)


def status(run: RunDir) -> RunSummary:
    return run.read_summary()
