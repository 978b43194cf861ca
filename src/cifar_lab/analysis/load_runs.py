"""Run folders read back: config, summary, history and predictions of each, checked.

A folder may have been made by someone else: a run that cannot be read is named with its reason, and
the others are read all the same.
"""

import dataclasses
import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any

from cifar_lab.analysis import run_metrics
from cifar_lab.config.identity import identity
from cifar_lab.config.run_config import RunConfig, flatten
from cifar_lab.errors import RunFailed, UsageError, shorten
from cifar_lab.runs.metrics import EpochMetrics, Integers, Predictions
from cifar_lab.runs.run_dir import RunDir, find_runs
from cifar_lab.runs.summary import RunSummary

_GROUPS_WITHOUT_EFFECT = ("experiment", "figures")
"""Groups whose options change nothing that the other config values do not show."""

REPLICATES = ("seed", "split.fold")
"""Keys in which the runs of one configuration may differ."""

MISSING = "–"


def identity_without(config: RunConfig, *keys: str) -> dict[str, Any]:
    """Return what makes a run what it is, by dotted key, but for `keys`.

    Two runs are the same run but for `keys` where these are equal.
    """
    plain = identity(config, with_defaults=True)
    # What a run computes from its images follows from them: each fold has images of its own.
    dataset = plain["dataset"] | dict.fromkeys(config.dataset.computed, "auto")
    plain["dataset"] = {k: v for k, v in dataset.items() if k not in ("checksums", "classes")}
    return {key: value for key, value in flatten(plain).items() if key not in keys}


class FoundRun:
    """A run folder as it was read: config, summary and history, checked."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.config: RunConfig = run.read_config()
        self.summary: RunSummary = _finite(run.read_summary())
        self.history: list[EpochMetrics] = run.read_metrics()
        self.problems: list[str] = []
        self._confusion: dict[tuple[str, str], Integers] = {}

    @property
    def finished(self) -> bool:
        """Whether its numbers are final."""
        return self.summary.status == "finished"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The config values that make the run what it is, by dotted key, without REPLICATES."""
        return identity_without(self.config, *REPLICATES)

    @property
    def replicate(self) -> tuple[int, int | None]:
        """What tells the run from the others of its configuration: its values of REPLICATES."""
        return self.config.seed, self.config.split.fold

    @property
    def replicate_text(self) -> str:
        """The same in words: `seed 0`, `seed 0, fold 3`."""
        fold = self.config.split.fold
        return f"seed {self.config.seed}" + (f", fold {fold}" if fold is not None else "")

    @cached_property
    def choices(self) -> dict[str, str]:
        """The option of each group that has one; a target's name where the config says none."""
        config = self.config
        chosen = {g: o for g, o in config.choices.items() if g not in _GROUPS_WITHOUT_EFFECT}
        for group in ("model", "optimizer", "activation", "scheduler"):
            target_config = getattr(config, group)
            name = target_config.get("_target_", MISSING) if target_config else "none"
            chosen.setdefault(group, str(name).rsplit(".", 1)[-1])
        chosen.setdefault("dataset", config.dataset.name)
        return chosen

    def metric(self, name: str) -> float | None:
        """Return a metric, None where there is none; a damaged file becomes a problem."""
        try:
            return run_metrics.of_run(name, self.run, self.summary, self.history)
        except (UsageError, RunFailed) as error:
            self.note(str(error))
            return None

    def predictions(self, split: str, weights: str = "scored") -> Predictions | None:
        """Return stored predictions, None where there are none; damaged ones become a problem."""
        path = self.run.predictions_file(split, weights)
        if not path.exists():
            return None
        try:
            found = self.run.read_predictions(split, weights)
        except (UsageError, RunFailed) as error:
            self.note(str(error))
            return None
        self._confusion[split, weights] = found.confusion_matrix
        return found

    def confusion(self, split: str, weights: str = "scored") -> Integers | None:
        """Return the counts (C, C) of stored predictions, which are read once at most."""
        if (split, weights) not in self._confusion and self.predictions(split, weights) is None:
            return None
        return self._confusion[split, weights]

    def note(self, problem: str) -> None:
        """Keep a problem, once."""
        if problem not in self.problems:
            self.problems.append(problem)


def read_runs(folder: Path) -> tuple[list[FoundRun], dict[Path, str]]:
    """Read every run at and below `folder`, and why others cannot be read.

    UsageError if there is none.
    """
    found = find_runs(folder)
    if not found:
        raise UsageError(
            f"{folder} holds no run: a run's folder has a config.yaml and a summary.json"
        )
    runs: list[FoundRun] = []
    unreadable: dict[Path, str] = {}
    for run in found:
        try:
            runs.append(FoundRun(run))
        except (UsageError, RunFailed, OSError, RecursionError) as error:
            text = str(error) or type(error).__name__
            for path in (run.config_file, run.summary_file, run.metrics_file, run.path):
                text = text.replace(f"{path}", path.name)
            unreadable[run.path] = text
    return runs, unreadable


def show_value(value: Any) -> str:
    """Return a config value as short text: 0.0001, null, [3, 32, 32]."""
    if isinstance(value, float):
        return f"{value:.10g}"
    return shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 60)


def _finite(summary: RunSummary) -> RunSummary:
    """Return a summary without numbers that are not finite: a run that diverged has such losses."""
    replaced: dict[str, Any] = {
        spec.name: spec.default
        for spec in dataclasses.fields(summary)
        if isinstance(value := getattr(summary, spec.name), float) and not math.isfinite(value)
    }
    return dataclasses.replace(summary, **replaced)
