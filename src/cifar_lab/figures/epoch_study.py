"""Accuracy against the number of epochs, beside a report that does not give it."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cifar_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = Mapping[int, Sequence[float]]
"""One value per seed for each number of epochs."""


def draw(
    accuracies: Values,
    reported: float,
    fitting: Sequence[tuple[int, int]],
    distances: Values,
    nearest: int,
    between_seeds: float,
) -> "Figure":
    """Return two panels: the accuracy, with the epochs at which it fits, and the classes' figures.

    Bands reach from the lowest to the highest seed, lines are means. `fitting`: the first and the
    last number of epochs of each stretch at which the accuracy fits. `distances` and
    `between_seeds` are mean absolute differences as fractions; at `nearest` epochs they are least.
    """
    figure = style.new_figure(10, 4.0)
    left, right = figure.subplots(1, 2)
    style.dress(left, "Test accuracy", "epochs of training", "accuracy")
    _band(left, accuracies, style.BLUE, "measured")
    left.axhline(reported, color=style.INK, linewidth=1.2, label=f"reported: {100 * reported:g} %")
    half = (max(accuracies) - min(accuracies)) / max(len(accuracies) - 1, 1) / 2
    for index, (first, last) in enumerate(fitting):
        label = "" if index else "reproduced"
        ends = (first - half, last + half)
        left.axvspan(*ends, color=style.GREEN, alpha=0.12, linewidth=0, label=label, zorder=0)
    left.set_xlim(min(accuracies) - half, max(accuracies) + half)
    style.percent_axis(left.yaxis)
    style.dress(right, "Figures of the classes", "epochs of training", "mean difference (points)")
    points = {epochs: [100 * value for value in found] for epochs, found in distances.items()}
    _band(right, points, style.VERMILLION, "measured and reported")
    right.axhline(
        100 * between_seeds, color=style.MUTED, linestyle=":", label="between two of our seeds"
    )
    look: dict[str, Any] = {"ha": "center", "fontsize": style.NORMAL, "color": style.INK}
    below: dict[str, Any] = {"xytext": (0, -16), "textcoords": "offset points"}
    right.annotate(f"least at {nearest}", (nearest, fmean(points[nearest])), **below, **look)
    right.set_ylim(bottom=0)
    for axes in (left, right):
        style.epoch_axis(axes.xaxis)
        axes.legend(fontsize=style.NORMAL, frameon=False)
    n = min(map(len, accuracies.values()))
    style.caption(figure, f"lines: mean of {n} seeds · bands: lowest to highest seed")
    return figure


def _band(axes: "Axes", values: Values, colour: str, label: str) -> None:
    epochs = list(values)
    means = [fmean(found) for found in values.values()]
    low, high = ([end(found) for found in values.values()] for end in (min, max))
    axes.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(epochs, means, color=colour, marker="o", markersize=4, linewidth=1.6, label=label)
