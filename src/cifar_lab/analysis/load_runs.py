"""Run folders read back: config, summary, history and predictions of each, checked.

A folder may have been made by someone else: a run that cannot be read is named with its reason, and
the others are read all the same.
"""

import dataclasses
import functools
import json
import math
import typing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cifar_lab.analysis import run_metrics
from cifar_lab.config.identity import TRANSPORT_ARGUMENTS
from cifar_lab.config.run_config import RunConfig, flatten, to_plain
from cifar_lab.config.schema import convert
from cifar_lab.errors import RunFailed, UsageError, shorten
from cifar_lab.runs.metrics import EpochMetrics, Integers, Predictions
from cifar_lab.runs.run_dir import RunDir, find_runs
from cifar_lab.runs.summary import RunSummary

_GROUPS_WITHOUT_EFFECT = ("experiment", "figures")
"""Groups whose options change nothing that the other config values do not show."""

REPLICATES = ("seed", "split.fold")
"""Keys in which the runs of one setting may differ."""

MISSING = "–"


class FoundRun:
    """A run folder as it was read: config, summary and history, checked."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.config: RunConfig = run.read_config()
        self.summary: RunSummary = _checked(run.read_summary(), run)
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
        plain = _identity(self.config)
        source = plain["dataset"]
        # each fold has training images of its own
        source |= dict.fromkeys(self.config.dataset.computed, "auto")
        for name in ("checksums", "classes"):
            source.pop(name)
        for name in TRANSPORT_ARGUMENTS:
            source["source"].pop(name, None)
        flat = flatten(plain)
        return {key: value for key, value in flat.items() if key not in REPLICATES}

    @cached_property
    def replicate(self) -> tuple[Any, ...]:
        """What tells the run from the others of its setting: its values of REPLICATES."""
        flat = flatten(to_plain(self.config))
        return tuple(flat.get(key) for key in REPLICATES)

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


@dataclass(frozen=True)
class Unreadable:
    """A run folder that cannot be read, and why."""

    path: Path
    reason: str


def read_runs(folder: Path) -> tuple[list[FoundRun], list[Unreadable]]:
    """Read every run at and below `folder`; UsageError if there is none."""
    found = find_runs(folder)
    if not found:
        raise UsageError(
            f"{folder} holds no run: a run's folder has a config.yaml and a summary.json"
        )
    runs: list[FoundRun] = []
    unreadable: list[Unreadable] = []
    for run in found:
        try:
            runs.append(FoundRun(run))
        except (UsageError, RunFailed, OSError, RecursionError) as error:
            unreadable.append(Unreadable(run.path, _reason(error, run)))
    return runs, unreadable


def show_value(value: Any) -> str:
    """Return a config value as short text: 0.0001, null, [3, 32, 32]."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, str):
        return shorten(value, 60)
    return shorten(json.dumps(value, ensure_ascii=False), 60)


def _checked(summary: RunSummary, run: RunDir) -> RunSummary:
    """Return the summary without what is not finite; RunFailed if a value is of a wrong kind."""
    hints = _summary_hints()
    values = {}
    for name in ("status", "seed", "device", "precision", "protocol", "test_size", "error"):
        values[name] = getattr(summary, name)
    numbers = [n for n, hint in hints.items() if hint in (float | None, int | None, float, int)]
    for name in numbers:
        value = getattr(summary, name)
        if isinstance(value, float) and not math.isfinite(value):
            value = 0.0 if hints[name] in (float, int) else None
        values[name] = value
    values["device_name"], values["warnings"] = summary.device_name, summary.warnings
    values["choices"], values["scored_weights"] = summary.choices, summary.scored_weights
    try:
        checked = {n: convert(hints[n], value, n) for n, value in values.items()}
    except UsageError as error:
        raise RunFailed(f"summary.json is damaged: {error}") from None
    return dataclasses.replace(summary, **checked)


def _identity(value: Any) -> Any:
    """Return a config as plain values, without the fields that do not make it another run."""
    if not dataclasses.is_dataclass(value):
        return to_plain(value)
    return {
        spec.name: _identity(getattr(value, spec.name))
        for spec in dataclasses.fields(value)
        if spec.metadata.get("identity", True)
    }


@functools.cache
def _summary_hints() -> dict[str, Any]:
    return typing.get_type_hints(RunSummary)


def _reason(error: BaseException, run: RunDir) -> str:
    text = str(error) or type(error).__name__
    for path in (run.config_file, run.summary_file, run.metrics_file, run.path):
        text = text.replace(f"{path}", path.name)
    return shorten(text, 300)
