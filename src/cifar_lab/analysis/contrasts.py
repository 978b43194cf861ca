"""What separates groups of runs: a difference, its interval, and what these runs could have shown.

The formulas, their sources and their sentences are explained in docs/summaries.md.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import numpy.typing as npt

from cifar_lab.analysis.statistics import LEVEL, SINGLE, Family, detectable, variance

Right = npt.NDArray[np.bool_]
Replicate = tuple[int, int | None]

MOST_SEEDS = 10_000


class CannotJudge(Exception):
    """Nothing can be said of a difference; the message is the reason."""


@dataclass(frozen=True)
class Sample:
    """A metric of one configuration: a value for each of its runs, in the order of `replicates`.

    `images`: which images it was measured on, in a form that can be compared, None if that is not
    known; `right`: which of them each run gets right, (n, N), None unless it is an accuracy.
    `folds`: the number of folds of cross-validation that the runs belong to.
    """

    values: tuple[float, ...]
    replicates: tuple[Replicate, ...]
    images: bytes | None = None
    right: Right | None = None
    folds: int | None = None

    @property
    def mean(self) -> float:
        """The mean of the values."""
        return math.fsum(self.values) / len(self.values)

    @property
    def variance(self) -> float:
        """The variance of the values (n - 1)."""
        return variance(self.values)

    @property
    def share(self) -> float:
        """The variance of the mean in units of that of a run: 1/n, and more over folds.

        The training sets of two folds overlap, so that the variance of a mean over k of them is
        1/k + 1/(folds - 1) times that of one (Nadeau and Bengio 2003).
        """
        extra = 1 / (self.folds - 1) if self.folds else 0.0
        return 1 / len(self.values) + extra

    def over_folds(self, chosen: Sequence[int | None]) -> "Sample":
        """Return it with a value for each chosen fold: the mean over the seeds of the fold."""
        means = [
            np.mean([v for v, (_, of) in zip(self.values, self.replicates, strict=True) if of == f])
            for f in chosen
        ]
        replicates = tuple((0, fold) for fold in chosen)
        return Sample(tuple(map(float, means)), replicates, folds=self.folds)


@dataclass(frozen=True)
class Deviation:
    """A standard deviation between runs that differ in their seed alone, and how well it is known.

    `degrees`: of freedom; `paired`: what the runs of one seed have in common was taken out.
    """

    std: float
    degrees: float
    paired: bool = False

    def ends(self) -> tuple[float, float]:
        """Return the ends of its 95 % interval, by the chi-squared distribution."""
        from scipy import special

        sums = self.degrees * self.std**2
        tails = (float(special.chdtri(self.degrees, p)) for p in (LEVEL / 2, 1 - LEVEL / 2))
        low, high = (math.sqrt(sums / tail) for tail in tails)
        return low, high


def pooled(samples: Sequence[Sample]) -> Deviation | None:
    """Return the deviation within several configurations, as one for all; None if there is none.

    A configuration whose runs all have one value is left out: values that are cut off (the last
    epoch, a score of 100 %) do not say how much runs vary.
    """
    parts = [(len(s.values) - 1, s.variance) for s in samples if s.variance > 0]
    degrees = sum(count for count, _ in parts)
    if not degrees:
        return None
    return Deviation(math.sqrt(math.fsum(n * v for n, v in parts) / degrees), degrees)


def residual(samples: Sequence[Sample]) -> Deviation | None:
    """Return the deviation within configurations that have the same seeds, without these.

    What remains of each value without the means of its configuration and of its seed: the residual
    of a randomized block design. Where the seeds differ, or a configuration's runs all have one
    value, it is that of `pooled`.
    """
    alike = len({sample.replicates for sample in samples}) == 1
    if not alike or len(samples) < 2 or not all(sample.variance for sample in samples):
        return pooled(samples)
    values = np.array([sample.values for sample in samples])
    rest = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
    degrees = (len(samples) - 1) * (values.shape[1] - 1)
    remaining = float((rest**2).sum()) / degrees
    if remaining <= 1e-24 * max(1.0, float((values**2).mean())):
        return None
    return Deviation(math.sqrt(remaining), degrees, paired=True)


@dataclass(frozen=True)
class Difference:
    """A's mean minus B's: its standard error and degrees of freedom, and what it is judged by.

    `covers`: what varied, and so of what else than these runs it speaks;
    `over_images`: the part of the variance that is between images, with its degrees of freedom;
    `alone`: of two single runs, how many images A alone and B alone gets right.
    """

    value: float
    error: float
    degrees: float
    covers: str
    over_images: tuple[float, int] | None = None
    family: Family = SINGLE
    alone: tuple[int, int] | None = None

    @property
    def half(self) -> float:
        """Half the width of the 95 % interval, which holds for all of the family together."""
        return self.family.critical(self.degrees) * self.error

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.value - self.half

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.value + self.half

    @property
    def p(self) -> float:
        """The p value, adjusted for the family."""
        return self.family.p(self.value / self.error, self.degrees)

    @property
    def told_apart(self) -> bool:
        """Whether the interval leaves out 0."""
        return abs(self.value) > self.half

    @property
    def smallest(self) -> float:
        """The smallest true difference that such runs would have shown in four cases of five."""
        return self.error * detectable(self.family.critical(self.degrees), self.degrees)


def contrast(
    plus: Sequence[Sample],
    minus: Sequence[Sample],
    deviation: Deviation | None,
    family: Family = SINGLE,
) -> Difference:
    """Return the mean of some configurations minus that of others; CannotJudge if nothing can be.

    Two configurations each bring a deviation of their own (Welch 1947; Satterthwaite 1946). Where
    one has none (a single run, or runs with one value), both take `deviation`, which rests on the
    other's runs; so do means over several. To the variance between seeds that between the images is
    added, where all were scored on the same. Two single runs are compared as two networks, on these
    images (McNemar's test, with Agresti and Min's variance of 2005). Folds are paired.
    """
    samples = [*plus, *minus]
    if len({sample.folds for sample in samples}) > 1:
        raise CannotJudge("one was repeated over folds and the other was not")
    folds = plus[0].folds is not None
    if not folds and len({sample.images for sample in samples} - {None}) > 1:
        raise CannotJudge("they were scored on different images")
    pair = len(plus) == len(minus) == 1
    if pair and folds:
        of_each = [{fold for _, fold in sample.replicates} for sample in samples]
        if len(shared := list(of_each[0] & of_each[1])) < 2:
            raise CannotJudge("they share fewer than two folds")
        plus, minus = ([sample.over_folds(shared)] for sample in samples)
        deviation = residual([*plus, *minus])
    images = None if folds else _image_variance(plus, minus)
    if pair and len(plus[0].values) == len(minus[0].values) == 1 and deviation is None:
        return _two_networks(plus[0], minus[0], family)
    if pair and not folds and all(sample.variance for sample in samples):
        parts = [(s.variance * s.share, len(s.values) - 1.0) for s in samples]
    elif deviation is not None:
        shares = [math.fsum(s.share for s in side) / len(side) ** 2 for side in (plus, minus)]
        parts = [(deviation.std**2 * math.fsum(shares), deviation.degrees)]
    else:
        raise CannotJudge("runs that are single or all equal do not say how much chance does")
    value = fmean(sample.mean for sample in plus) - fmean(sample.mean for sample in minus)
    covers = "folds" if folds else "seeds" if images is None else "seeds and images"
    error, degrees = welch([*parts, *([] if images is None else [images])])
    return Difference(value, error, degrees, covers, images, family)


def welch(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the root of a sum of variances, and Satterthwaite's degrees of freedom of it.

    `parts`: each variance with the degrees of freedom that it is known with.
    """
    total = math.fsum(part for part, _ in parts)
    return math.sqrt(total), total**2 / math.fsum(p**2 / degrees for p, degrees in parts)


def _image_variance(plus: Sequence[Sample], minus: Sequence[Sample]) -> tuple[float, int] | None:
    """Return the variance of the difference over other images, with its degrees of freedom.

    That of the images' mean differences, less what the runs of one configuration differ by on an
    image: the deviation between seeds has that already. A single run takes what the others differ
    by; where all are single it is not known, and the interval is wider than it need be.
    """
    sides = [[s.right for s in side if s.right is not None] for side in (plus, minus)]
    if sum(map(len, sides)) < len(plus) + len(minus) or (images := sides[0][0].shape[1]) < 2:
        return None
    several = [right for rights in sides for right in rights if len(right) > 1]
    within = {id(right): float(right.var(axis=0, ddof=1).mean()) for right in several}
    typical = fmean(within.values()) if within else 0.0
    means, noise = [], 0.0
    for rights in sides:
        means.append(np.mean([right.mean(axis=0) for right in rights], axis=0))
        parts = [within.get(id(right), typical) / len(right) for right in rights]
        noise += math.fsum(parts) / len(rights) ** 2
    between = float((means[0] - means[1]).var(ddof=1))
    return max(between - noise, 0.0) / images, images - 1


def _two_networks(a: Sample, b: Sample, family: Family) -> Difference:
    if a.right is None or b.right is None:
        raise CannotJudge("each has one run, and predictions of the same images are not there")
    images = a.right.shape[1]
    only_a, only_b = int((a.right & ~b.right).sum()), int((b.right & ~a.right).sum())
    centre = (only_a - only_b) / (images + 2)
    error = math.sqrt(((only_a + only_b + 1) / (images + 2) - centre**2) / (images + 2))
    value, between = (only_a - only_b) / images, (error**2, images - 1)
    return Difference(value, error, math.inf, "images", between, family, (only_a, only_b))


def seeds_needed(
    points: float, deviation: Deviation, images: tuple[float, float] | None, family: Family = SINGLE
) -> int | None:
    """Return the seeds per configuration that show a difference with 80 % power, 2 or more.

    `images`: the variance of a difference over other images, with its degrees of freedom. None
    where no number of seeds would be enough, since the images alone are too few.
    """

    def is_shown(seeds: int) -> bool:
        part = (deviation.std**2 / seeds, float(seeds - 1))
        error, degrees = welch([part, part, *([images] if images else [])])
        return error * detectable(family.critical(degrees), degrees) <= points

    counts = range(2, MOST_SEEDS + 1)
    place = bisect_left(counts, True, key=is_shown)
    return counts[place] if place < len(counts) else None
