"""The pictures of a ranked collection of runs: grid, curves and effects, with its numbers."""

from typing import TYPE_CHECKING

from cifar_lab.analysis import run_metrics, texts
from cifar_lab.analysis.seed_groups import RunCollection, SeedGroup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cifar_lab.figures.effects import Bar
    from cifar_lab.runs.run_dir import RunDir

MOST_CURVES = 24
"""Cells in curves.png, the best ones; report.html has them all."""


def grid_of(collection: RunCollection) -> "Figure":
    """Return the heat map of the groups' means over their main axes."""
    from cifar_lab.figures import grid

    axes = [collection.axes[i] for i in collection.main_axes]
    squares = []
    for group in collection.groups:
        key = tuple(group.key[i] for i in collection.main_axes)
        interval = group.interval(collection.metric)
        score, ends, n = (interval.mean, interval.ends, interval.n) if interval else (None, None, 0)
        squares.append(grid.Square(key, score, ends, n, group.chosen))
    return grid.draw(
        axes,
        [collection.values(axis) for axis in axes],
        squares,
        run_metrics.in_words(collection.metric),
        fraction=run_metrics.is_fraction(collection.metric),
        higher_is_better=run_metrics.higher_is_better(collection.metric),
    )


def curves_of(collection: RunCollection) -> "Figure":
    """Return the curves of the best groups, each with a band for its runs."""
    from cifar_lab.figures import curves

    runs: dict[str, list[RunDir]] = {}
    for group in collection.ranking[:MOST_CURVES]:
        members = [run.run for run in group.finished or group.runs]
        runs.setdefault(collection.short_label(group), []).extend(members)
    return curves.bands(runs)


def effects_of(collection: RunCollection) -> "Figure":
    """Return the forest plot of the differences to the best, or to the baseline."""
    from cifar_lab.figures import effects

    metric = collection.metric
    ranked = [group for group in collection.ranking if group.rank is not None]
    references = [collection.short_label(group) for group in ranked if group.is_reference]
    differences = [group.difference for group in ranked if group.difference]
    covers = sorted({difference.covers for difference in differences})
    count = max((difference.family.comparisons for difference in differences), default=0)
    together = f" of all {count} differences together" * (count > 1)
    explained = f"to {texts.reference_name(collection)}"
    if len(references) == 1:
        explained += f": {references[0]}"
    if covers:
        explained += f" · line: 95 % interval{together}, over {' or '.join(covers)}"
    unit = " (points)" if run_metrics.is_fraction(metric) else ""
    label = f"difference in {run_metrics.in_words(metric)}{unit}"
    return effects.draw([_bar(collection, group) for group in ranked], label, explained)


def _bar(collection: RunCollection, group: SeedGroup) -> "Bar":
    from cifar_lab.figures.effects import Bar

    label = f"{collection.short_label(group)}  (n = {len(group.finished)})"
    found = group.difference
    if found is None:
        said = texts.say_of(collection, group).verdict
        return Bar(label, said, is_reference=group.is_reference)
    metric = collection.metric
    unit = 100.0 if run_metrics.is_fraction(metric) else 1.0
    is_better = (found.value > 0) == run_metrics.higher_is_better(metric)
    return Bar(
        label,
        texts.say(metric, found).difference.removesuffix(" points").replace("-", "−"),
        unit * found.value,
        unit * found.low,
        unit * found.high,
        unit * found.smallest,
        is_better if found.told_apart else None,
    )


PICTURES = {"grid": grid_of, "curves": curves_of, "effects": effects_of}
"""What draws each picture of a collection, by the picture's name."""
