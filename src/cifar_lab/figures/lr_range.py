"""The loss against a growing learning rate: what the range test measured, suggests and shows."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cifar_lab.config.run_config import RunConfig
from cifar_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOWEST, HIGHEST = 1e-7, 10.0
"""The rates of the first and the last step, as in fastai's `lr_find`."""

STEPS = 300
WINDOW = 6.0  # steps on either side, about, whose losses are averaged: a sixth of a decade
_HARDLY = 0.1  # of the loss at the start: where it fell by less, the test says little
_CLEARLY = 6.0  # standard errors, which noise alone passes in one test of a thousand (simulated)
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Advice:
    """Learning rates worth a try.

    The loss begins to fall at `low`, and is lowest at `high`, beyond which it rises; `suggestion`
    is well below that. `fall` is the share of the loss at the start that it fell by.
    """

    low: float
    high: float
    suggestion: float
    fall: float


@dataclass(frozen=True)
class RangeTest:
    """Learning rates (n,), loss of each step (n,), the same smoothed (n,), and what they suggest.

    `advice` is None where the loss never clearly falls.
    """

    rates: Floats
    losses: Floats
    smoothed: Floats
    advice: Advice | None

    def lines(self) -> list[str]:
        """Return what was measured, in words."""
        advice = self.advice
        ended = "" if self.rates[-1] == HIGHEST else f", at {self.rates[-1]:.2g} the loss diverged"
        lines = [f"learning rate from {LOWEST:g} to {HIGHEST:g} in {STEPS} steps{ended}"]
        if advice is None:
            return [*lines, "no suggestion: the loss falls no further than its noise; try a grid"]
        lines += [
            f"range: {advice.low:.2g}, where the loss begins to fall, to {advice.high:.2g}, where "
            f"it is lowest ({self.smoothed.min():.4f})",
            f"suggestion: optimizer.lr={advice.suggestion:.2g}, a quarter of the latter",
        ]
        if advice.fall < _HARDLY:
            lines.append(
                f"warning: the loss fell by {advice.fall:.0%} only, so that this says little: try "
                "a grid of rates, or a larger batch"
            )
        return lines


def smooth(losses: npt.ArrayLike) -> Floats:
    """Return the mean of the losses around each step, weighted by a Gaussian.

    Both neighbours count, so that the curve does not lag behind the rate; at the ends the weights
    of the steps that there are add up to one.
    """
    steps = np.arange(np.size(losses))
    weights = np.exp(-0.5 * ((steps[:, None] - steps) / WINDOW) ** 2)
    smoothed: Floats = weights @ np.asarray(losses) / weights.sum(axis=1)
    return smoothed


def advise(rates: Floats, losses: Floats) -> Advice | None:
    """Return the range of rates at which the loss falls, and one to train with, or None.

    That one is a quarter of the rate at which the loss is lowest, the lower of the two shares that
    Smith (2017) begins his cycles at: the loss still falls where a longer training diverges.
    """
    smoothed, first = smooth(losses), slice(max(len(rates) // 10, 1))
    start = float(smoothed[first].mean())
    lowest = int(smoothed.argmin())
    fall = start - float(smoothed[lowest])
    # At the first rates the network stands still: there, losses differ by their batches only.
    noise = float(losses[first].std()) / np.sqrt(2 * np.sqrt(np.pi) * WINDOW)
    if fall <= _CLEARLY * noise or lowest == 0:
        return None
    fallen = np.flatnonzero(smoothed[: lowest + 1] <= start - 0.1 * fall)
    low, high = float(rates[fallen[0]]), float(rates[lowest])
    return Advice(low, high, high / 4, fall / start)


def draw(config: RunConfig, test: RangeTest) -> "Figure":
    """Return the loss of each step and the smoothed one against the rate, on a log axis."""
    figure = style.new_figure(7.5, 4.4)
    axes = figure.subplots()
    style.dress(axes, "Learning-rate range test", "learning rate", "loss (nats per image)")
    rates, smoothed, advice = test.rates, test.smoothed, test.advice
    axes.plot(rates, test.losses, ".", color=style.BLUE, alpha=0.3, markersize=4, label="each step")
    axes.plot(rates, smoothed, color=style.BLUE, linewidth=1.8, label="smoothed")
    axes.set_xscale("log")
    # Losses after the divergence would squeeze everything else; what MNIST starts with would not.
    low, high = float(smoothed.min()), float(smoothed[: max(len(smoothed) // 10, 1)].max())
    room = max(high - low, 1e-6)
    axes.set_ylim(low - 0.15 * room, high + 0.35 * room)
    if advice is not None:
        label = f"the loss falls: {advice.low:.2g} to {advice.high:.2g}"
        span: dict[str, Any] = {"color": style.GREEN, "alpha": 0.1, "linewidth": 0}
        axes.axvspan(advice.low, advice.high, label=label, **span)
        look: dict[str, Any] = {"color": style.VERMILLION, "linestyle": "--", "linewidth": 1.3}
        axes.axvline(advice.suggestion, label=f"suggestion: {advice.suggestion:.2g}", **look)
    style.legend_outside(figure, axes, columns=4)
    style.caption(figure, style.run_title(config))
    return figure
