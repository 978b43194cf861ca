"""How often predictions of each confidence are right: calibration and the reliability diagram."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cifar_lab.figures import style
from cifar_lab.runs.metrics import Floats, Predictions, wilson_interval
from cifar_lab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW = 100
"""Bins of fewer images fade."""

BINS = 15
"""Bins of equal width, as in Guo et al. (2017)."""


@dataclass(frozen=True)
class Calibration:
    """Images by the probability of their predicted class, in B bins (low, high] of equal width.

    `counts` (B,): images; `confidence` (B,) and `right` (B,): sums over the images of a bin, of
    that probability and of the correct answers.
    """

    counts: NDArray[np.int64]
    confidence: Floats
    right: NDArray[np.int64]

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


def calibration(predictions: Predictions, bins: int = BINS) -> Calibration | None:
    """Return how predictions are calibrated; None without images or with logits not finite."""
    if not len(predictions) or not np.isfinite(predictions.logits).all():
        return None
    confidence = predictions.class_probabilities.max(axis=1)
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    right = predictions.predicted == predictions.labels
    return Calibration(
        np.bincount(place, minlength=bins),
        np.asarray(np.bincount(place, weights=confidence, minlength=bins), dtype=np.float64),
        np.bincount(place[right], minlength=bins),
    )


def draw(run: RunDir, bins: int = BINS, split: str = "test", weights: str = "scored") -> "Figure":
    """Return accuracy against confidence in `bins` bins, above the number of images in each.

    `split` and `weights` name the predictions file.
    """
    calibrated = calibration(run.read_predictions(split, weights), bins)
    assert calibrated is not None, "no images with finite scores"
    figure = style.new_figure(5.2, 5.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    style.dress(upper, "Reliability", "", "share correct")
    style.dress(lower, "", "probability of the predicted class", "images")
    label = "as often right as predicted"
    upper.plot([0, 1], [0, 1], "--", color=style.MUTED, linewidth=1, label=label)
    upper.set(xlim=(0, 1), ylim=(0, 1))
    for axis in (upper.yaxis, lower.xaxis):
        style.percent_axis(axis)
    filled = calibrated.counts > 0
    counts = calibrated.counts[filled]
    share, confidence = calibrated.right[filled] / counts, calibrated.confidence[filled] / counts
    intervals = [wilson_interval(float(s), int(n)) for s, n in zip(share, counts, strict=True)]
    around = np.abs(np.array(intervals) - share[:, None]).T
    look: dict[str, Any] = {"yerr": around, "label": "share correct, 95 % interval"}
    look["error_kw"] = {"ecolor": style.INK, "elinewidth": 0.8, "capsize": 2, "alpha": 0.6}
    middle, width = (np.arange(bins) + 0.5) / bins, 0.94 / bins
    # Bins of a few images say little: they fade, and their interval is wide.
    for bar, number in zip(upper.bar(middle[filled], share, width, **look), counts, strict=True):
        bar.set_facecolor(("#4C8DBD", 0.25 + 0.75 * min(1.0, number / FEW)))
    dots: dict[str, Any] = {"color": style.VERMILLION, "markersize": 4, "clip_on": False}
    upper.plot(confidence, share, "o", label="the same, at the mean probability of its bin", **dots)
    lower.bar(middle, calibrated.counts, width, color="#C9C9C9")
    style.legend_outside(figure, upper, columns=1)
    gap, images = 100 * calibrated.overconfidence, f"{counts.sum():,} {split} images"
    error = f"expected calibration error {100 * calibrated.error:.2f} %"
    title = f"{style.run_title(run.read_config())} · {images} · {error}"
    style.caption(figure, f"{title}, mean probability minus accuracy {gap:+.2f} points")
    return figure
