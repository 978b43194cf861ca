"""How large a difference must be to count, and how large a true one must be to be found.

All follows from Student's t distribution and its relatives: normal variables divided by the root of
a chi-squared one over its degrees of freedom, over whose distribution `_scales` integrates.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cifar_lab.analysis.statistics import LEVEL

Floats = npt.NDArray[np.float64]

POWER = 0.8
"""The share of experiments in which a difference of the size that "would be shown" is shown."""


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

    Gauss and Legendre's rule over the distribution of the root of chi-squared over its degrees.
    """
    from scipy import special

    if degrees > 1e5:
        return np.ones(1), np.ones(1)
    nodes, weights = _legendre(64)
    ends = [math.sqrt(float(special.chdtri(degrees, p)) / degrees) for p in (1 - 1e-11, 1e-11)]
    scales = (nodes + 1) / 2 * (ends[1] - ends[0]) + ends[0]
    half = degrees / 2
    constant = half * math.log(half) - float(special.gammaln(half)) + math.log(ends[1] - ends[0])
    logs = constant + (degrees - 1) * np.log(scales) - half * scales**2
    return scales, weights * np.exp(logs)


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
