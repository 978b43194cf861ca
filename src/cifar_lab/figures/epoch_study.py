"""Accuracy against the number of epochs, beside a report that does not give it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cifar_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(
    means: Mapping[int, float], halves: Mapping[int, float], reported: float, rounding: float
) -> "Figure":
    """Return the curve of the mean by epochs, its band for one more run, the reported band across.

    `halves`: half the width of the 95 % interval for one more run; `rounding` that of the printed
    number. Where the bands meet, the report's run may have been one of these.
    """
    figure = style.new_figure(7, 4.0)
    axes = figure.subplots()
    style.dress(axes, "Test accuracy", "epochs of training", "accuracy")
    epochs = list(means)
    low, high = ([means[e] + sign * halves[e] for e in epochs] for sign in (-1, 1))
    axes.fill_between(
        epochs, low, high, color=style.BLUE, alpha=0.18, linewidth=0, label="one more run, 95 %"
    )
    line = axes.plot(epochs, list(means.values()), color=style.BLUE, marker="o", label="mean")
    line[0].set(markersize=4, linewidth=1.6)
    ends = (reported - rounding, reported + rounding)
    label = f"reported: {100 * ends[0]:.1f} to {100 * ends[1]:.1f} %"
    axes.axhspan(*ends, color=style.VERMILLION, alpha=0.25, linewidth=0, label=label)
    axes.set_xlim(epochs[0], epochs[-1])
    style.percent_axis(axes.yaxis)
    style.epoch_axis(axes.xaxis)
    axes.legend(fontsize=style.NORMAL, frameon=False, loc="lower right")
    return figure
