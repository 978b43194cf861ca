"""Which class is taken for which: counts and per-class rates."""

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cifar_lab.figures import style
from cifar_lab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUMBERED_CLASSES = 20
"""With more classes than this, a cell is too small for its number."""


def draw(
    run: RunDir,
    normalise: Literal["both", "none", "rows"] = "both",
    split: str = "test",
    weights: str = "scored",
) -> "Figure":
    """Return the confusion matrix, rows being true classes and columns predicted ones.

    `normalise`: none for numbers of images, rows for shares of the true class, both side by side.
    `split` and `weights` name the predictions file.
    """
    predictions = run.read_predictions(split, weights)
    counts = predictions.confusion_matrix
    names = style.plain_names(run, len(counts))
    kinds = ["none", "rows"] if normalise == "both" else [normalise]
    side = float(np.clip(0.55 * len(counts), 4.2, 8.8))
    figure = style.new_figure((side + 1.6) * len(kinds), side + 1.6)
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        _panel(axes, counts, names, shares=kind == "rows")
    score = f"{np.trace(counts):,} of {len(predictions):,} {split} images right"
    share = 100 * predictions.accuracy
    style.caption(figure, f"{style.run_title(run.read_config())} · {score} ({share:.2f} %)")
    return figure


def _panel(axes: "Axes", counts: np.ndarray[Any, Any], names: list[str], *, shares: bool) -> None:
    size = len(counts)
    support = counts.sum(axis=1, keepdims=True)
    values = counts / np.maximum(support, 1) if shares else counts
    highest = 1.0 if shares else max(int(counts.max(initial=0)), 1)
    # The square root: errors are a few per cent of a row, and a linear scale leaves them white.
    from matplotlib.colors import PowerNorm

    norm = PowerNorm(0.5, vmin=0, vmax=highest)
    image = axes.imshow(values, cmap=style.SEQUENTIAL, norm=norm)
    title = "Share of the true class (%)" if shares else "Images"
    style.dress(axes, title, "predicted class", "true class")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    small = size > NUMBERED_CLASSES
    label_size = max(4.0, min(style.NORMAL, 430 / size)) if small else style.NORMAL - (size > 12)
    turned = {"rotation": 90} if small else style.SLANTED
    axes.set_xticks(range(size), names, fontsize=label_size, **turned)
    axes.set_yticks(range(size), names, fontsize=label_size)
    axes.tick_params(length=0)
    bar = style.colour_bar(axes.figure, image, axes, shrink=0.85, aspect=30)
    if shares:
        bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1])
        style.percent_axis(bar.ax.yaxis)
    if small:
        return
    number_size, digits = (8.0, 1) if size <= 12 else (7.0, 0)
    for row, column in np.argwhere(counts):  # zeros would hide the pattern of the errors
        value = values[row, column]
        colour = style.text_colour(image.cmap(norm(value)))
        text = f"{100 * value:.{digits}f}" if shares else str(value)
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=number_size)
