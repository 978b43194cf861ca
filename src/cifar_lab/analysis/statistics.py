"""What numbers of few seeds and finite image sets support: intervals and paired tests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cifar_lab.runs.metrics import Predictions

LEVEL = 0.05
"""A p value below it is called a difference; intervals are 1 minus it."""


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
    n = len(values)
    # Sorted, so that the last bit does not depend on the order in which runs were found.
    ordered = sorted(values)
    mean = math.fsum(ordered) / n
    std = low = high = None
    if n > 1:
        std = math.sqrt(variance(ordered))
        if n >= MIN_VALUES and std:
            from scipy import special

            quantile = float(special.stdtrit(n - 1, 1 - LEVEL / 2))
            half = quantile * std * math.sqrt(share or 1 / n)
            low, high = max(mean - half, bounds[0]), min(mean + half, bounds[1])
    return Interval(n, mean, std, low, high, ordered[0], ordered[-1])


def in_order(predictions: Predictions) -> Predictions:
    """Return predictions in the order of their images' indices."""
    order = np.argsort(predictions.indices, kind="stable")
    logits, labels, indices = predictions.logits, predictions.labels, predictions.indices
    return Predictions(logits[order], labels[order], indices[order])


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted for their number (Holm 1979), in the order given."""
    count = len(p_values)
    order = sorted(range(count), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * count, 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (count - place) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def show_p(p: float) -> str:
    """Return a p value for people."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
