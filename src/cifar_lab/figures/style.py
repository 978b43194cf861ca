"""How every figure looks: colours, fonts, axes, and the names that stand in them.

All of it is set on the objects themselves. matplotlib's rcParams and pyplot are global to the
process, and runs that draw side by side would see each other's settings.
"""

import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import listing, log
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
_SMALLEST = 6.0  # points, of the letters of a figure that is made small
COLUMN = 5.0
"""Inches: in a narrower figure, as for a column of a paper, panels stand below each other."""

LONGEST_NAME, LONGEST_LABEL = 18, 90
CENTRED: dict[str, Any] = {"ha": "center", "va": "center"}
SLANTED: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
CHARACTERS_PER_INCH = 12.5


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of that size in inches, whose parts make room for each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=PAPER, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.03)  # type: ignore[union-attr,call-arg]
    return figure


@dataclass(frozen=True)
class Look:
    """How figures are saved: for a paper, say, as PDF, one column wide, in another language.

    `width` in inches and `font_size` in points are None for those that a figure has by itself.
    `labels` replaces words of a figure's texts: class names, axis labels, titles.
    """

    format: str = "png"
    dpi: float = 150
    width: float | None = None
    font_size: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def apply(self, figure: "Figure") -> None:
        """Give a figure its width, the size of its letters, and its words."""
        from matplotlib.text import Text

        if self.width is not None and self.width < COLUMN:
            _stack(figure)
            for legend in figure.legends:
                legend.set_loc("outside lower center")  # beside the panels it takes half the width
        width, height = figure.get_size_inches()
        shrunk = 1.0 if self.width is None else self.width / width
        size = self.font_size or max(_SMALLEST, NORMAL * shrunk)
        scale = size / NORMAL
        # Letters that shrink less than the figure need more lines, so that it becomes less flat.
        figure.set_size_inches(width * shrunk, height * shrunk * max(1.0, scale / shrunk) ** 0.5)
        texts: set[Any] = set(figure.findobj(Text))
        title = figure.get_suptitle()
        for text in (text for text in texts if title and text.get_text() == title):
            characters = int(CHARACTERS_PER_INCH * width * shrunk / scale)
            text.set_text(textwrap.fill(" ".join(title.split()), characters))
        ticks: set[Any] = set()
        axis: Any
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
            shown = axis.get_majorticklabels()
            ticks.update(shown)
            if shown:
                axis.set_tick_params(labelsize=scale * shown[0].get_fontsize())
            if self.labels:
                shown = axis.get_major_formatter()
                axis.set_major_formatter(lambda x, place, as_=shown: self.rename(as_(x, place)))
        for text in texts - ticks:
            text.set_fontsize(scale * text.get_fontsize())
            text.set_text(self.rename(text.get_text()))
        # Square panels need a pass before the one that saving makes, or their labels are cut off.
        figure.get_layout_engine().execute(figure)  # type: ignore[union-attr]

    def rename(self, text: str) -> str:
        """Return a text with the words of `labels`, whole words only."""
        if not self.labels:
            return text
        words = sorted(map(re.escape, self.labels), key=len, reverse=True)
        pattern = rf"(?<!\w)({'|'.join(words)})(?!\w)"
        return re.sub(pattern, lambda match: self.labels[match[0]], text)


def _stack(figure: "Figure") -> None:
    """Put panels that stand side by side below each other."""
    specs = {axes: spec for axes in figure.axes if (spec := axes.get_subplotspec()) is not None}
    grids = {spec.get_gridspec() for spec in specs.values()}
    if len(grids) != 1 or (grid := grids.pop()).nrows != 1 or grid.ncols < 2:
        return
    width, height = figure.get_size_inches()
    figure.set_size_inches(width / grid.ncols, height * grid.ncols)
    below = figure.add_gridspec(grid.ncols, 1)
    for axes, spec in specs.items():
        axes.set_subplotspec(below[spec.colspan.start, 0])
        axes.tick_params(labelleft=True)


# Fonts with Chinese, Japanese and Korean characters, of which DejaVu has none.
_EASTERN_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "Hiragino Sans",
)


def save(figure: "Figure", path: Path, dpi: float = 150) -> None:
    """Write a figure in the format that the path ends with, whole or not at all.

    A matplotlibrc that sends texts to TeX is not followed: TeX may be missing, and class names are
    no TeX. Characters that no installed font has are drawn as boxes, and one line says so.
    """
    import matplotlib
    from matplotlib.font_manager import get_font_names
    from matplotlib.text import Text

    eastern = [font for font in _EASTERN_FONTS if font in get_font_names()]
    text: Any
    for text in figure.findobj(Text):
        text.set(usetex=False, fontfamily=[*text.get_fontfamily(), *eastern])
    # For the texts of ticks, which are made while it is drawn; many venues refuse Type 3 fonts.
    settings: Any = {"text.usetex": False, "pdf.fonttype": 42}
    settings["font.family"] = [*matplotlib.rcParams["font.family"], *eastern]
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(path) as handle,
        matplotlib.rc_context(settings),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.filterwarnings("always", "Glyph", UserWarning)
        figure.savefig(handle, dpi=dpi, format=path.suffix[1:].lower())
    codes = {match[1] for w in caught if (match := re.match(r"Glyph (\d+)", str(w.message)))}
    if codes:
        lacking = listing(sorted(chr(int(code)) for code in codes), 40)
        log.warning("warning: no font here has characters of %s: %s", path.name, lacking)


def caption(figure: "Figure", text: str) -> None:
    """Write what the figure is of above everything, from the left edge, on as few lines as fit."""
    width = figure.get_size_inches()[0]
    lines = textwrap.fill(plain(text, 400), int(CHARACTERS_PER_INCH * width))
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
    """Write an axis of fractions in per cent, all with as many digits as one of them needs."""

    def text(value: float, _: float) -> str:
        ticks = (f"{100 * tick:.6g}" for tick in axis.get_majorticklocs())
        return f"{100 * value:.{max(len(tick.partition('.')[2]) for tick in ticks)}f} %"

    axis.set_major_formatter(text)


def epoch_axis(axis: "Axis") -> None:
    """Put ticks at whole epochs."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def colour_bar(figure: Any, shades: Any, axes: Any, label: str = "", **place: Any) -> Any:
    """Put the scale of an image's colours beside its panel, or beside several; return it."""
    bar = figure.colorbar(shades, ax=axes, pad=0.02, **place)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL, colors=INK, length=2)
    bar.set_label(label, fontsize=NORMAL, color=INK)
    return bar


def note(axes: "Axes", text: str) -> None:
    """Say in the middle of an empty panel why it is empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, color=MUTED, fontsize=NORMAL, **CENTRED)


def legend_outside(figure: "Figure", axes: "Axes", *, columns: int, **look: Any) -> None:
    """Put the legend of a panel, if it has any, below all panels."""
    handles, labels = axes.get_legend_handles_labels()
    defaults: dict[str, Any] = {"loc": "outside lower center", "fontsize": SMALL, "frameon": False}
    if handles:
        figure.legend(handles, labels, ncols=columns, **(defaults | look))


def line_style(index: int) -> dict[str, Any]:
    """Return colour and dashes of the index-th line of many: 32 combinations before one repeats."""
    turn, colour = divmod(index, len(PALETTE))
    return {"color": PALETTE[colour], "linestyle": LINE_STYLES[turn % len(LINE_STYLES)]}


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


def plane(image: NDArray[Any]) -> NDArray[Any]:
    """Return an image (C, H, W) as pictures are shown: (H, W) of one channel, else (H, W, C)."""
    return np.ascontiguousarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))


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
    """Return text on one line, at most `longest` characters, that matplotlib shows as it is.

    A dollar would begin mathematics, and what begins with `_` is left out of legends: not ` _`.
    """
    line = " ".join(text.split())
    line = f" {line}" if line.startswith("_") else line
    if len(line) > longest:
        line = line[: longest - 1].rstrip() + "…"
    return line.replace("$", r"\$")
