"""How every figure looks: colours, fonts, axes, and the names that stand in them.

All of it is set on the objects themselves. matplotlib's rcParams and pyplot are global to the
process, and runs that draw side by side would see each other's settings.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_lab.config.run_config import RunConfig
from cifar_lab.runs.files import replacing
from cifar_lab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK = "#222222"
MUTED = "#6b6b6b"
GRID = "#e3e3e3"
PAPER = "#ffffff"

BLUE = "#0072B2"
VERMILLION = "#D55E00"
GREEN = "#009E73"
PALETTE = (BLUE, VERMILLION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#7A4B00", "#000000")
"""Okabe and Ito's colours, told apart with any colour vision; their yellow, too pale for a line on
white, is replaced by a brown."""

LINE_STYLES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))

CLASS_COLOURS = (*PALETTE[:7], "#8C8C8C", "#5D3A9B", "#000000")
CLASS_MARKERS = "o^sDvPX<p>"

SEQUENTIAL = "Blues"
SMALL, NORMAL, LARGE = 7.5, 9.0, 10.5
LONGEST_NAME = 18
CENTRED: dict[str, Any] = {"ha": "center", "va": "center"}
CHARACTERS_PER_INCH = 12.5


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of that size in inches, whose parts make room for each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=PAPER, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.03)  # type: ignore[union-attr,call-arg]
    return figure


def save(figure: "Figure", path: Path, dpi: int = 150) -> None:
    """Write a figure in the format that the path ends with, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as handle:
        figure.savefig(handle, dpi=dpi, format=path.suffix[1:].lower())


def caption(figure: "Figure", text: str) -> None:
    """Write what the figure is of above everything, from the left edge, on as few lines as fit."""
    width = figure.get_size_inches()[0]
    lines = textwrap.fill(plain(text, 300), int(CHARACTERS_PER_INCH * width))
    figure.suptitle(lines, x=0.06 / width, ha="left", fontsize=NORMAL, color=MUTED)


def dress(axes: "Axes", title: str = "", x_label: str = "", y_label: str = "") -> None:
    """Give a panel its title, axis labels, fonts, spines and grid."""
    axes.set_facecolor(PAPER)
    axes.set_title(title, fontsize=LARGE, color=INK, loc="left", fontweight="bold")
    axes.set_xlabel(x_label, fontsize=NORMAL, color=INK)
    axes.set_ylabel(y_label, fontsize=NORMAL, color=INK)
    axes.tick_params(labelsize=NORMAL, colors=INK, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#b0b0b0")
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def percent_axis(axis: "Axis") -> None:
    """Write an axis of fractions in per cent, with as many digits as its ticks need."""

    def in_percent(value: float, _: int | None) -> str:
        return f"{100 * value:.6g} %"

    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(in_percent))


def epoch_axis(axis: "Axis") -> None:
    """Put ticks at whole epochs."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def note(axes: "Axes", text: str) -> None:
    """Say in the middle of an empty panel why it is empty."""
    where = axes.transAxes
    axes.text(0.5, 0.5, text, transform=where, color=MUTED, fontsize=NORMAL, **CENTRED)


def legend_outside(
    figure: "Figure", handles: Sequence[Any], labels: Sequence[str], *, columns: int, **look: Any
) -> None:
    """Put a legend to the right of all panels."""
    defaults: dict[str, Any] = {"loc": "outside right upper", "fontsize": SMALL, "frameon": False}
    figure.legend(handles, labels, ncols=columns, **(defaults | look))


def line_style(index: int) -> dict[str, Any]:
    """Return colour and dashes of the index-th line of many: 32 combinations before one repeats."""
    colours = len(PALETTE)
    return {
        "color": PALETTE[index % colours],
        "linestyle": LINE_STYLES[(index // colours) % len(LINE_STYLES)],
    }


def class_style(index: int, num_classes: int) -> tuple[Any, str]:
    """Return colour and marker of a class: both, since ten colours alone are not told apart."""
    marker = CLASS_MARKERS[index % len(CLASS_MARKERS)]
    if num_classes <= len(CLASS_COLOURS):
        return CLASS_COLOURS[index], marker
    import matplotlib

    return matplotlib.colormaps["turbo"]((index + 0.5) / num_classes), marker


def text_colour(background: Sequence[float]) -> str:
    """Return white or black, whichever is read on a background (red, green, blue in [0, 1])."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.066 else INK


def run_title(config: RunConfig) -> str:
    """Return what a run is in one line: model, dataset, optimizer, learning rate, seed."""
    choices = config.choices
    parts = [f"{choices.get('model', config.model['_target_'])} on {config.dataset.name}"]
    optimizer = choices.get("optimizer", "")
    rate = f"lr {config.optimizer['lr']:g}" if "lr" in config.optimizer else ""
    parts += [", ".join(p for p in (optimizer, rate) if p), choices.get("activation", "")]
    fold = f"fold {config.split.fold} of {config.split.folds}" if config.split.folds else ""
    parts += [f"seed {config.seed}", fold, f"{config.protocol} protocol"]
    return " · ".join(part for part in parts if part)


def plain_names(run: RunDir, num_classes: int) -> list[str]:
    """Return the classes' names, short enough to stand in a figure."""
    return [plain(name) for name in run.class_names(num_classes)]


def plain(text: str, longest: int = LONGEST_NAME) -> str:
    """Return text on one line, at most `longest` characters, that is not read as mathematics."""
    line = " ".join(text.split())
    if len(line) > longest:
        line = line[: longest - 1].rstrip() + "…"
    return line.replace("$", r"\$")
