"""Reported and measured figures of many rows, one below the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cifar_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOOKS = {
    "reproduced": (style.BLUE, "o"),
    "differs": (style.VERMILLION, "X"),
    "inconclusive": (style.MUTED, "s"),
    "not judged": (style.MUTED, "v"),
}
"""Colour and marker of each verdict."""


@dataclass(frozen=True)
class Mark:
    """A reported accuracy, the measured mean, the ends of its interval, the verdict's word."""

    name: str
    reported: float
    measured: float
    ends: tuple[float, float]
    verdict: str


def draw_marks(marks: Sequence[Mark]) -> "Figure":
    """Return a row for each figure: reported as a bar, measured as a point with its interval."""
    figure = style.new_figure(8.5, 1.3 + 0.27 * len(marks))
    axes = figure.subplots()
    style.dress(axes, "", "accuracy", "")
    places = range(len(marks), 0, -1)
    look: dict[str, Any] = {
        "marker": "|",
        "s": 170,
        "linewidths": 2.2,
        "color": style.INK,
        "zorder": 3,
    }
    axes.scatter([mark.reported for mark in marks], places, label="reported", **look)
    for word, (colour, marker) in LOOKS.items():
        chosen = [(m, place) for m, place in zip(marks, places, strict=True) if m.verdict == word]
        if not chosen:
            continue
        point: dict[str, Any] = {"fmt": marker, "color": colour, "markersize": 6.5}
        point |= {"capsize": 3, "linewidth": 1.4}
        axes.errorbar(
            [mark.measured for mark, _ in chosen],
            [place for _, place in chosen],
            xerr=[[abs(m.measured - m.ends[i]) for m, _ in chosen] for i in (0, 1)],
            label=f"measured: {word}",
            **point,
        )
    axes.set_yticks(list(places), [style.plain(mark.name, 40) for mark in marks])
    axes.set_ylim(0.3, len(marks) + 0.7)
    style.percent_axis(axes.xaxis)
    figure.legend(
        loc="outside lower left", ncols=3, fontsize=style.NORMAL, frameon=False, markerscale=0.8
    )
    style.caption(
        figure,
        "reported and measured accuracies · bars: 95 % interval of the mean, or both of two values",
    )
    return figure
