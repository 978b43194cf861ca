"""Configurations against the best or a baseline: a forest plot of differences with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cifar_lab.figures import style

MOST_ROWS = 48
"""Configurations beyond this many make a picture that nobody reads; the best are drawn."""

LONGEST_LABEL = 90
ROW = 0.29  # inches


@dataclass(frozen=True)
class Bar:
    """A configuration's difference to the reference, in the unit of the axis; None if not judged.

    `low`, `high`: of its 95 % interval; `smallest`: the difference that such runs would have shown;
    `is_better`: True or False where it is told apart; `text`: the numbers, or why there are none.
    """

    label: str
    text: str
    value: float | None = None
    low: float = 0.0
    high: float = 0.0
    smallest: float = 0.0
    is_better: bool | None = None
    is_reference: bool = False


def draw(bars: Sequence[Bar], label: str, explained: str) -> Figure:
    """Return the forest plot: a row for each configuration, the first one at the top.

    `label` names the axis and its unit; `explained` says what the differences are to, and what
    their intervals cover.
    """
    shown = bars[:MOST_ROWS]
    judged = [bar for bar in shown if bar.value is not None]
    names = [style.plain(bar.label, LONGEST_LABEL) for bar in shown]
    left = 0.085 * max(map(len, names), default=0)
    right = 0.075 * max((len(bar.text) for bar in shown), default=0)
    figure = style.new_figure(left + 4.6 + right, 1.75 + ROW * max(len(shown), 2))
    axes = figure.subplots()
    style.dress(axes, "", label)
    axes.set_yticks(range(len(shown)), names)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    low, high = _limits(judged)
    axes.set_xlim(low, high)
    axes.axvline(0, color=style.INK, linewidth=1.1, zorder=2)
    for place, bar in enumerate(shown):
        if place % 2:
            axes.axhspan(place - 0.5, place + 0.5, color="#f7f7f7", zorder=0, linewidth=0)
        if bar.value is not None:
            _row(axes, place, bar, (low, high))
        elif bar.is_reference:
            axes.plot([0], [place], "D", markersize=6.5, color=style.BLUE, zorder=4)
        colour = style.MUTED if bar.value is None else style.INK
        beside, text = axes.get_yaxis_transform(), style.plain(bar.text, 80)
        axes.text(1.02, place, text, va="center", color=colour, transform=beside, size=style.NORMAL)
    if not judged:
        axes.set_xticks([])
    explained += " · filled: told apart, hollow: not · grey: differences that such runs would miss"
    hidden = f" · the first {len(shown)} of {len(bars)} configurations" * (len(shown) < len(bars))
    style.caption(figure, f"{explained} in more than one case of five{hidden}")
    return figure


def _limits(bars: Sequence[Bar]) -> tuple[float, float]:
    """Return the ends of the axis: all bars are within, unless a few would squeeze the others."""
    if not bars:
        return -1.0, 1.0
    reach = [max(abs(bar.low), abs(bar.high), bar.smallest) for bar in bars]
    most = min(max(reach), 4 * median(reach)) or 1.0
    low = max(min(min(min(bar.low, -bar.smallest) for bar in bars), 0), -most)
    high = min(max(max(max(bar.high, bar.smallest) for bar in bars), 0), most)
    room = 0.06 * (high - low)
    return low - room, high + room


def _row(axes: Axes, place: int, bar: Bar, limits: tuple[float, float]) -> None:
    assert bar.value is not None
    missed = Rectangle((-bar.smallest, place - 0.32), 2 * bar.smallest, 0.64, zorder=1)
    missed.set(facecolor="#dcdfe3", linewidth=0)
    axes.add_patch(missed)
    colour = style.MUTED
    if bar.is_better is not None:
        colour = style.GREEN if bar.is_better else style.VERMILLION
    line: dict[str, Any] = {"color": colour, "linewidth": 1.8, "zorder": 3}
    axes.plot([bar.low, bar.high], [place, place], solid_capstyle="butt", **line)
    for end in (bar.low, bar.high):
        axes.plot([end, end], [place - 0.14, place + 0.14], **line)
    # Beyond the axis it is an arrow at the edge; the number stands beside it.
    marker = "<" if bar.value <= limits[0] else ">" if bar.value >= limits[1] else "o"
    look: dict[str, Any] = {"color": colour, "markersize": 6.5, "markeredgewidth": 1.6, "zorder": 4}
    look["markerfacecolor"] = style.PAPER if bar.is_better is None else colour
    axes.plot([min(max(bar.value, limits[0]), limits[1])], [place], marker, clip_on=False, **look)
