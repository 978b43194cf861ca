"""The files of a run's folder, each written and read back here.

Files appear whole or not at all (temporary file, fsync, rename, fsync of the folder). Only
`metrics.csv`, `steps.csv` and `train.log` grow by appending; the reader drops a line torn by a
crash, and the resumed run writes it again.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import Damaged, first_line, redact
from cifar_lab.runs import files
from cifar_lab.runs.metrics import (
    EpochMetrics,
    Predictions,
    StepMetrics,
    columns,
    epoch_columns,
    read_csv,
    to_csv,
)
from cifar_lab.runs.summary import RunSummary
from cifar_lab.runs.text import class_name

_AVERAGES = ("micro avg", "macro avg", "weighted avg")  # rows of scikit-learn's that are no class


class RunFiles:
    """The names of a run's files, and the readers and writers of its results."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.csv"
        self.steps_file = self.path / "steps.csv"
        self.summary_file = self.path / "summary.json"
        self.log_file = self.path / "train.log"
        self.last = self.path / "last.pt"
        self.best = self.path / "best.pt"
        self.samples_file = self.path / "samples.npz"
        self.features_file = self.path / "features.npz"
        self.report_text = self.path / "classification_report.txt"
        self.report_json = self.path / "classification_report.json"
        self.errors_page = self.path / "errors.html"
        self.figures = self.path / "figures"
        self.tensorboard = self.path / "tensorboard"
        self.trackers_file = self.path / "trackers.json"
        self.trackers_log = self.path / "trackers.log"
        self.trackers_lock = self.path / ".trackers.lock"
        self.lock_file = self.path / ".lock"

    # --- rows -----------------------------------------------------------------------------------

    def rewrite_metrics(
        self, rows: Sequence[EpochMetrics], *, watched: bool = False, by_class: bool = False
    ) -> None:
        """Replace metrics.csv.

        Rows with test scores will follow if the test set is `watched`, and rows with scores by
        class if there are such `by_class`.
        """
        names = epoch_columns(rows, watched=watched, by_class=by_class)
        files.write_text(self.metrics_file, to_csv(rows, names, header=True))

    def append_metrics(self, row: EpochMetrics) -> None:
        """Append a row to metrics.csv, in the file's columns, and wait until it is on the disk."""
        with self.metrics_file.open(encoding="utf-8") as file:
            names = file.readline().rstrip("\n").split(",")
        files.append_text(self.metrics_file, to_csv([row], names, header=False))

    def read_metrics(self) -> list[EpochMetrics]:
        """Return the rows of metrics.csv, without a torn last line; none if there is no file."""
        return read_csv(self.metrics_file, EpochMetrics)

    def rewrite_steps(self, rows: Sequence[StepMetrics]) -> None:
        """Replace steps.csv."""
        files.write_text(self.steps_file, to_csv(rows, columns(StepMetrics), header=True))

    def append_steps(self, rows: Sequence[StepMetrics]) -> None:
        """Append rows to steps.csv."""
        files.append_text(self.steps_file, to_csv(rows, columns(StepMetrics), header=False))

    def read_steps(self) -> list[StepMetrics]:
        """Return the rows of steps.csv; none without `training.step_history`."""
        return read_csv(self.steps_file, StepMetrics)

    def append_log(self, text: str) -> None:
        """Append lines to train.log."""
        files.append_text(self.log_file, redact(text) + "\n", safely=False)

    def write_summary(self, summary: RunSummary) -> None:
        """Replace summary.json."""
        text = json.dumps(dataclasses.asdict(summary), indent=2, ensure_ascii=False)
        files.write_text(self.summary_file, text + "\n")

    # --- checkpoints ----------------------------------------------------------------------------

    def write_last(self, state: Mapping[str, Any]) -> None:
        """Replace last.pt; at no moment is there none, or half of one."""
        files.save_checkpoint(state, self.last)

    def write_best(self, state: Mapping[str, Any], extra_name: str | None = None) -> None:
        """Replace best.pt; `extra_name` is that of a copy (S2-10, S2-11)."""
        files.save_checkpoint(state, self.best)
        if extra_name is not None:
            with files.replacing(files.check_inside(self.path / extra_name, self.path)) as handle:
                handle.write(self.best.read_bytes())

    def read_last(self) -> dict[str, Any] | None:
        """Return last.pt, None if there is none.

        Raises Damaged if it cannot be read, so that training never starts anew unasked.
        """
        if not self.last.exists():
            return None
        try:
            return files.load_checkpoint(self.last)
        except Damaged as error:
            raise Damaged(f"{error}; rerun=true starts again") from None

    # --- predictions, samples, features ---------------------------------------------------------

    def predictions_file(self, split: str, weights: str) -> Path:
        """Return predictions.npz for ("test", "scored"), else a file named by both."""
        plain = (split, weights) == ("test", "scored")
        return self.path / ("predictions.npz" if plain else f"predictions_{split}_{weights}.npz")

    def write_predictions(self, predictions: Predictions, split: str, weights: str) -> None:
        """Write logits, labels and indices of one split with one set of weights."""
        self.write_arrays(
            self.predictions_file(split, weights),
            logits=predictions.logits.astype(np.float32),
            labels=predictions.labels,
            indices=predictions.indices,
        )

    def read_predictions(self, split: str = "test", weights: str = "scored") -> Predictions:
        """Return the predictions of a split; UsageError if there are none."""
        path = self.predictions_file(split, weights)
        kinds = {"logits": "f2", "labels": "i1", "indices": "i1"}
        read = Predictions(**files.read_arrays(path, kinds))
        classes = read.logits.shape[1]
        if len(read) and not 0 <= read.labels.min() <= read.labels.max() < classes:
            raise Damaged(f"{path} is damaged: its labels are not those of {classes} classes")
        return read

    def read_features(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return the features (n, D) and labels (n,) of some test images."""
        arrays = files.read_arrays(self.features_file, {"features": "f2", "labels": "i1"})
        return arrays["features"], arrays["labels"]

    def read_report(self) -> list[dict[str, float]]:
        """Return the rows of the classes in classification_report.json; [] if there is no file."""
        try:
            data = json.loads(files.read_bytes(self.report_json))
            rows = data.get("classes")
            if rows is None:  # of a run of before names were no keys
                rows = [r for n, r in data.items() if isinstance(r, dict) and n not in _AVERAGES]
            columns = ("precision", "recall", "f1-score", "support")
            return [{column: float(row[column]) for column in columns} for row in rows]
        except FileNotFoundError:
            return []
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise Damaged(f"{self.report_json} is damaged: {first_line(error)}") from None

    def write_arrays(self, path: Path, **arrays: np.ndarray[Any, Any]) -> None:
        """Write named arrays as one .npz file."""
        with files.replacing(files.check_inside(path, self.path)) as handle:
            np.savez_compressed(handle, **arrays)  # type: ignore[arg-type]


def second_name(config: RunConfig, row: EpochMetrics) -> str | None:
    """Return the name for the weights of an epoch, by `training.best_file_name`."""
    template = config.training.best_file_name
    if template is None:
        return None
    return template.format(
        model=class_name(config.model),
        lr=config.optimizer.get("lr", 0.0),
        opt=class_name(config.optimizer),
        act=class_name(config.activation),
        epoch=row.epoch,
        acc=row.val_accuracy or 0.0,
    )
