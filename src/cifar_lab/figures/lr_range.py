"""The loss against a growing learning rate: the figure of the learning-rate range test."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cifar_lab.config.run_config import RunConfig
from cifar_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]


def draw(
    config: RunConfig,
    rates: Floats,
    losses: Floats,
    smoothed: Floats,
    marks: tuple[float, float, float] | None,
) -> "Figure":
    """Return the loss of each step and the smoothed one against the rate (n,), on a log axis.

    `marks`: the ends of the range, and the rate that is suggested; None if there is none.
    """
    figure = style.new_figure(7.5, 4.4)
    axes = figure.subplots()
    style.dress(axes, "Learning-rate range test", "learning rate", "training loss")
    axes.plot(rates, losses, ".", color=style.BLUE, alpha=0.3, markersize=4, label="each step")
    axes.plot(rates, smoothed, color=style.BLUE, linewidth=1.8, label="smoothed")
    axes.set_xscale("log")
    # Losses after the divergence would squeeze everything else; what MNIST starts with would not.
    low, high = float(smoothed.min()), float(smoothed[: max(len(smoothed) // 10, 1)].max())
    room = max(high - low, 1e-6)
    axes.set_ylim(low - 0.15 * room, high + 0.35 * room)
    if marks is not None:
        low, high, suggestion = marks
        label = f"the loss falls: {low:.2g} to {high:.2g}"
        axes.axvspan(low, high, color=style.GREEN, alpha=0.1, linewidth=0, label=label)
        look: dict[str, Any] = {"color": style.VERMILLION, "linestyle": "--", "linewidth": 1.3}
        axes.axvline(suggestion, label=f"suggestion: {suggestion:.2g}", **look)
    style.legend_outside(figure, axes, columns=4, loc="outside lower center")
    style.caption(figure, style.run_title(config))
    return figure
