"""The numbers of a run: a row per epoch, predictions, and the scores computed from them."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch: losses are means per image, accuracies fractions, seconds wall clock.

    The training figures are running ones, taken in training mode with augmentation and dropout.
    `learning_rate` is the one that the epoch's last step used.
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


TIMES = ("seconds", "images_per_second")
"""The columns of EpochMetrics that differ between two otherwise identical runs."""


@dataclass(frozen=True)
class StepMetrics:
    """One training step, kept on request (S4-15): loss and accuracy of its batch."""

    epoch: int
    step: int
    loss: float
    accuracy: float


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
    def probabilities(self) -> npt.NDArray[np.float64]:
        """Softmax of the logits, (N, C): S1's p_i = exp(a_i) / sum_j exp(a_j)."""
        return np.exp(self.log_probabilities)

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


def binomial_half_width(accuracy: float, images: int) -> float:
    """Return the half width of the 95 % normal interval of an accuracy measured on `images`."""
    return 1.96 * math.sqrt(max(accuracy * (1 - accuracy), 0.0) / images) if images else math.nan


def diagnosis(history: Sequence[EpochMetrics]) -> dict[str, float | int]:
    """Return what S1 and S4 say in words about overfitting, as numbers; empty without validation.

    `gap`: train minus validation accuracy in the last epoch; `best_val_loss_epoch` and
    `best_val_accuracy_epoch`: the epochs from which validation no longer improves.
    """
    rows = [r for r in history if r.val_accuracy is not None and r.val_loss is not None]
    if not rows:
        return {}
    best_loss = min(rows, key=lambda r: (r.val_loss, r.epoch))
    best_accuracy = max(rows, key=lambda r: (r.val_accuracy or 0.0, -r.epoch))
    return {
        "gap": rows[-1].train_accuracy - (rows[-1].val_accuracy or 0.0),
        "best_val_loss_epoch": best_loss.epoch,
        "best_val_accuracy_epoch": best_accuracy.epoch,
    }


_NEIGHBOURS = 5


def separation(points: Floats, labels: Integers) -> dict[str, float]:
    """Return how well classes keep apart among points (n, D): two numbers.

    `knn_accuracy`: share of points whose class is the most frequent one among their five nearest
    neighbours, themselves left out (a tie goes to the nearer); `silhouette`: mean over the points,
    from -1 to 1 (Rousseeuw 1987), nan with one class.
    """
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import NearestNeighbors

    classes, codes = np.unique(labels, return_inverse=True)
    k = min(_NEIGHBOURS, len(points) - 1)
    nearest = NearestNeighbors(n_neighbors=k).fit(points).kneighbors(return_distance=False)
    votes = np.zeros((len(points), len(classes)))
    for rank in range(k):
        # A hundredth more for each place nearer: it breaks a tie and overturns no majority.
        votes[np.arange(len(points)), codes[nearest[:, rank]]] += 1 + 0.01 * (k - rank)
    apart = 1 < len(classes) < len(points)
    return {
        "knn_accuracy": float((votes.argmax(axis=1) == codes).mean()),
        "silhouette": float(silhouette_score(points, codes)) if apart else math.nan,
    }


def columns(kind: type) -> list[str]:
    """Return the field names of a row type, in the order of its file's columns."""
    return [spec.name for spec in dataclasses.fields(kind)]
