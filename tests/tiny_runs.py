"""Runs of the digits with a model so small that an epoch takes a fraction of a second.

Do not train what another test has trained already: the fixtures `tiny_finished` and `tiny_stopped`
of conftest.py are one finished and one stopped run of the session, to read; `finished` and
`stopped` are copies of them in a test's own `tmp_path`, to damage, move or continue.
"""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_lab.config.run_config import RunConfig
from cifar_lab.runs.files import load_checkpoint
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training import loop
from cifar_lab.training import run as execute_module
from cifar_lab.training.loop import Progress, Stop
from cifar_lab.training.preflight import compose_checked
from cifar_lab.training.run import run_experiment

TINY = (
    *("dataset=digits", "model.widths=[4,8]", "model.hidden=16", "figures=none", "device=cpu"),
    *("split.validation=900", "training.batch_size=64", "training.epochs=2", "threads=1"),
)

TINY_CELL = (
    *("dataset=digits", "model.widths=[2,4]", "model.hidden=8", "figures=none"),
    "split.validation=200",
)
"""What a cell of a sweep is in the tests of sweeps: its threads are those that a sweep gives."""

NOTED = (
    "training.step_history=true",
    "training.print_every=1",  # a yield, and so a possible stop, after each of the 9 steps
    "training.best_file_name='{model}-{epoch}.pt'",
)
RICH = (
    *NOTED,
    "figures=embeddings",
    *(f"figures.{name}=null" for name in ("tsne", "curves", "confusion_matrix", "samples")),
    *(f"figures.{name}=null" for name in ("per_class", "reliability")),  # half a second each
)
"""What the runs of the session have besides: nearly every file that a run can write."""


def config_of(*overrides: str) -> RunConfig:
    """Return the checked config of a tiny run."""
    return compose_checked([*TINY, *overrides]).runs[0].config


def make(folder: Path, *overrides: str) -> RunDir:
    """Return a queued run below `folder`."""
    return RunDir.create(config_of(f"output_dir={folder}", *overrides))


def train(folder: Path, *overrides: str, **options: Any) -> RunDir:
    """Return a run below `folder`, executed."""
    run = make(folder, *overrides)
    run_experiment(run, **options)
    return run


def copy_run(run: RunDir, folder: Path) -> RunDir:
    """Return a copy of a run below another output folder, as if it had been made there."""
    copy = RunDir(folder / run.path.parent.name / run.path.name)
    shutil.copytree(run.path, copy.path)
    text = copy.config_file.read_text()
    copy.config_file.write_text(text.replace(str(run.path.parents[1]), str(folder)))
    return copy


class StopAt(Stop):
    """Behaves as if a signal had come at the yield with this number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def is_wanted(self, progress: Progress) -> bool:
        self.left -= 1
        return self.left == 0


class StopIn(Stop):
    """Behaves as if a signal had come after this training step, or within this validation.

    With `RICH`, which yields after each step; within validation the number of yields varies.
    """

    def __init__(self, kind: str, epoch: int, step: int | None = None) -> None:
        super().__init__()
        self.place = kind, epoch, step

    def is_wanted(self, progress: Progress) -> bool:
        *place, step = self.place
        return [progress.kind, progress.epoch] == place and step in (None, progress.step)


def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `fit` yield after each step, so that a run can be stopped after any of them."""
    monkeypatch.setattr("cifar_lab.training.group.YIELD_SECONDS", 0.0)


def at_yield(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], object]) -> None:
    """Let `action` happen as training reaches a yield."""
    fit = loop.fit

    def watched(*args: Any, **kwargs: Any) -> Iterator[Progress]:
        for count, progress in enumerate(fit(*args, **kwargs), start=1):
            if count == number:
                action()
            yield progress

    monkeypatch.setattr(execute_module, "fit", watched)


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    """The weights in last.pt, by name."""
    return dict(load_checkpoint(run.last)["model"])


def assert_same_result(first: RunDir, second: RunDir) -> None:
    """Fail unless weights, metrics (without times) and the test accuracy are the same."""
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    rows = [
        [dataclasses.replace(r, seconds=0.0, images_per_second=0.0) for r in run.read_metrics()]
        for run in (first, second)
    ]
    assert rows[0] == rows[1]
    summaries = [run.read_summary() for run in (first, second)]
    assert summaries[0].test_accuracy == summaries[1].test_accuracy is not None


def descendants(pid: int) -> list[int]:
    """The processes below one, read from /proc."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rpartition(")")[2].split()
            parents[int(status.parent.name)] = int(fields[1])
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def kill_tree(pid: int) -> None:
    """End a process and all below it."""
    for process in [pid, *descendants(pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def started(*words: str, **options: Any) -> "subprocess.Popen[str]":
    """Start `train` in a process of its own."""
    line, pipe = [sys.executable, "-m", "cifar_lab.train", *words], subprocess.PIPE
    return subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, **options)


def wait_until(condition: Callable[[], object], what: str, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)
