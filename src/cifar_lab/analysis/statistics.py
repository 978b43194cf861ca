"""What numbers of few seeds and finite image sets support: intervals, p values, power.

All follows from Student's t distribution and its relatives: normal variables divided by the root of
a chi-squared one over its degrees of freedom, over whose distribution `_scales` integrates.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cifar_lab.runs.metrics import Predictions

Floats = npt.NDArray[np.float64]

LEVEL = 0.05
"""A p value below it is called a difference; intervals are 1 minus it."""

POWER = 0.8
"""The share of experiments in which a difference of the size that "would be shown" is shown."""

MIN_VALUES = 3
"""Values that an interval is given for: of two values, Student's t makes one of 12.7 deviations."""


@dataclass(frozen=True)
class Interval:
    """Mean of `n` values, their standard deviation (n - 1), the 95 % t interval of the mean.

    `std` is None for a single value, `low` and `high` below MIN_VALUES, and where all values are
    the same: values that are cut off (the last epoch) do not say how much others vary. `smallest`
    and `largest` are those of the values.
    """

    n: int
    mean: float
    std: float | None
    low: float | None
    high: float | None
    smallest: float
    largest: float

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of the interval, or of the values where there are too few for one."""
        if self.low is None or self.high is None:
            return self.smallest, self.largest
        return self.low, self.high


def variance(values: Sequence[float]) -> float:
    """Return the variance (n - 1); 0 where values differ by rounding errors alone, or is one."""
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    result = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return result if result > 1e-24 * max(1.0, mean**2) else 0.0


def interval(
    values: Sequence[float],
    bounds: tuple[float, float] = (-math.inf, math.inf),
    share: float | None = None,
) -> Interval | None:
    """Return mean, standard deviation and interval; None of no values.

    The interval is cut at `bounds`, between which all values lie by their nature. `share`: the
    variance of the mean in units of that of a value, if it is not 1/n.
    """
    if not values:
        return None
    # Sorted, so that the last bit does not depend on the order in which runs were found.
    ordered, n = sorted(values), len(values)
    mean, low, high = math.fsum(ordered) / n, None, None
    std = math.sqrt(variance(ordered)) if n > 1 else None
    if n >= MIN_VALUES and std:
        from scipy import special

        quantile = float(special.stdtrit(n - 1, 1 - LEVEL / 2))
        half = quantile * std * math.sqrt(share or 1 / n)
        low, high = max(mean - half, bounds[0]), min(mean + half, bounds[1])
    return Interval(n, mean, std, low, high, ordered[0], ordered[-1])


def sort_by_index(predictions: Predictions) -> Predictions:
    """Return predictions in the order of their images' indices."""
    order = np.argsort(predictions.indices, kind="stable")
    logits, labels, indices = predictions.logits, predictions.labels, predictions.indices
    return Predictions(logits[order], labels[order], indices[order])


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted for their number (Holm 1979), in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.minimum(1.0, np.arange(len(order), 0, -1) * np.asarray(p_values)[order])
    in_the_order_given: list[float] = np.maximum.accumulate(adjusted)[np.argsort(order)].tolist()
    return in_the_order_given


def show_p(p: float) -> str:
    """Return a p value for people."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


@dataclass(frozen=True)
class Family:
    """The differences that are judged together, so that one of twenty of all of them may be wrong.

    `chosen`: they are the differences to the best of the configurations, which the same runs chose.
    Any two could have become one of them, so that the studentized range is the measure (Tukey 1953;
    with a deviation of their own, Games and Howell 1976). Otherwise they are differences to what
    was named before, and Bonferroni's bound is used. A single difference is that of a t test.
    """

    comparisons: int = 1
    chosen: bool = False

    def critical(self, degrees: float) -> float:
        """Return how many standard errors a difference must have to be told from none."""
        return _critical(self.comparisons, self.chosen, degrees)

    def p(self, statistic: float, degrees: float) -> float:
        """Return the p value of a difference, of so many standard errors, adjusted."""
        from scipy import special

        if self.chosen and self.comparisons > 1:
            groups = self.comparisons + 1
            return 1 - studentized_range(math.sqrt(2) * abs(statistic), groups, degrees)
        return min(1.0, 2 * self.comparisons * float(special.stdtr(degrees, -abs(statistic))))


SINGLE = Family()


@functools.lru_cache(maxsize=4096)
def _critical(comparisons: int, chosen: bool, degrees: float) -> float:
    from scipy import special

    if not chosen or comparisons == 1:
        return float(special.stdtrit(degrees, 1 - LEVEL / (2 * comparisons)))
    groups = comparisons + 1
    return _root(lambda c: studentized_range(math.sqrt(2) * c, groups, degrees) - 1 + LEVEL, 2.0)


_legendre = functools.cache(np.polynomial.legendre.leggauss)


@functools.lru_cache(maxsize=1024)
def _scales(degrees: float) -> tuple[Floats, Floats]:
    """Return values of a standard error over its true size, and weights that sum to 1.

    Gauss and Legendre's rule over the distribution of the root of chi-squared over its degrees. The
    nodes are denser near 0, where the range of many means turns from impossible to certain.
    """
    from scipy import special

    if degrees > 1e5:
        return np.ones(1), np.ones(1)
    nodes, weights = _legendre(64)
    ends = [math.sqrt(float(special.chdtri(degrees, p)) / degrees) for p in (1 - 1e-11, 1e-11)]
    places = (nodes + 1) / 2
    scales = places**2 * (ends[1] - ends[0]) + ends[0]
    half = degrees / 2
    constant = half * math.log(half) - float(special.gammaln(half)) + math.log(ends[1] - ends[0])
    logs = constant + (degrees - 1) * np.log(scales) - half * scales**2
    return scales, weights * 2 * places * np.exp(logs)


def studentized_range(q: float, groups: int, degrees: float) -> float:
    """Return the probability that the range of `groups` means is at most `q` standard errors.

    scipy's `studentized_range` agrees to eight digits and takes several times as long, after an
    import of a second.
    """
    from scipy import special

    scales, weights = _scales(degrees)
    z, widths = _legendre(96)
    z, widths = 8 * z, 8 * widths * np.exp(-32 * z**2) / math.sqrt(2 * math.pi)
    within = special.ndtr(z) - special.ndtr(z - q * scales[:, None])
    inner = groups * (widths * within ** (groups - 1)).sum(axis=1)
    return float(min(1.0, max(0.0, (weights * inner).sum())))


@functools.lru_cache(maxsize=4096)
def detectable(critical: float, degrees: float) -> float:
    """Return the true difference, in standard errors, that exceeds `critical` with 80 % power.

    The noncentral t distribution. A difference in the wrong direction counts too, as in
    statsmodels.
    """
    from scipy import special

    scales, weights = _scales(degrees)

    def power(effect: float) -> float:
        above = special.ndtr(effect - critical * scales) + special.ndtr(-effect - critical * scales)
        return float((weights * above).sum())

    return _root(lambda effect: power(effect) - POWER, critical)


def _root(function: Callable[[float], float], high: float) -> float:
    """Return where an increasing function of a positive number is 0."""
    from scipy import optimize

    while function(high) < 0:
        high *= 2
    return float(optimize.brentq(function, 1e-9, high, xtol=1e-9))
