"""The summary of a run: the fields of `summary.json` and their types."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from cifar_lab.config.identity import identity_hash
from cifar_lab.config.run_config import RunConfig, check_figure_name
from cifar_lab.config.schema import parse_as
from cifar_lab.errors import UsageError
from cifar_lab.runs.metrics import columns, is_possible

Status = Literal["queued", "running", "interrupted", "failed", "finished"]


@dataclass(frozen=True)
class RunSummary:
    """The result of a run: accuracies are fractions, losses means per image, seconds wall clock.

    `best_epoch` is the one that `training.monitor` chose, and the `best_val_*` are its scores.
    `test_images_trained_on` counts test images with the pixels of a training image, if there are
    any. `per_class_accuracy` has a row for each class: a name is no key, since it may be any text.
    `results_version` and `targets_hash` are those of the code that trained it; runs of before these
    have a `code_hash` instead.
    """

    status: Status
    seed: int
    choices: dict[str, str]
    protocol: str
    device: str
    precision: str
    threads: int | None = None
    device_name: str | None = None
    epochs: int = 0
    best_epoch: int | None = None
    best_val_accuracy: float | None = None
    best_val_loss: float | None = None
    best_val_balanced_accuracy: float | None = None
    best_val_macro_f1: float | None = None
    scored_weights: str | None = None
    test_accuracy: float | None = None
    test_loss: float | None = None
    test_accuracy_last: float | None = None
    test_accuracy_averaged: float | None = None
    test_size: int | None = None
    expected_calibration_error: float | None = None
    test_images_trained_on: int | None = None
    test_accuracy_without_them: float | None = None
    per_class_accuracy: list[dict[str, Any]] = field(default_factory=list)
    most_confused: list[dict[str, Any]] = field(default_factory=list)
    diagnosis: dict[str, float | int] = field(default_factory=dict)
    separation: dict[str, float | None] = field(default_factory=dict)
    initial_learning_rate: float | None = None
    effective_learning_rate: float | None = None
    parameters: int | None = None
    seconds: float = 0.0
    images_per_second: float | None = None
    epoch_seconds: float | None = None
    overhead_seconds: float | None = None
    stopped_early: bool = False
    figures: list[str] = field(default_factory=list)
    continued_from: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    results_version: int | None = None
    targets_hash: str | None = None
    code_hash: str | None = None
    dataset: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    error: str | None = None
    identity: str | None = None

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, as they were when the run was evaluated."""
        return [str(row.get("class", "")) for row in self.per_class_accuracy]

    def check(self, path: str) -> None:
        """Refuse numbers that no run has, and figures that lead out of the run's folder."""
        for name in columns(RunSummary):
            value = getattr(self, name)
            if isinstance(value, int | float) and not is_possible(name, value):
                raise UsageError(f"{name} is {value:.6g}, which no run has")
        for figure in self.figures:
            check_figure_name(figure)


def queued(config: RunConfig) -> RunSummary:
    """Return the summary of a run that has not started."""
    return RunSummary(
        status="queued",
        seed=config.seed,
        choices=config.choices,
        protocol=config.protocol,
        device=config.device,
        precision=config.precision,
        threads=config.threads,
        initial_learning_rate=config.optimizer.get("lr"),
        identity=identity_hash(config),
    )


def to_json(summary: RunSummary) -> str:
    """Return the text of summary.json."""
    return json.dumps(dataclasses.asdict(summary), indent=2, ensure_ascii=False) + "\n"


def from_json(text: bytes) -> RunSummary:
    """Return the summary that `to_json` wrote; fields that this version does not know are left out.

    Raises ValueError, UsageError or RecursionError if the text is anything else. A run that
    diverged has losses that are not finite.
    """
    data = json.loads(text)
    known = columns(RunSummary)
    if isinstance(data, dict):
        data = {name: value for name, value in data.items() if name in known}
        scores = data.get("per_class_accuracy")
        if isinstance(scores, dict):  # of a run of before names were no keys
            rows = [{"class": name, "accuracy": score} for name, score in scores.items()]
            data["per_class_accuracy"] = rows
    return parse_as(RunSummary, data, "", finite=False)
