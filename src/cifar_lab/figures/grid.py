"""A sweep at a glance: a heat map of two axes, once for each value of the others."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cifar_lab.figures import style

MOST_PANELS = 36
"""Small multiples beyond this many cannot be read."""

MOST_NUMBERS = 400
"""Squares of a panel beyond this many have no room for their numbers."""

MOST_ON_GRID = 8
"""An axis of more numbers than this, most of which occur once, was searched."""

Key = tuple[str, ...]


@dataclass(frozen=True)
class Square:
    """One setting: its value on each axis, its mean score (None: no run is finished), its spread.

    `ends`: those of the 95 % interval, or both values of two runs; `runs`: finished runs.
    """

    key: Key
    score: float | None
    ends: tuple[float, float] | None = None
    runs: int = 0
    best: bool = False


@dataclass(frozen=True)
class Sweep:
    """The settings of a sweep: the names of its axes, the values of each as they shall stand.

    `label` names the score and its unit; darker is better.
    """

    axes: Sequence[str]
    order: Sequence[Sequence[str]]
    squares: Sequence[Square]
    label: str
    higher_is_better: bool = True

    @property
    def colours(self) -> Colormap:
        """The shades of the scores."""
        return matplotlib.colormaps[style.SEQUENTIAL + "_r" * (not self.higher_is_better)]


def draw(sweep: Sweep) -> Figure:
    """Return the heat map; with one axis or none, points with their intervals."""
    searched = [  # whose numbers were drawn at random instead of chosen for a grid
        i
        for i, values in enumerate(sweep.order)
        if _numbers(values) and len(values) > MOST_ON_GRID and 2 * len(values) > len(sweep.squares)
    ]
    if searched:
        return _scatter(sweep, *searched[:2])
    return _points(sweep) if len(sweep.axes) < 2 else _heat_maps(sweep)


def _heat_maps(sweep: Sweep) -> Figure:
    axes, order, colours = sweep.axes, sweep.order, sweep.colours
    x, y = plane(order)
    others = [i for i in range(len(axes)) if i not in (x, y)]
    by_panel: dict[Key, list[Square]] = {}
    for square in sweep.squares:
        by_panel.setdefault(tuple(square.key[i] for i in others), []).append(square)
    panels = sorted(
        by_panel, key=lambda key: [order[i].index(v) for i, v in zip(others, key, strict=True)]
    )
    shown = panels[:MOST_PANELS]
    columns = max(1, math.ceil(math.sqrt(len(shown))))
    rows = math.ceil(len(shown) / columns)
    side = max(2.4, 0.85 * len(order[x]) + 0.6)
    wraps = int(8 * side)  # bold characters that a panel's title has room for on a line
    titles = []
    for values in shown:  # keys by their last part, on as many lines as they need
        parts = [f"{axes[i].rpartition('.')[2]} = {v}" for i, v in zip(others, values, strict=True)]
        lines = [textwrap.fill(style.plain(part, 3 * wraps), wraps) for part in parts]
        titles.append("\n".join(lines))
    above = 0.17 * max(title.count("\n") for title in titles)
    width = min(1.6 + columns * side, 30)
    height = min(1.0 + rows * (above + max(1.5, 0.5 * len(order[y]) + 0.9)), 40)
    figure = style.new_figure(width, height)
    grid = figure.subplots(rows, columns, squeeze=False)
    known = [square.score for square in sweep.squares if square.score is not None] or [0.0]
    room = 0.5 if min(known) == max(known) else 0.0
    norm = Normalize(min(known) - room, max(known) + room)
    for panel in grid.flat[len(shown) :]:
        panel.set_visible(False)
    for place, (panel, title, key) in enumerate(zip(grid.flat, titles, shown, strict=False)):
        _panel(panel, by_panel[key], sweep, norm)
        x_label = style.plain(axes[x], 40) if place + columns >= len(shown) else ""
        y_label = style.plain(axes[y], 40) if place % columns == 0 else ""
        style.dress(panel, title, x_label, y_label)
        panel.title.set_fontsize(style.NORMAL)
        panel.grid(False)
        panel.set_facecolor(style.GRID)  # no such cell; white is the lowest score
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=grid, shrink=0.8, pad=0.02)
    bar.ax.tick_params(labelsize=style.SMALL)
    bar.set_label(style.plain(sweep.label, 60), fontsize=style.NORMAL, color=style.INK)
    hidden = f" · {len(panels) - len(shown)} panels more are not shown" * (shown != panels)
    style.caption(
        figure, f"mean over the runs · framed: the best · grey: not run or not finished{hidden}"
    )
    return figure


def plane(order: Sequence[Sequence[str]]) -> tuple[int, int]:
    """Return which axis runs along x and which along y: the longest; numbers along x."""
    by_length = sorted(range(len(order)), key=lambda i: (-len(order[i]), i))[:2]
    y, x = sorted(by_length, key=lambda i: (_numbers(order[i]), len(order[i])))
    return x, y


def _numbers(values: Sequence[str]) -> bool:
    try:
        return all(math.isfinite(float(value)) for value in values)
    except ValueError:
        return False


def _panel(axes: Axes, squares: Sequence[Square], sweep: Sweep, norm: Normalize) -> None:
    order, colours = sweep.order, sweep.colours
    x, y = plane(order)
    values = np.full((len(order[y]), len(order[x])), np.nan)
    size = min(style.NORMAL, max(4.0, 60 / max(len(order[x]), 4)))
    for square in squares:
        row, column = order[y].index(square.key[y]), order[x].index(square.key[x])
        text, colour = "–", style.MUTED
        if square.score is not None:
            values[row, column] = square.score
            text = f"{square.score:.4g}{_spread_text(square)}"
            colour = style.text_colour(colours(norm(square.score)))
        if values.size <= MOST_NUMBERS:
            axes.text(column, row, text, fontsize=size, color=colour, **style.CENTRED)
        if square.best:
            look: dict[str, Any] = {"fill": False, "edgecolor": style.VERMILLION, "linewidth": 2.2}
            axes.add_patch(Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, zorder=4, **look))
    axes.imshow(np.ma.masked_invalid(values), cmap=colours, norm=norm, aspect="auto")
    axes.set_xticks(range(len(order[x])), [style.plain(v, 14) for v in order[x]])
    axes.set_yticks(range(len(order[y])), [style.plain(v, 14) for v in order[y]])
    if len(order[x]) > 6 or max(map(len, order[x])) > 8:
        axes.tick_params(axis="x", rotation=45)


def _scatter(sweep: Sweep, x: int, y: int | None = None) -> Figure:
    """Return points at the places that a search tried, of one axis, or of two with shades."""
    figure = style.new_figure(8.0, 4.6)
    panel = figure.subplots()
    label = style.plain(sweep.label, 60)
    upwards = label if y is None else style.plain(sweep.axes[y], 60)
    style.dress(panel, "", style.plain(sweep.axes[x], 60), upwards)
    known = [(square, square.score) for square in sweep.squares if square.score is not None]
    places = np.array([float(square.key[x]) for square, _ in known])
    scores = np.array([score for _, score in known])
    heights = scores if y is None else np.array([float(square.key[y]) for square, _ in known])
    if y is None:
        others = [i for i in range(len(sweep.axes)) if i != x]
        names = np.array([", ".join(square.key[i] for i in others) for square, _ in known])
        for index, name in enumerate(dict.fromkeys(names)):
            own = names == name
            colour, shown = style.PALETTE[index % len(style.PALETTE)], style.plain(name, 40)
            panel.scatter(places[own], heights[own], s=34, alpha=0.8, color=colour, label=shown)
        if others:
            style.legend_outside(figure, panel, columns=1)
    else:
        look: dict[str, Any] = {"cmap": sweep.colours, "s": 60, "edgecolors": "#777777"}
        shades = panel.scatter(places, heights, c=scores, **look)
        figure.colorbar(shades, ax=panel, label=label)
    best = np.array([square.best for square, _ in known], dtype=bool)
    ring: dict[str, Any] = {"facecolors": "none", "edgecolors": style.VERMILLION, "linewidths": 2}
    panel.scatter(places[best], heights[best], s=130, **ring)
    for scale, values in ((panel.set_xscale, places), (panel.set_yscale, heights)):
        if len(values) and values is not scores and 0 < 20 * values.min() <= values.max():
            scale("log")
    if not known:
        style.note(panel, "no run has finished yet")
    style.caption(
        figure, "a point for each configuration, the mean over its runs · ringed: the best"
    )
    return figure


def _points(sweep: Sweep) -> Figure:
    axes, squares = sweep.axes, sweep.squares
    figure = style.new_figure(max(5.0, min(2 + 0.7 * len(squares), 24)), 4)
    panel = figure.subplots()
    names = list(sweep.order[0]) if axes else [""]
    style.dress(panel, "", style.plain(axes[0], 60) if axes else "", style.plain(sweep.label, 60))
    for square in squares:
        if square.score is not None:
            place = names.index(square.key[0]) if axes else 0
            size, colour = (7, style.VERMILLION) if square.best else (5, style.BLUE)
            look: dict[str, Any] = {"marker": "o", "markersize": size, "capsize": 4}
            if square.ends and square.runs > 1:
                look["yerr"] = [[abs(square.score - end)] for end in square.ends]
            panel.errorbar([place], [square.score], color=colour, **look)
    panel.set_xticks(range(len(names)), [style.plain(name, 14) for name in names])
    panel.set_xlim(-0.5, len(names) - 0.5)
    if len(names) > 8:
        panel.tick_params(axis="x", rotation=45)
    if all(square.score is None for square in squares):
        style.note(panel, "no run has finished yet")
    shown = "mean over the runs and its 95 % interval, or both values of two runs"
    style.caption(figure, f"{shown} · orange: the best")
    return figure


def _spread_text(square: Square) -> str:
    """Return what stands below a score: half the width of its interval, or its ends."""
    if square.runs < 2 or square.ends is None or square.score is None:
        return ""
    low, high = square.ends
    below, above = square.score - low, high - square.score
    if square.runs > 2 and math.isclose(below, above, rel_tol=1e-6, abs_tol=1e-10):
        return f"\n±{below:.2g}"
    return f"\n{low:.4g} to {high:.4g}"
