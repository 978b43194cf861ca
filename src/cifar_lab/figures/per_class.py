"""How well each class is recognised, and which classes are taken for which."""

from typing import TYPE_CHECKING

import numpy as np

from cifar_lab.figures import style
from cifar_lab.runs.metrics import wilson_interval
from cifar_lab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(run: RunDir, pairs: int = 10, split: str = "test", weights: str = "scored") -> "Figure":
    """Return each class's accuracy with its 95 % interval, and the most confused `pairs` beside.

    `split` and `weights` name the predictions file.
    """
    predictions = run.read_predictions(split, weights)
    matrix = predictions.confusion_matrix
    support = matrix.sum(axis=1)
    names = style.plain_names(run, len(matrix))
    accuracy = predictions.per_class_accuracy
    order = [int(i) for i in np.argsort(-accuracy, kind="stable") if support[i]]
    confused = predictions.most_confused(pairs)
    lines = max(len(order), len(confused))
    figure = style.new_figure(11, max(2.6, 0.2 * lines + 1.6))
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    overall = f"share recognised (dashed: all classes, {100 * predictions.accuracy:.2f} %)"
    style.dress(left, "Accuracy by class, with its 95 % interval", overall)
    style.dress(right, "Most confused pairs", f"{split} images (share of the true class)")
    for axes in (left, right):
        axes.grid(False, axis="y")
        axes.set_ylim(lines - 0.4, -0.6)
    shares = [float(accuracy[i]) for i in order]
    intervals = [wilson_interval(float(accuracy[i]), int(support[i])) for i in order]
    # At 0 and 1 the interval ends in the share itself, but for the last bit.
    around = np.abs(np.array(intervals) - np.array(shares)[:, None]).T
    whiskers = {"ecolor": style.INK, "elinewidth": 1, "capsize": 2}
    left.barh(range(len(order)), shares, xerr=around, color="#8FB9D9", error_kw=whiskers)
    left.axvline(predictions.accuracy, color=style.VERMILLION, linestyle="--", linewidth=1.3)
    numbers = [f"{names[i]}  {100 * accuracy[i]:.1f} % of {support[i]:,}" for i in order]
    left.set_yticks(range(len(order)), numbers)
    left.set_xlim(0, 1)
    style.percent_axis(left.xaxis)

    counts = [count for _, _, count in confused]
    right.barh(range(len(confused)), counts, color="#E8B48C")
    for row, (label, _, count) in enumerate(confused):
        size = f"{count}  ({100 * count / support[label]:.1f} %)"
        right.text(count, row, f" {size}", va="center", fontsize=style.SMALL, color=style.INK)
    words = [f"{names[label]} → {names[guess]}" for label, guess, _ in confused]
    right.set_yticks(range(len(confused)), words)
    right.set_xlim(0, 1.35 * max(counts, default=1))
    style.epoch_axis(right.xaxis)
    if not confused:
        style.note(right, "no mistakes")
    elif lines > 2 * len(confused):  # few pairs of many classes stand close together, at the top
        right.set_ylim(len(confused) - 0.4, -0.6)
        right.set(box_aspect=0.06 * len(confused), anchor="NW")
    style.caption(figure, style.run_title(run.read_config()))
    return figure
