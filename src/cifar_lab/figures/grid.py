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
    # In inches: numbers and names decide how large a panel is.
    size = min(style.NORMAL, max(4.0, 60 / max(len(order[x]), 4)))  # points, of the numbers
    longest = max(len(line) for square in sweep.squares for line in _text(square).split("\n"))
    side = max(2.4, len(order[x]) * max(0.85, 0.0078 * size * longest + 0.12))
    wraps = int(8 * side)  # bold characters that a panel's title has room for on a line
    titles = []
    for values in shown:  # keys by their last part, on as many lines as they need
        parts = [f"{axes[i].rpartition('.')[2]} = {v}" for i, v in zip(others, values, strict=True)]
        lines = [textwrap.fill(style.plain(part, 3 * wraps), wraps) for part in parts]
        titles.append("\n".join(lines))
    tall = 0.17 * max(title.count("\n") for title in titles) + max(1.5, 0.5 * len(order[y]) + 0.4)
    left = 1.6 + 0.08 * min(max(map(len, order[y])), style.LONGEST_NAME)
    counts = range(1, len(shown) + 1)  # of columns: which makes a picture of about 3 to 2?
    shapes = [(n, left + n * side, 1.5 + math.ceil(len(shown) / n) * tall) for n in counts]
    columns, width, height = min(shapes, key=lambda shape: abs(shape[1] - 1.5 * shape[2]))
    rows = math.ceil(len(shown) / columns)
    figure = style.new_figure(min(width, 40), min(height, 40))
    grid = figure.subplots(rows, columns, squeeze=False)
    known = [square.score for square in sweep.squares if square.score is not None] or [0.0]
    room = 0.5 if min(known) == max(known) else 0.0
    norm = Normalize(min(known) - room, max(known) + room)
    for panel in grid.flat[len(shown) :]:
        panel.set_visible(False)
    for place, (panel, title, key) in enumerate(zip(grid.flat, titles, shown, strict=False)):
        _panel(panel, by_panel[key], sweep, norm, size)
        is_last, is_first = place + columns >= len(shown), place % columns == 0
        x_label, y_label = style.plain(axes[x], 40) * is_last, style.plain(axes[y], 40) * is_first
        style.dress(panel, title, x_label, y_label)
        panel.tick_params(labelbottom=is_last, labelleft=is_first)
        panel.title.set_fontsize(style.NORMAL)
        panel.grid(False)
        panel.set_facecolor(style.GRID)  # no such cell; white is the lowest score
    style.colour_bar(figure, ScalarMappable(norm, colours), grid, style.plain(sweep.label, 60))
    hidden = f" · {len(panels) - len(shown)} panels more are not shown" * (shown != panels)
    said = f"{_explained(sweep.squares)} · framed: the best · grey: no finished run"
    style.caption(figure, said + hidden)
    return figure


def _explained(squares: Sequence[Square]) -> str:
    """Return what the numbers are: of how many runs, and what stands below or around the mean."""
    counts = [square.runs for square in squares if square.score is not None] or [0]
    n = " to ".join(dict.fromkeys(map(str, (min(counts), max(counts)))))
    spreads = {square.runs > 2 for square in squares if square.ends and square.runs > 1}
    parts = [f"mean of n = {n} runs" if max(counts) > 1 else "one run each"]
    parts += ["its 95 % interval"] * (True in spreads)
    return ", ".join(parts + ["both values of two runs"] * (False in spreads))


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


def _panel(
    axes: Axes, squares: Sequence[Square], sweep: Sweep, norm: Normalize, size: float
) -> None:
    order, colours = sweep.order, sweep.colours
    x, y = plane(order)
    values = np.full((len(order[y]), len(order[x])), np.nan)
    for square in squares:
        row, column = order[y].index(square.key[y]), order[x].index(square.key[x])
        colour = style.MUTED
        if square.score is not None:
            values[row, column] = square.score
            colour = style.text_colour(colours(norm(square.score)))
        axes.text(column, row, _text(square), fontsize=size, color=colour, **style.CENTRED)
        if square.best:
            look: dict[str, Any] = {"fill": False, "edgecolor": style.VERMILLION, "linewidth": 2.2}
            axes.add_patch(Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, zorder=4, **look))
    axes.imshow(np.ma.masked_invalid(values), cmap=colours, norm=norm, aspect="auto")
    _name_places(axes, order[x])
    axes.set_yticks(range(len(order[y])), [style.plain(v) for v in order[y]])


def _name_places(axes: Axes, names: Sequence[str]) -> None:
    look = style.SLANTED if len(names) > 6 or max(map(len, names)) > 8 else {}
    axes.set_xticks(range(len(names)), [style.plain(v) for v in names], **look)


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
            style.legend_outside(figure, panel, columns=4)
    else:
        look: dict[str, Any] = {"cmap": sweep.colours, "s": 60, "edgecolors": "#777777"}
        shades = panel.scatter(places, heights, c=scores, **look)
        style.colour_bar(figure, shades, panel, label)
    best = np.array([square.best for square, _ in known], dtype=bool)
    ring: dict[str, Any] = {"facecolors": "none", "edgecolors": style.VERMILLION, "linewidths": 2}
    panel.scatter(places[best], heights[best], s=130, **ring)
    for scale, values in ((panel.set_xscale, places), (panel.set_yscale, heights)):
        if len(values) and values is not scores and 0 < 20 * values.min() <= values.max():
            scale("log")
    if not known:
        style.note(panel, "no run has finished yet")
    style.caption(figure, "a point for each configuration: mean of its runs · ringed: the best")
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
    _name_places(panel, names)
    panel.set_xlim(-0.5, len(names) - 0.5)
    if all(square.score is None for square in squares):
        style.note(panel, "no run has finished yet")
    style.caption(figure, f"{_explained(squares)} · orange: the best")
    return figure


def _text(square: Square) -> str:
    """Return a score, and below it half the width of its interval, or its ends."""
    if square.score is None:
        return "–"
    if square.runs < 2 or square.ends is None:
        return _number(square.score)
    low, high = square.ends
    below, above = square.score - low, high - square.score
    spread = f"{_number(low)} to {_number(high)}"
    if square.runs > 2 and math.isclose(below, above, rel_tol=1e-6, abs_tol=1e-10):
        spread = f"±{_number(below, 2)}"
    return f"{_number(square.score)}\n{spread}"


def _number(value: float, digits: int = 4) -> str:
    return f"{value:#.{digits}g}".removesuffix(".")
