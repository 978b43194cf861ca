"""Run folders read back: config, summary, history and predictions of each, checked.

A folder may have been made by someone else: a run that cannot be read is named with its reason, and
the others are read all the same.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cifar_lab.analysis import run_metrics
from cifar_lab.analysis.statistics import sort_by_index
from cifar_lab.config.identity import identity
from cifar_lab.config.run_config import RunConfig, flatten
from cifar_lab.errors import RunFailed, UsageError, shorten
from cifar_lab.runs.metrics import BY_CLASS, EpochMetrics, Predictions, best_row
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


@dataclass(frozen=True)
class Scored:
    """Stored predictions in short: which images are right (N,), in the order of their indices.

    `images` is a digest of the indices and the labels: the same for runs on the same images.
    """

    images: bytes
    right: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, predictions: Predictions) -> "Scored":
        """Return it of a run's predictions."""
        ordered = sort_by_index(predictions)
        images = np.stack([ordered.indices, ordered.labels]).astype(np.int64)
        return cls(hashlib.sha256(images.tobytes()).digest(), ordered.predicted == ordered.labels)


class FoundRun:
    """A run folder as it was read: config, summary and history, checked."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.config: RunConfig = run.read_config()
        self.summary: RunSummary = run.read_summary()
        self.history: list[EpochMetrics] = run.read_metrics()
        self.problems: list[str] = []
        self._scored: dict[tuple[str, str], Scored | None] = {}
        if self.finished:
            self.check_scores()

    @property
    def finished(self) -> bool:
        """Whether its numbers are final."""
        return self.summary.status == "finished"

    @property
    def replicate(self) -> tuple[int, int | None]:
        """What tells the run from the others of its configuration: its values of REPLICATES."""
        return self.config.seed, self.config.split.fold

    @property
    def replicate_text(self) -> str:
        """The same in words: `seed 0`, `seed 0, fold 3`."""
        fold = self.config.split.fold
        return f"seed {self.config.seed}" + (f", fold {fold}" if fold is not None else "")

    @property
    def progress_text(self) -> str:
        """How many epochs it has finished, and of how many."""
        return f"{len(self.history)} of {self.config.training.epochs}"

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

    @cached_property
    def values(self) -> dict[str, str]:
        """What makes the run what it is, but for REPLICATES: options by group, values by key."""
        values = {group: shorten(option, 60) for group, option in self.choices.items()}
        for key, value in identity_without(self.config, *REPLICATES).items():
            values.setdefault(key, show_value(value))
        return values

    def metric(self, name: str) -> float | None:
        """Return a metric, None where there is none; a damaged file becomes a problem."""
        try:
            return run_metrics.of_run(name, self.run, self.summary, self.history)
        except (UsageError, RunFailed) as error:
            self.note(str(error))
            return None

    def scored(self, split: str, weights: str = "scored") -> Scored | None:
        """Return what tests and confusion matrices need of stored predictions, read once.

        None where there are none; damaged ones become a problem.
        """
        key = split, weights
        if key not in self._scored:
            self._scored[key] = None
            try:
                if self.run.predictions_file(*key).exists():
                    self._scored[key] = Scored.of(self.run.read_predictions(*key))
            except (UsageError, RunFailed) as error:
                self.note(str(error))
        return self._scored[key]

    def check_scores(self) -> None:
        """Replace scores of summary.json that are not those of the run's other files.

        They were edited or are out of date; what is measured counts, and a problem names both.
        """
        best = best_row(self.history, self.config.training.monitor)
        names = ("epoch", "val_loss", "val_accuracy", *BY_CLASS)
        measured = {f"best_{n}": (getattr(best, n, None), "metrics.csv", 1e-6) for n in names}
        for name, weights in (("test_accuracy", "scored"), ("test_accuracy_last", "last")):
            scored = self.scored("test", weights)
            if scored is not None and len(scored.right):
                half_an_image = 0.5 / len(scored.right)
                accuracy = float(scored.right.mean())
                measured[name] = (accuracy, "its stored predictions", half_an_image)
        for name, (value, source, tolerance) in measured.items():
            said: float | None = getattr(self.summary, name)
            if said is not None and value is not None and abs(said - value) > tolerance:
                shown = [run_metrics.show(name, number) for number in (said, value)]
                self.note(
                    f"summary.json has {run_metrics.in_words(name)} {shown[0]}, {source} "
                    f"{shown[1]}, which counts"
                )
                corrected: dict[str, Any] = {name: value}
                self.summary = replace(self.summary, **corrected)

    def note(self, problem: str) -> None:
        """Keep a problem, once."""
        if problem not in self.problems:
            self.problems.append(problem)


def read_runs(folder: Path) -> tuple[list[FoundRun], dict[Path, str]]:
    """Read every run at and below `folder`, and why others cannot be read.

    UsageError if there is none.
    """
    runs: list[FoundRun] = []
    unreadable: dict[Path, str] = {}
    for run in find_runs(folder):
        try:
            runs.append(FoundRun(run))
        except (UsageError, RunFailed, OSError, RecursionError) as error:
            text = str(error) or type(error).__name__
            for path in (run.config_file, run.summary_file, run.metrics_file, run.path):
                text = text.replace(f"{path}", path.name)
            unreadable[run.path] = text
    if not runs and not unreadable:
        right = "a run's folder has a config.yaml and a summary.json"
        raise UsageError(f"{folder} holds no run: {right}")
    return runs, unreadable


def show_value(value: Any) -> str:
    """Return a config value as short text: 0.0001, null, [3, 32, 32]."""
    if isinstance(value, float):
        return f"{value:.10g}"
    return shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 60)
