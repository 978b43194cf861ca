"""How often predictions of each confidence are right: the reliability diagram."""

from typing import TYPE_CHECKING

import numpy as np

from cifar_lab.figures import style
from cifar_lab.runs.calibration import BINS, calibration
from cifar_lab.runs.metrics import wilson_interval
from cifar_lab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW = 100
"""Bins of fewer images fade."""


def draw(run: RunDir, bins: int = BINS, split: str = "test", weights: str = "scored") -> "Figure":
    """Return accuracy against confidence in `bins` bins, above the number of images in each.

    `split` and `weights` name the predictions file.
    """
    found = calibration(run.read_predictions(split, weights), bins)
    figure = style.new_figure(5.2, 5.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    style.dress(upper, "Reliability", "", "share correct")
    style.dress(lower, "", "probability of the predicted class", "images")
    upper.plot([0, 1], [0, 1], color=style.MUTED, linestyle="--", linewidth=1)
    upper.set(xlim=(0, 1), ylim=(0, 1))
    for axis in (upper.yaxis, lower.xaxis):
        style.percent_axis(axis)
    if found is None:
        style.note(upper, "no images with finite scores")
    else:
        width = 1 / bins
        middle = (np.arange(bins) + 0.5) * width
        filled = found.counts > 0
        share, confidence = (
            total[filled] / found.counts[filled] for total in (found.right, found.confidence)
        )
        # Bins of a few images say little: they fade, and their interval is wide.
        counts = found.counts[filled]
        intervals = [wilson_interval(float(s), int(n)) for s, n in zip(share, counts, strict=True)]
        around = np.abs(np.array(intervals) - share[:, None]).T
        whiskers = {"ecolor": style.INK, "elinewidth": 0.8, "capsize": 2, "alpha": 0.6}
        label = "share correct, 95 % interval"
        bars = upper.bar(
            middle[filled], share, 0.94 * width, yerr=around, error_kw=whiskers, label=label
        )
        for bar, number in zip(bars, counts, strict=True):
            bar.set_facecolor(("#4C8DBD", 0.25 + 0.75 * min(1.0, number / FEW)))
        label = "at the mean probability of the bin"
        upper.plot(confidence, share, "o", color=style.VERMILLION, markersize=4, label=label)
        lower.bar(middle, found.counts, 0.94 * width, color="#C9C9C9")
        handles, labels = upper.get_legend_handles_labels()
        style.legend_outside(figure, handles, labels, columns=1, loc="outside lower center")
    title = f"{style.run_title(run.read_config())} · {split} images"
    if found is not None:
        title += (
            f" · expected calibration error {100 * found.error:.2f} %, mean probability minus "
            f"accuracy {100 * found.overconfidence:+.2f} points"
        )
    style.caption(figure, title)
    return figure
