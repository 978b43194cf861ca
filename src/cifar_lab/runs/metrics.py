"""The numbers of a run: a row per epoch, predictions, and the scores computed from them."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cifar_lab.errors import Damaged
from cifar_lab.runs.files import read_bytes

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.integer[Any]]
Probabilities = npt.NDArray[np.float64]


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch: losses are means per image, accuracies fractions, seconds wall clock.

    The training figures are running ones, taken in training mode with augmentation and dropout.
    `learning_rate` is the one that the epoch's last step used. Of the columns with a default, a run
    has those of test scores if it watches the test set, and the last two if it monitors one.
    """

    epoch: int
    learning_rate: float
    train_loss: float
    train_accuracy: float
    val_loss: float | None
    val_accuracy: float | None
    seconds: float
    images_per_second: float
    test_loss: float | None = None
    test_accuracy: float | None = None
    val_balanced_accuracy: float | None = None
    val_macro_f1: float | None = None


BY_CLASS = ("val_balanced_accuracy", "val_macro_f1")
"""The scores by class: columns of EpochMetrics of the runs that monitor one of them."""

TIMES = ("seconds", "images_per_second")
"""The columns of EpochMetrics that differ between two otherwise identical runs."""


@dataclass(frozen=True)
class StepMetrics:
    """One training step, kept on request, for S4's curve: loss and accuracy of its batch."""

    epoch: int
    step: int
    loss: float
    accuracy: float


Row = TypeVar("Row", EpochMetrics, StepMetrics)


def to_csv(rows: Iterable[Row], names: Sequence[str], *, header: bool) -> str:
    """Return rows as lines of CSV, with the columns `names`."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, extrasaction="ignore", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(vars(row) for row in rows)
    return buffer.getvalue()


def read_csv(path: Path, kind: type[Row]) -> list[Row]:
    """Return the rows of a file that `to_csv` wrote; none if there is no file.

    A last line without its newline, torn by a crash, is left out. Raises Damaged if another line
    cannot be read.
    """
    rows: list[Row] = []
    try:
        text = read_bytes(path).decode()
        for cells in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()):
            rows.append(kind(**{name: _number(name, cell) for name, cell in cells.items()}))
    except FileNotFoundError:
        return []
    except (TypeError, ValueError, csv.Error):
        raise Damaged(f"{path} is damaged: line {len(rows) + 2} cannot be read") from None
    return rows


def _number(name: str, cell: str) -> Any:
    if cell == "":
        return None
    number = int(cell) if name in ("epoch", "step") else float(cell)
    if not is_possible(name, number):
        raise ValueError(f"{name} {cell}")
    return number


def is_possible(name: str, value: float) -> bool:
    """Whether a run can have a score of this name; what diverged has losses that are no number.

    Times are not judged: clocks are set.
    """
    if math.isnan(value) or "second" in name or "rate" in name:
        return True
    fraction = "accuracy" in name or "f1" in name or name.endswith("calibration_error")
    return 0 <= value <= (1 if fraction else math.inf)


def columns(kind: type) -> list[str]:
    """Return the field names of a row type, in the order of its file's columns."""
    return [spec.name for spec in fields(kind)]


def epoch_columns(
    rows: Sequence[EpochMetrics], *, watched: bool = False, by_class: bool = False
) -> list[str]:
    """Return the names of the columns that rows need in metrics.csv.

    Those of test scores and of scores by class are left out unless a row has one, or later rows
    will: where the test set is `watched`, and where scores `by_class` are computed.
    """
    optional = {"test_loss": watched, "test_accuracy": watched} | dict.fromkeys(BY_CLASS, by_class)
    return [
        name
        for name in columns(EpochMetrics)
        if optional.get(name, True) or any(getattr(row, name) is not None for row in rows)
    ]


def gain(row: EpochMetrics, monitor: str) -> float | None:
    """Return the column that a run monitors, negative if it is a loss: more of it is better.

    None where the row has no such value.
    """
    value: float | None = getattr(row, monitor)
    return value if value is None or monitor != "val_loss" else -value


def best_row(rows: Iterable[EpochMetrics], monitor: str) -> EpochMetrics | None:
    """Return the first of the best rows; None if none has a value of the monitored column."""
    scored = (row for row in rows if gain(row, monitor) is not None)
    return max(scored, key=lambda row: gain(row, monitor) or 0.0, default=None)


def scores_by_class(labels: Integers, predicted: Integers) -> tuple[float, float]:
    """Return balanced accuracy and macro F1 of predicted classes (N,), as scikit-learn does.

    The balanced accuracy is the mean recall of the classes among the labels, and the macro F1 the
    mean over those among labels or predictions.
    """
    from sklearn.metrics import f1_score, recall_score

    # Unlike balanced_accuracy_score, this does not warn of a predicted class without a label.
    balanced = recall_score(labels, predicted, labels=np.unique(labels), average="macro")
    return float(balanced), float(f1_score(labels, predicted, average="macro", zero_division=0.0))


def are_probabilities(outputs: Floats) -> bool:
    """Whether outputs (N, C) of a model are probabilities: none negative, each row's sum 1."""
    return bool((outputs >= 0).all()) and np.allclose(outputs.sum(axis=1), 1, atol=1e-3)


@dataclass(frozen=True)
class Predictions:
    """Logits (N, C) float32 of images in a split, their labels (N,) and dataset indices (N,)."""

    logits: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    @cached_property
    def log_probabilities(self) -> npt.NDArray[np.float64]:
        """Log of the softmax of the logits, (N, C)."""
        logits = self.logits.astype(np.float64)
        shifted = logits - logits.max(axis=1, keepdims=True)
        normaliser = np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return np.asarray(shifted - normaliser)

    @cached_property
    def probabilities(self) -> Probabilities:
        """Softmax of the logits, (N, C): S1's p_i = exp(a_i) / sum_j exp(a_j)."""
        return np.exp(self.log_probabilities)

    @cached_property
    def class_probabilities(self) -> Probabilities:
        """The probability of each class, (N, C): the softmax of the logits.

        Outputs of a model that ends with a softmax are probabilities already.
        """
        outputs = self.logits.astype(np.float64)
        return outputs if are_probabilities(outputs) else self.probabilities

    @cached_property
    def predicted(self) -> npt.NDArray[np.int64]:
        """Most probable class of each image, (N,)."""
        return np.asarray(self.logits.argmax(axis=1), dtype=np.int64)

    @property
    def accuracy(self) -> float:
        """Share of images whose most probable class is their label."""
        return float((self.predicted == self.labels).mean()) if len(self) else math.nan

    @property
    def loss(self) -> float:
        """Mean cross-entropy per image, in nats."""
        if not len(self):
            return math.nan
        return float(-self.log_probabilities[np.arange(len(self)), self.labels].mean())

    @cached_property
    def confusion_matrix(self) -> npt.NDArray[np.int64]:
        """Counts (C, C): row is the label, column the prediction."""
        classes = self.logits.shape[1]
        flat = np.bincount(self.labels * classes + self.predicted, minlength=classes * classes)
        return flat.reshape(classes, classes)

    @property
    def per_class_accuracy(self) -> npt.NDArray[np.float64]:
        """Share of each class's images that are recognised (recall), (C,); nan without images."""
        support = self.confusion_matrix.sum(axis=1)
        with np.errstate(invalid="ignore"):
            return np.asarray(np.diag(self.confusion_matrix) / support, dtype=np.float64)

    def most_confused(self, count: int = 5) -> list[tuple[int, int, int]]:
        """Return the `count` largest (label, prediction, images) off the diagonal."""
        errors = self.confusion_matrix.copy()
        np.fill_diagonal(errors, 0)
        order = np.argsort(errors, axis=None, kind="stable")[::-1][:count]
        pairs = [divmod(int(i), errors.shape[1]) for i in order]
        return [
            (label, guess, int(errors[label, guess]))
            for label, guess in pairs
            if errors[label, guess]
        ]


_FEW = 5  # images that are right, or wrong, below which the normal interval is not used


def binomial_half_width(accuracy: float, images: int) -> float:
    """Return the half width of the 95 % normal interval of an accuracy measured on `images`."""
    return 1.96 * math.sqrt(max(accuracy * (1 - accuracy), 0.0) / images) if images else math.nan


def show_interval(accuracy: float, images: int) -> str:
    """Return the words for the 95 % interval of an accuracy measured on `images`.

    The normal interval is symmetric, which is easier to read, but too narrow where only a few
    images are right, or wrong: of none, its width is 0. Wilson's takes its place there.
    """
    if images * min(accuracy, 1 - accuracy) >= _FEW:
        return f"95 % interval ±{binomial_half_width(accuracy, images):.2%}"
    low, high = wilson_interval(accuracy, images)
    return f"95 % interval {low:.2%} to {high:.2%}"


def wilson_interval(share: float, images: int) -> tuple[float, float]:
    """Return the 95 % interval of a share found on `images` (Wilson 1927).

    Unlike the normal one it keeps its width at shares of 0 and 1.
    """
    z = 1.959963984540054
    centre = share + z * z / (2 * images)
    half = z * math.sqrt(share * (1 - share) / images + z * z / (4 * images * images))
    scale = 1 + z * z / images
    return max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)


def diagnosis(history: Sequence[EpochMetrics]) -> dict[str, float | int]:
    """Return what S1 and S4 say in words about overfitting, as numbers; empty without validation.

    `gap`: train minus validation accuracy in the last epoch; `best_val_loss_epoch` and
    `best_val_accuracy_epoch`: the epochs from which validation no longer improves.
    """
    rows = [row for row in history if row.val_accuracy is not None and row.val_loss is not None]
    loss, accuracy = best_row(rows, "val_loss"), best_row(rows, "val_accuracy")
    if loss is None or accuracy is None:
        return {}
    return {
        "gap": rows[-1].train_accuracy - (rows[-1].val_accuracy or 0.0),
        "best_val_loss_epoch": loss.epoch,
        "best_val_accuracy_epoch": accuracy.epoch,
    }
