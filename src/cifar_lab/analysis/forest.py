"""Configurations against the best or a baseline: a forest plot of differences with intervals."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

from cifar_lab.analysis import run_metrics, texts
from cifar_lab.analysis.contrasts import Difference
from cifar_lab.analysis.seed_groups import RunCollection
from cifar_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS = 48
"""Configurations beyond this many make a picture that nobody reads; the best are drawn."""


def draw(collection: RunCollection) -> "Figure":
    """Return the differences to the best, or to the baseline: a row for each configuration."""
    ranked = [group for group in collection.ranking if group.rank is not None]
    shown, metric = ranked[:MOST_ROWS], collection.metric
    points, unit = " (points)" * run_metrics.is_fraction(metric), run_metrics.factor(metric)
    differences = [
        (d := group.difference) and replace(d, value=unit * d.value, error=unit * d.error)
        for group in shown
    ]
    judged = [difference for difference in differences if difference is not None]
    names, words = [], []
    for group in shown:
        label = style.plain(collection.short_label(group), style.LONGEST_LABEL)
        names.append(f"{label} (n = {len(group.finished)})")
        said = texts.say_of(collection, group)
        words.append(said.difference.removesuffix(" points").replace("-", "−") or said.verdict)
    left = 0.085 * max(map(len, names), default=0)
    right = 0.075 * max(map(len, words), default=0)
    figure = style.new_figure(left + 4.6 + right, 1.75 + 0.29 * max(len(shown), 2))
    axes = figure.subplots()
    style.dress(axes, "", f"difference in {run_metrics.in_words(metric)}{points}")
    axes.set_yticks(range(len(shown)), names)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    low, high = _limits(judged)
    axes.set_xlim(low, high)
    axes.axvline(0, color=style.INK, linewidth=1.1, zorder=2)
    beside: dict[str, Any] = {"va": "center", "transform": axes.get_yaxis_transform()}
    for place, (group, difference) in enumerate(zip(shown, differences, strict=True)):
        if place % 2:
            axes.axhspan(place - 0.5, place + 0.5, color="#f7f7f7", zorder=0, linewidth=0)
        if difference is not None:
            _row(axes, place, difference, texts.is_better(metric, difference), (low, high))
        elif group.is_reference:
            axes.plot([0], [place], "D", markersize=6.5, color=style.BLUE, zorder=4)
        colour, text = style.INK if difference else style.MUTED, style.plain(words[place], 80)
        axes.text(1.02, place, text, color=colour, size=style.NORMAL, **beside)
    explained = f"differences to {texts.reference_name(collection)}"
    references = [collection.short_label(group) for group in ranked if group.is_reference]
    if len(references) == 1:
        explained += f": {style.plain(references[0], style.LONGEST_LABEL)}"
    if every := [group.difference for group in ranked if group.difference]:
        count = max(difference.family.comparisons for difference in every)
        together = f" of all {count} differences together" * (count > 1)
        covers = " or ".join(sorted({difference.covers for difference in every}))
        explained += f" · line: 95 % interval{together}, over {covers}"
    else:
        axes.set_xticks([])
    explained += " · filled: told apart, hollow: not · grey: differences that such runs would miss"
    hidden = f" · the first {len(shown)} of {len(ranked)} configurations" * (shown != ranked)
    style.caption(figure, f"{explained} in more than one case of five{hidden}")
    return figure


def _limits(differences: Sequence[Difference]) -> tuple[float, float]:
    """Return the ends of the axis: all are within, unless a few would squeeze the others."""
    if not differences:
        return -1.0, 1.0
    reach = [max(abs(d.low), abs(d.high), d.smallest) for d in differences]
    most = min(max(reach), 4 * median(reach)) or 1.0
    low = max(min(min(min(d.low, -d.smallest) for d in differences), 0), -most)
    high = min(max(max(max(d.high, d.smallest) for d in differences), 0), most)
    room = 0.06 * (high - low)
    return low - room, high + room


def _row(
    axes: "Axes", place: int, d: Difference, is_better: bool | None, limits: tuple[float, float]
) -> None:
    from matplotlib.patches import Rectangle

    missed = Rectangle((-d.smallest, place - 0.32), 2 * d.smallest, 0.64, zorder=1)
    missed.set(facecolor="#dcdfe3", linewidth=0)
    axes.add_patch(missed)
    colour = style.MUTED
    if is_better is not None:
        colour = style.GREEN if is_better else style.VERMILLION
    line: dict[str, Any] = {"color": colour, "linewidth": 1.8, "zorder": 3}
    axes.plot([d.low, d.high], [place, place], solid_capstyle="butt", **line)
    for end in (d.low, d.high):
        axes.plot([end, end], [place - 0.14, place + 0.14], **line)
    # Beyond the axis it is an arrow at the edge; the number stands beside it.
    marker = "<" if d.value <= limits[0] else ">" if d.value >= limits[1] else "o"
    look: dict[str, Any] = {"color": colour, "markersize": 6.5, "markeredgewidth": 1.6, "zorder": 4}
    look["markerfacecolor"] = style.PAPER if is_better is None else colour
    axes.plot([min(max(d.value, limits[0]), limits[1])], [place], marker, clip_on=False, **look)
