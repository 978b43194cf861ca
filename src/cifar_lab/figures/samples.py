"""Images with what the run says about them: random ones, then the most confident mistakes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cifar_lab.figures import style
from cifar_lab.runs.files import read_arrays
from cifar_lab.runs.metrics import Predictions
from cifar_lab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

MOST_BARS = 12
"""With more classes than this, the most probable ones have a bar and the others share one."""

HEADINGS = {"random": "Drawn at random", "worst": "The most confident mistakes"}
COLUMNS = 2
LONGEST_FILE = 26  # characters of a file's name that fit below its picture
LEGEND = "green: right · orange: wrong · bars: the probabilities, the true class in bold"


@dataclass(frozen=True)
class _Sample:
    """An image (C, H, W) uint8, its label, place, file's name or "", and probabilities (C,)."""

    image: np.ndarray[Any, Any]
    label: int
    index: int
    file: str
    probabilities: np.ndarray[Any, Any]

    @property
    def predicted(self) -> int:
        return int(self.probabilities.argmax())

    @property
    def colour(self) -> str:
        return style.GREEN if self.predicted == self.label else style.VERMILLION


def draw(run: RunDir, random_count: int = 6, mistake_count: int = 6) -> "Figure":
    """Return images beside bars of their probabilities, marked right or wrong.

    `random_count` and `mistake_count`: at most so many of each kind.
    """
    samples, num_classes = _read(run)
    names = style.plain_names(run, num_classes)
    shown = {"random": samples["random"][:random_count], "worst": samples["worst"][:mistake_count]}
    sections = [(HEADINGS[kind], chosen) for kind, chosen in shown.items() if chosen]
    rows = [-(-len(chosen) // COLUMNS) for _, chosen in sections]
    height = max(1.5, 0.17 * min(len(names), MOST_BARS + 1) + 0.35)
    figure = style.new_figure(10.5, 0.55 + sum(rows) * height + 0.4 * len(sections))
    heights = [0.4 + height * n for n in rows]
    parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, (heading, chosen), row_count in zip(parts, sections, rows, strict=True):
        _section(part, heading, chosen, row_count, names)
    style.caption(figure, f"{style.run_title(run.read_config())} · {LEGEND}")
    return figure


def probability_text(run: RunDir, count: int = 4) -> str:
    """Return `count` random images' probabilities as S1 prints them (its Figure 10).

    In label order, scientific notation with five significant digits, the largest in **bold**.
    """
    samples, num_classes = _read(run)
    names = run.class_names(num_classes)
    lines = ["labels: (" + ", ".join(repr(name) for name in names) + ")"]
    for sample in samples["random"][:count]:
        cells = [f"{p:.4e}" for p in sample.probabilities]
        cells[sample.predicted] = f"**{cells[sample.predicted]}**"
        broken = [", ".join(cells[i : i + 5]) for i in range(0, len(cells), 5)]
        lines.append(f"\nimage {sample.index}, {names[sample.label]}:")
        lines.append("prob = [" + (",\n" + " " * 8).join(broken) + "]")
    return "\n".join(lines) + "\n"


def _read(run: RunDir) -> tuple[dict[str, list[_Sample]], int]:
    """Return a run's samples by their kind, and the number of classes."""
    arrays = read_arrays(run.samples_file)
    predictions = Predictions(arrays["logits"], arrays["labels"], arrays["indices"])
    files = arrays.get("files", [""] * len(predictions))  # names, if images came from files
    columns = (arrays["images"], predictions.labels, predictions.indices, files)
    samples: dict[str, list[_Sample]] = {"random": [], "worst": []}
    for kind, *values in zip(arrays["kind"], *columns, predictions.probabilities, strict=True):
        samples[str(kind)].append(_Sample(*values))
    samples["worst"].sort(key=lambda sample: -float(sample.probabilities.max()))
    return samples, predictions.logits.shape[1]


def _section(
    part: "SubFigure", heading: str, chosen: list[_Sample], rows: int, names: list[str]
) -> None:
    part.set_facecolor(style.PAPER)
    part.suptitle(
        heading, x=0.008, ha="left", fontsize=style.LARGE, color=style.INK, fontweight="bold"
    )
    panels = part.subplots(rows, 2 * COLUMNS, squeeze=False, width_ratios=[1, 1.6] * COLUMNS)
    for sample, (picture, bars) in zip(chosen, panels.reshape(-1, 2), strict=False):
        _picture(picture, sample, names)
        _bars(bars, sample, names)
    for empty in panels.flat[2 * len(chosen) :]:
        empty.axis("off")


def _picture(axes: "Axes", sample: _Sample, names: list[str]) -> None:
    axes.imshow(style.plane(sample.image), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color=sample.colour, linewidth=2)
    right = sample.predicted == sample.label
    title = f"{'✓' if right else '✗'} {names[sample.predicted]}"
    axes.set_title(title, loc="left", fontsize=8, fontweight="bold", color=sample.colour)
    name = str(sample.file) or f"test image {sample.index}"
    name = name if len(name) <= LONGEST_FILE else f"…{name[1 - LONGEST_FILE :]}"
    where = f"true: {names[sample.label]}\n" * (not right) + style.plain(name, LONGEST_FILE)
    axes.set_xlabel(where, fontsize=style.SMALL, color=style.INK)


def _bars(axes: "Axes", sample: _Sample, names: list[str]) -> None:
    chosen = list(range(len(names)))
    if len(names) > MOST_BARS:
        chosen = np.argsort(-sample.probabilities, kind="stable")[:MOST_BARS].tolist()
    values = [float(sample.probabilities[i]) for i in chosen]
    labels = [names[i] for i in chosen]
    if len(chosen) < len(names):
        values.append(max(1.0 - sum(values), 0.0))
        labels.append(f"{len(names) - len(chosen)} others")
    colours = [sample.colour if i == sample.predicted else "#9a9a9a" for i in chosen]
    positions = range(len(values))
    axes.barh(positions, values, color=[*colours, "#cfcfcf"][: len(values)], height=0.72)
    style.dress(axes)
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.set(xticks=[], xlim=(0, 1.28), ylim=(len(values) - 0.4, -0.6))
    axes.set_yticks(positions, labels, fontsize=style.SMALL)
    axes.tick_params(length=0)
    for position, value in zip(positions, values, strict=True):
        largest = position < len(chosen) and chosen[position] == sample.predicted
        colour, weight = (sample.colour, "bold") if largest else (style.MUTED, "normal")
        look: dict[str, Any] = {"fontsize": style.SMALL, "color": colour, "fontweight": weight}
        # With one decimal, where that is 0.0 or 100.0 as a bound.
        share = "> 99.9 %" if value >= 0.9995 else f"{100 * value:.1f} %"
        text = ("< 0.1 %" if value < 0.0005 else share) + (" ◀" if largest else "")
        axes.text(value + 0.015, position, text, va="center", **look)
        if position < len(chosen) and chosen[position] == sample.label:
            axes.get_yticklabels()[position].set_fontweight("bold")
