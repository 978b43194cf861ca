"""Loss and accuracy against epoch: of one run, of many, and of groups of seeds."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cifar_lab.figures import style
from cifar_lab.runs.metrics import BY_CLASS, EpochMetrics, StepMetrics, best_row
from cifar_lab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 1500
"""A line of steps is averaged to at most this many points; Agg refuses to fill far more."""

MARKED_EPOCHS = 15
"""Up to this many epochs each has its dot."""

LOSS, ACCURACY = "loss (nats per image)", "accuracy"
Values = np.ndarray[Any, np.dtype[np.float64]]


def draw(
    run: RunDir, test: bool = True, steps: bool = True, learning_rate: bool = True
) -> "Figure":
    """Return training and validation loss and accuracy, the best epoch and the study's target.

    `test`: also the test curve, where the study watched it; `steps`: also each training step, where
    the run kept them; `learning_rate`: a third panel, where it changes.
    """
    config, rows = run.read_config(), run.read_metrics()
    monitor, target = config.training.monitor, config.study.target_accuracy
    step_rows = run.read_steps() if steps else []
    rates = [row.learning_rate for row in rows]
    start, end = _span(rows[-1].epoch if rows else max(config.training.epochs, 1))
    with_rate = learning_rate and len(set(rates)) > 1
    widths = [3, 3, 2] if with_rate else [3, 3]
    figure = style.new_figure(13 if with_rate else 10, 4.3)
    panels = figure.subplots(1, len(widths), width_ratios=widths)
    said = run.read_summary().best_epoch if run.summary_file.exists() else None
    best = next((row for row in rows if row.epoch == said), best_row(rows, monitor))
    for axes, quantity in zip(panels[:2], ("loss", "accuracy"), strict=True):
        _panel(axes, quantity, rows, step_rows, best, test=test, monitor=monitor)
        if quantity == "accuracy" and target is not None:
            label = f"target {100 * target:g} %"
            axes.axhline(target, color=style.GREEN, ls=(0, (4, 3)), linewidth=1.3, label=label)
        axes.set_xlim(0 if step_rows else start, end)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best", fontsize=8, framealpha=0.85, edgecolor=style.GRID)
        else:
            style.note(axes, "no epoch has finished yet")
    if with_rate:
        axes = panels[2]
        style.dress(axes, "Learning rate", "epoch", "learning rate of the epoch's last step")
        look: dict[str, Any] = {"color": style.INK, "drawstyle": "steps-mid", "linewidth": 1.6}
        axes.plot(_column(rows, "epoch"), rates, **look)
        if min(rates) > 0 and max(rates) / min(rates) >= 10:
            axes.set_yscale("log")
        axes.set_xlim(start, end)
        style.epoch_axis(axes.xaxis)
    style.caption(figure, style.run_title(config))
    return figure


def bands(groups: Mapping[str, Sequence[RunDir]], note: str = "") -> "Figure":
    """Return a line and a band for each group of runs that differ in their seed alone.

    The line is the mean, the band reaches from the lowest to the highest run; both end where the
    first run of the group ends, so that n is the same all along. Thin lines are the others' rest.
    `note` is added to the caption.
    """
    every = [list(filter(None, (run.read_metrics() for run in runs))) for runs in groups.values()]
    rows_of_all = [row for histories in every for rows in histories for row in rows]
    longest = min(max(map(len, groups), default=0), style.LONGEST_LABEL)
    columns = max(1, min(len(groups), 200 // (longest + 14)))  # of the legend, below all panels
    figure, panels = _panels(rows_of_all, 7.3 + 0.17 * math.ceil(len(groups) / columns))
    for index, (label, histories) in enumerate(zip(groups, every, strict=True)):
        length = min(map(len, histories), default=0)
        rests = [rows[length - 1 :] for rows in histories if len(rows) > length]
        look = style.line_style(index)
        name_and_count = f"{style.plain(label, style.LONGEST_LABEL)} (n = {len(histories)})"
        for name, axes in panels.items():
            if not histories:
                axes.plot([], [], label=name_and_count, **look)
                continue
            values = np.array([_column(rows, name)[:length] for rows in histories])
            epochs, mean = _column(histories[0], "epoch")[:length], values.mean(axis=0)
            low, high = values.min(axis=0), values.max(axis=0)
            dots = _dots(histories[0][:length]) if length > 1 else {}
            if length == 1:  # a step as wide as the epoch: a single point has no line and no band
                epochs = np.array([epochs[0] - 0.4, epochs[0] + 0.4])
                mean, low, high = (np.repeat(line, 2) for line in (mean, low, high))
            axes.fill_between(epochs, low, high, color=look["color"], alpha=0.18, linewidth=0)
            axes.plot(epochs, mean, label=name_and_count, linewidth=1.6, **dots, **look)
            for rest in rests:
                axes.plot(_column(rest, "epoch"), _column(rest, name), linewidth=0.7, **look)
    style.legend_outside(figure, panels["train_loss"], columns=columns, handlelength=3.2)
    longer = any(len(set(map(len, histories))) > 1 for histories in every)
    words = "lines: mean over the runs · bands: lowest to highest run"
    style.caption(figure, words + " · thin lines: runs that trained for longer" * longer + note)
    return figure


def _panel(
    axes: "Axes",
    quantity: str,
    rows: Sequence[EpochMetrics],
    step_rows: Sequence[StepMetrics],
    best: EpochMetrics | None,
    *,
    test: bool,
    monitor: str,
) -> None:
    loss = quantity == "loss"
    style.dress(axes, quantity.capitalize(), "epoch", LOSS if loss else ACCURACY)
    style.epoch_axis(axes.xaxis)
    if not loss:
        style.percent_axis(axes.yaxis)
    if step_rows:
        positions, values = _steps(step_rows, quantity)
        faint: dict[str, Any] = {"color": style.BLUE, "alpha": 0.35, "linewidth": 0.8}
        axes.plot(positions, values, label="training steps", **faint)
    lines = [
        (f"train_{quantity}", "training", style.BLUE, "-"),
        (f"val_{quantity}", "validation", style.VERMILLION, "-"),
    ]
    if monitor in BY_CLASS and not loss:
        label = f"validation, {monitor.removeprefix('val_').replace('_', ' ')}"
        lines.append((monitor, label, style.VERMILLION, ":"))
    if test:
        lines.append((f"test_{quantity}", "test (watched)", style.INK, "--"))
    for column, label, colour, dashes in lines:
        values = _column(rows, column)
        if np.isfinite(values).any():
            look = {"color": colour, "linestyle": dashes, "linewidth": 1.8, **_dots(rows)}
            axes.plot(_column(rows, "epoch"), values, label=label, **look)
    value = getattr(best, f"val_{quantity}", None)
    if best is not None and value is not None and math.isfinite(value):
        axes.axvline(best.epoch, color=style.MUTED, linewidth=0.8, zorder=1)
        star: dict[str, Any] = {"color": style.VERMILLION, "markeredgecolor": style.PAPER}
        label = f"best epoch {best.epoch}: " + (f"{value:.4f}" if loss else f"{100 * value:.2f} %")
        axes.plot([best.epoch], [value], "*", markersize=13, zorder=5, label=label, **star)


def _panels(rows: Sequence[EpochMetrics], height: float) -> "tuple[Figure, dict[str, Axes]]":
    """Return panels of training and validation; of the test set where that alone was watched."""
    watched = any(row.test_loss is not None for row in rows)
    held_out = "test" if watched and all(row.val_loss is None for row in rows) else "val"
    words = {"train": "Training", "val": "Validation", "test": "Test"}
    figure = style.new_figure(13, height)
    panels: dict[str, Axes] = {}
    grid = figure.subplots(2, 2, sharey="row")
    for pair, quantity in zip(grid, ("loss", "accuracy"), strict=True):
        for axes, split in zip(pair, ("train", held_out), strict=True):
            y_label = (LOSS if quantity == "loss" else ACCURACY) if split == "train" else ""
            x_label = "epoch" if quantity == "accuracy" else ""
            style.dress(axes, f"{words[split]} {quantity}", x_label, y_label)
            axes.tick_params(labelleft=True)
            style.epoch_axis(axes.xaxis)
            axes.set_xlim(*_span(max((row.epoch for row in rows), default=1)))
            if quantity == "accuracy":
                style.percent_axis(axes.yaxis)
            panels[f"{split}_{quantity}"] = axes
    return figure, panels


def _dots(rows: Sequence[EpochMetrics]) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3.5} if len(rows) <= MARKED_EPOCHS else {}


def _column(rows: Sequence[EpochMetrics], name: str) -> Values:
    values = (getattr(row, name) for row in rows)
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _span(last: int) -> tuple[float, float]:
    """Return the limits of an epoch axis from 1 to `last`."""
    room = 0.5 if last == 1 else 0.02 * last + 0.2
    return 1 - room, last + room


def _steps(rows: Sequence[StepMetrics], quantity: str) -> tuple[Values, Values]:
    """Return positions on the epoch axis and values; an epoch's last step stands at the epoch."""
    epochs = np.array([row.epoch for row in rows], dtype=np.float64)
    values = np.array([getattr(row, quantity) for row in rows], dtype=np.float64)
    _, first, counts = np.unique(epochs, return_index=True, return_counts=True)
    place_in_epoch = np.arange(len(rows)) - np.repeat(first, counts) + 1
    positions = epochs - 1 + place_in_epoch / counts.max()
    bins = min(len(rows), MOST_POINTS)
    edges = np.linspace(0, len(rows), bins + 1).astype(int)[:-1]
    sizes = np.diff([*edges, len(rows)])
    return np.add.reduceat(positions, edges) / sizes, np.add.reduceat(values, edges) / sizes
