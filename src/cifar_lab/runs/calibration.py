"""How well the probabilities of predictions agree with how often they are right."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cifar_lab.runs.metrics import Floats, Predictions

BINS = 15
"""Bins of equal width, as in Guo et al. (2017)."""


@dataclass(frozen=True)
class Calibration:
    """Images by the probability of their predicted class, in B bins (low, high] of equal width.

    `counts` (B,): images; `confidence` (B,) and `right` (B,): sums over the images of a bin, of
    that probability and of the correct answers.
    """

    counts: npt.NDArray[np.int64]
    confidence: Floats
    right: npt.NDArray[np.int64]

    @property
    def error(self) -> float:
        """Expected calibration error (Guo et al. 2017), in [0, 1].

        The mean over the images of how far the accuracy of their bin is from its mean confidence.
        """
        return float(np.abs(self.right - self.confidence).sum() / self.counts.sum())

    @property
    def overconfidence(self) -> float:
        """Mean confidence minus accuracy, over all images."""
        return float((self.confidence.sum() - self.right.sum()) / self.counts.sum())


def class_probabilities(predictions: Predictions) -> npt.NDArray[np.float64]:
    """Return the probability of each class (N, C): the softmax of the logits.

    Outputs of a model that ends with a softmax are probabilities already.
    """
    outputs = predictions.logits.astype(np.float64)
    if (outputs >= 0).all() and np.allclose(outputs.sum(axis=1), 1, atol=1e-3):
        return outputs
    return predictions.probabilities


def calibration(predictions: Predictions, bins: int = BINS) -> Calibration | None:
    """Return how predictions are calibrated; None without images or with logits not finite."""
    if not len(predictions) or not np.isfinite(predictions.logits).all():
        return None
    confidence = class_probabilities(predictions).max(axis=1)
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    right = predictions.predicted == predictions.labels
    return Calibration(
        np.bincount(place, minlength=bins),
        np.asarray(np.bincount(place, weights=confidence, minlength=bins), dtype=np.float64),
        np.bincount(place[right], minlength=bins),
    )
