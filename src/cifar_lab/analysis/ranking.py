"""The order of the groups of a collection, what separates them, and the effect of each axis."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cifar_lab.analysis import contrasts, run_metrics
from cifar_lab.analysis.seed_groups import RunCollection, SeedGroup, sort_values
from cifar_lab.analysis.statistics import Family, holm
from cifar_lab.errors import UsageError, listing, shorten


def rank(collection: RunCollection, metric: str | None = None, baseline: str | None = None) -> None:
    """Rank the groups of each dataset, choose the best, and set the others against it.

    By the mean of the best value of the score that the runs monitor, or by `metric`. Runs that
    monitor different scores are ranked by best_val_accuracy. Where no validation images were held
    out and no metric was asked for, nothing is ranked and a note gives the reason. `baseline`
    (`optimizer=sgd`) names the group of each dataset that takes the place of the best.
    """
    monitors = sorted({run.config.training.monitor for run in collection.runs})
    monitored = monitors[0] if len(monitors) == 1 else "val_accuracy"
    collection.metric = shown = metric or f"best_{monitored}"
    run_metrics.check(shown)
    collection.baseline = baseline
    named = collection.select(baseline) if baseline else []
    sign = -1 if run_metrics.higher_is_better(shown) else 1
    for dataset in collection.datasets:
        groups = [group for group in collection.groups if group.dataset == dataset]
        scored = [group for group in groups if group.mean(shown) is not None]
        scored.sort(key=lambda group: (sign * (group.mean(shown) or 0.0), group.key))
        if scored:
            _rank_dataset(collection, scored, named)
        elif any(group.finished for group in groups):
            collection.notes.append(_why_unranked(collection, dataset, groups))
    if baseline and not any(group.is_reference for group in collection.groups):
        raise UsageError(f"--baseline {shorten(baseline)}: it has no {shown} yet")
    if collection.ranked and metric is None and len(monitors) > 1:
        collection.notes.append(
            f"The runs monitor different scores ({', '.join(monitors)}), so they are ranked by "
            f"{shown}; --metric ranks by another."
        )
    splits = [run.config.split for run in collection.runs if run.finished]
    if collection.ranked and run_metrics.is_test(shown):
        collection.notes.append(
            f"Ranked by {shown}, as requested: the best configuration is chosen on the test "
            "images, so its score is optimistic."
        )
    elif collection.ranked and any(s.source == "test" and s.validation > 0 for s in splits):
        collection.notes.append(
            "Some runs take their validation images from the test set (split.source=test): a test "
            "score that counts these images is optimistic."
        )


def _rank_dataset(
    collection: RunCollection, scored: Sequence[SeedGroup], named: Sequence[SeedGroup]
) -> None:
    """Give groups in their order a rank, and the difference to the best or to the `named` one.

    Or the reason why there is none; UsageError if several are named.
    """
    collection.ranked = True
    for place, group in enumerate(scored, start=1):
        group.rank = place
    scored[0].chosen = True
    fitting = [group for group in scored if group in named] if collection.baseline else scored[:1]
    if len(fitting) > 1:
        raise UsageError(
            f"--baseline {shorten(collection.baseline or '')} fits {len(fitting)} configurations "
            f"({listing(map(collection.label, fitting), 120)}); name one by more of their values, "
            "as in --baseline optimizer=sgd,activation=relu"
        )
    samples = {group: group.sample(collection.metric) for group in scored}
    deviation = contrasts.pooled(list(samples.values()))
    family = Family(max(len(scored) - 1, 1), chosen=collection.baseline is None)
    for reference in fitting:
        reference.is_reference = True
        for group in (group for group in scored if group is not reference):
            try:
                sides = [samples[group]], [samples[reference]]
                group.difference = contrasts.contrast(*sides, deviation, family)
            except contrasts.CannotJudge as error:
                group.not_judged = str(error)


def _why_unranked(collection: RunCollection, dataset: str, groups: list[SeedGroup]) -> str:
    if collection.metric.startswith("best_val_") and all(
        run.config.split.validation == 0 for group in groups for run in group.finished
    ):
        return (
            f"{dataset}: no validation images were held out (protocol "
            f"{groups[0].runs[0].config.protocol}), so the configurations are not ranked and "
            "none is chosen: choosing by the test score would make that score worthless. --metric "
            "test_accuracy ranks by it all the same."
        )
    return (
        f"{dataset}: no finished run has a {collection.metric}, so its configurations are not "
        "ranked."
    )


@dataclass(frozen=True)
class Effect:
    """How much better the best value of an axis is than another, over the values of all others."""

    axis: str
    best: str
    other: str
    difference: contrasts.Difference


@dataclass(frozen=True)
class MainEffects:
    """The effects of the axes of one dataset's groups, and the deviation that they rest on.

    `interactions`: whether the effect of one axis depends on another: both, and the p value of an F
    test, adjusted (Holm).
    """

    dataset: str
    effects: list[Effect]
    interactions: list[tuple[str, str, float]]
    deviation: contrasts.Deviation


def main_effects(collection: RunCollection, dataset: str) -> MainEffects | None:
    """Return the main effects of a dataset; None unless its groups are a full factorial.

    Two axes or more, every combination of their values once, and finished runs that differ in their
    seed alone, without which chance has no measure.
    """
    groups = [g for g in collection.groups if g.dataset == dataset and g.rank is not None]
    samples = [group.sample(collection.metric) for group in groups]
    axes = [i for i in collection.main_axes if len({group.key[i] for group in groups}) > 1]
    levels = [sort_values(group.key[i] for group in groups) for i in axes]
    cells = {tuple(group.key[i] for i in axes) for group in groups}
    if len(axes) < 2 or not len(cells) == len(groups) == math.prod(map(len, levels)):
        return None
    deviation = contrasts.residual(samples)
    if deviation is None:
        return None
    sign = 1 if run_metrics.higher_is_better(collection.metric) else -1
    try:
        effects: list[Effect] = []
        for i, values in zip(axes, levels, strict=True):
            sides: dict[str, list[contrasts.Sample]] = {value: [] for value in values}
            for group, sample in zip(groups, samples, strict=True):
                sides[group.key[i]].append(sample)
            best, *others = sorted(values, key=lambda v: -sign * sum(s.mean for s in sides[v]))
            family = Family(len(others), chosen=True)
            for other in others:
                difference = contrasts.contrast(sides[best], sides[other], deviation, family)
                effects.append(Effect(collection.axes[i], best, other, difference))
    except contrasts.CannotJudge:  # folds of some and seeds of others, or different images
        return None
    pairs = list(itertools.combinations(range(len(axes)), 2))
    means = np.zeros([len(values) for values in levels])
    for group, sample in zip(groups, samples, strict=True):
        cell = [values.index(group.key[i]) for i, values in zip(axes, levels, strict=True)]
        means[tuple(cell)] = sample.mean
    share = math.fsum(sample.share for sample in samples) / len(samples)
    p_values = holm([_interaction(means, pair, share, deviation) for pair in pairs])
    names = [collection.axes[i] for i in axes]
    interactions = [(names[a], names[b], p) for (a, b), p in zip(pairs, p_values, strict=True)]
    return MainEffects(dataset, effects, interactions, deviation)


def _interaction(
    means: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    pair: tuple[int, int],
    share: float,
    deviation: contrasts.Deviation,
) -> float:
    """Return the p value of the interaction of two axes of a table of cell means.

    The sum of squares of what the two main effects leave of the means over the other axes, as in
    an analysis of variance. `share`: the variance of a cell's mean in units of that of a run.
    """
    from scipy import special

    others = tuple(i for i in range(means.ndim) if i not in pair)
    table = means.mean(axis=others)
    rest = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    degrees = (table.shape[0] - 1) * (table.shape[1] - 1)
    per_cell = share * table.size / means.size
    f = float((rest**2).sum()) / degrees / (per_cell * deviation.std**2)
    return float(special.fdtrc(degrees, deviation.degrees, f))
