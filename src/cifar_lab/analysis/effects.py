"""The main effects of a full factorial sweep: each axis over all values of the others."""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from cifar_lab.analysis import run_metrics
from cifar_lab.analysis.contrasts import (
    CannotJudge,
    Deviation,
    Difference,
    Sample,
    contrast,
    residual,
)
from cifar_lab.analysis.power import Family
from cifar_lab.analysis.seed_groups import RunCollection, in_order
from cifar_lab.analysis.statistics import holm


@dataclass(frozen=True)
class Effect:
    """How much better the best value of an axis is than another, over the values of all others."""

    axis: str
    best: str
    other: str
    difference: Difference


@dataclass(frozen=True)
class MainEffects:
    """The effects of the axes of one dataset's groups, and the deviation that they rest on.

    `interactions`: whether the effect of one axis depends on another: both, and the p value of an F
    test, adjusted (Holm).
    """

    dataset: str
    effects: list[Effect]
    interactions: list[tuple[str, str, float]]
    deviation: Deviation


def main_effects(collection: RunCollection) -> list[MainEffects]:
    """Return the main effects of each dataset whose finished groups are a full factorial.

    Two axes or more, every combination of their values once, and runs that differ in their seed
    alone, without which chance has no measure.
    """
    found = (_of_groups(collection, dataset) for dataset in collection.datasets)
    return [effects for effects in found if effects is not None]


def _of_groups(collection: RunCollection, dataset: str) -> MainEffects | None:
    groups = [g for g in collection.groups if g.dataset == dataset and g.rank is not None]
    samples = [sample for g in groups if (sample := g.sample(collection.metric)) is not None]
    axes = [i for i in collection.main_axes if len({group.key[i] for group in groups}) > 1]
    levels = [in_order(group.key[i] for group in groups) for i in axes]
    cells = {tuple(group.key[i] for i in axes) for group in groups}
    if len(axes) < 2 or not len(cells) == len(groups) == math.prod(map(len, levels)):
        return None
    deviation = residual(samples)
    if deviation is None:
        return None
    sign = 1 if run_metrics.higher_is_better(collection.metric) else -1
    try:
        effects: list[Effect] = []
        for i, values in zip(axes, levels, strict=True):
            sides: dict[str, list[Sample]] = {value: [] for value in values}
            for group, sample in zip(groups, samples, strict=True):
                sides[group.key[i]].append(sample)
            best, *others = sorted(values, key=lambda v: -sign * sum(s.mean for s in sides[v]))
            family = Family(len(others), chosen=True)
            for other in others:
                difference = contrast(sides[best], sides[other], deviation, family)
                effects.append(Effect(collection.axes[i], best, other, difference))
    except CannotJudge:  # folds of some and seeds of others, or different images
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
    deviation: Deviation,
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
