"""The loss against a growing learning rate: the figure of the learning-rate range test."""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cifar_lab.config.run_config import RunConfig
from cifar_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]


def draw(
    config: RunConfig, rates: Floats, losses: Floats, smoothed: Floats, suggestion: float | None
) -> "Figure":
    """Return the loss of each step and the smoothed one against the rate (n,), on a log axis.

    `suggestion` is the rate to mark, None if there is none.
    """
    figure = style.new_figure(7.5, 4.4)
    axes = figure.subplots()
    style.dress(axes, "Learning-rate range test", "learning rate", "training loss")
    axes.plot(rates, losses, color=style.BLUE, alpha=0.25, linewidth=0.8, label="each step")
    axes.plot(rates, smoothed, color=style.BLUE, linewidth=1.8, label="smoothed")
    axes.set_xscale("log")
    if len(smoothed):
        # Single losses after the divergence would squeeze everything else.
        low, high = float(smoothed.min()), float(smoothed[: max(len(smoothed) // 10, 1)].max())
        lowest, room = float(losses.min()), max(high - low, 1e-6)
        axes.set_ylim(lowest - 0.05 * room, high + 0.6 * room)
    if suggestion is not None:
        label = f"falls most steeply: {suggestion:.2g}"
        axes.axvline(suggestion, color=style.VERMILLION, linestyle="--", linewidth=1.3, label=label)
    axes.legend(fontsize=style.SMALL, frameon=False, loc="upper left")
    style.caption(figure, style.run_title(config))
    return figure
