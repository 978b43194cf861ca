"""What numbers of few seeds and finite image sets support: intervals and paired tests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cifar_lab.errors import RequestError
from cifar_lab.metrics import Predictions

Right = npt.NDArray[np.bool_]

LEVEL = 0.05
"""A p value below it is called a difference; intervals are 1 minus it."""


@dataclass(frozen=True)
class Interval:
    """Mean of `n` values, their standard deviation (n - 1), half of the 95 % t interval's width."""

    n: int
    mean: float
    std: float | None
    half_width: float | None

    @property
    def low(self) -> float | None:
        """Lower end of the interval."""
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        """Upper end of the interval."""
        return None if self.half_width is None else self.mean + self.half_width


def interval(values: Sequence[float]) -> Interval | None:
    """Return mean, standard deviation and interval; None of no values, no spread of one."""
    n = len(values)
    if n == 0:
        return None
    # Sorted, so that the last bit does not depend on the order in which runs were found.
    ordered = sorted(values)
    mean = math.fsum(ordered) / n
    if n == 1:
        return Interval(1, mean, None, None)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in ordered) / (n - 1))
    return Interval(n, mean, std, t_quantile(n - 1) * std / math.sqrt(n))


def difference_of_means(a: Sequence[float], b: Sequence[float]) -> tuple[float, float | None]:
    """Return A's mean minus B's, and half of its 95 % interval's width (Welch 1947).

    The width is None where one of them has a single value.
    """
    one, two = interval(a), interval(b)
    if one is None or two is None:
        raise ValueError("a difference needs values on both sides")
    difference = one.mean - two.mean
    if one.std is None or two.std is None:
        return difference, None
    variance, degrees = _welch([(one.std**2 / one.n, one.n - 1), (two.std**2 / two.n, two.n - 1)])
    return difference, t_quantile(degrees) * math.sqrt(variance) if variance else 0.0


def _welch(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the sum of variances, each with its degrees of freedom, and Satterthwaite's of it."""
    variance = math.fsum(part for part, _ in parts)
    if variance == 0:
        return 0.0, math.inf
    return variance, variance**2 / math.fsum(part**2 / count for part, count in parts)


def t_quantile(degrees: float) -> float:
    """Return the quantile of Student's t that bounds the middle 95 %."""
    from scipy import special  # type: ignore[import-untyped]

    return float(special.stdtrit(degrees, 1 - LEVEL / 2))


@dataclass(frozen=True)
class PairedTest:
    """Two settings on the same images: A's accuracy minus B's, its 95 % interval, a p value.

    `only_a`, `only_b`: images that one gets right and the other wrong, a mean over seeds.
    `seeds`: runs of A and of B; with one each the test is about these two networks alone.
    """

    method: str
    images: int
    seeds: tuple[int, int]
    only_a: float
    only_b: float
    difference: float
    low: float
    high: float
    p: float

    @property
    def about_settings(self) -> bool:
        """Whether the spread over seeds is part of it, so that it speaks of more than two nets."""
        return min(self.seeds) > 1


def mcnemar(a: Right, b: Right) -> PairedTest:
    """Compare two networks by the images (N,) on which just one of them is right.

    McNemar's test with the mid-p value of the binomial distribution (Fagerland, Lydersen and
    Laake 2013); the interval is Agresti and Min's (2005).
    """
    from scipy import special

    images = len(a)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    total, fewer = only_a + only_b, min(only_a, only_b)
    if only_a == only_b:
        p = 1.0
    else:
        at_most = float(special.bdtr(fewer, total, 0.5))
        exactly = math.exp(
            math.lgamma(total + 1)
            - math.lgamma(fewer + 1)
            - math.lgamma(total - fewer + 1)
            - total * math.log(2)
        )
        p = min(1.0, 2 * at_most - exactly)
    centre = (only_a - only_b) / (images + 2)
    variance = ((total + 1) / (images + 2) - centre**2) / (images + 2)
    width = 1.96 * math.sqrt(variance)
    difference = (only_a - only_b) / images
    return PairedTest(
        "McNemar, mid-p",
        images,
        (1, 1),
        only_a,
        only_b,
        difference,
        centre - width,
        centre + width,
        p,
    )


def seeds_test(a: Right, b: Right) -> PairedTest:
    """Compare two settings with two or more seeds each: right answers (seeds, N) and (seeds, N).

    A t test whose variance is that between A's seeds, that between B's and that between images,
    with Satterthwaite's degrees of freedom: it keeps its level with two or three seeds, where a
    bootstrap over seeds does not.
    """
    from scipy import special

    (seeds_a, images), seeds_b = a.shape, len(b)
    each_a, each_b = a.mean(axis=1), b.mean(axis=1)
    per_image = a.mean(axis=0) - b.mean(axis=0)
    difference = float(per_image.mean())
    parts = (
        (float(each_a.var(ddof=1)) / seeds_a, seeds_a - 1),
        (float(each_b.var(ddof=1)) / seeds_b, seeds_b - 1),
        (float(per_image.var(ddof=1)) / images if images > 1 else 0.0, max(images - 1, 1)),
    )
    variance, degrees = _welch(parts)
    if variance == 0:
        p, width = (1.0, 0.0) if difference == 0 else (0.0, 0.0)
    else:
        p = 2 * float(special.stdtr(degrees, -abs(difference) / math.sqrt(variance)))
        width = t_quantile(degrees) * math.sqrt(variance)
    return PairedTest(
        "paired t over seeds and images",
        images,
        (seeds_a, seeds_b),
        images * float((a.mean(axis=0) * (1 - b.mean(axis=0))).mean()),
        images * float((b.mean(axis=0) * (1 - a.mean(axis=0))).mean()),
        difference,
        difference - width,
        difference + width,
        p,
    )


def right_answers(predictions: Sequence[Predictions]) -> tuple[Right, npt.NDArray[np.int64]]:
    """Return which images the runs of one setting get right (runs, N), and the images (N,).

    Images are put in the order of their indices. RequestError if the runs saw different ones.
    """
    rows, images = [], None
    for found in predictions:
        order = np.argsort(found.indices, kind="stable")
        seen = np.stack([found.indices[order], found.labels[order]])
        if images is not None and not np.array_equal(images, seen):
            raise RequestError("its runs were scored on different images")
        images = seen
        rows.append((found.predicted == found.labels)[order])
    assert images is not None
    return np.stack(rows), images


def compare(a: Sequence[Predictions], b: Sequence[Predictions]) -> PairedTest:
    """Test two settings by the predictions of their runs; RequestError on different images.

    With one run on a side the first runs are compared, by McNemar's test.
    """
    right_a, images_a = right_answers(a)
    right_b, images_b = right_answers(b)
    if not np.array_equal(images_a, images_b):
        raise RequestError("they were scored on different images")
    if min(len(right_a), len(right_b)) > 1:
        return seeds_test(right_a, right_b)
    return mcnemar(right_a[0], right_b[0])


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


def as_dict(test: PairedTest) -> dict[str, Any]:
    """Return a test as plain values."""
    return {
        "difference": test.difference,
        "low": test.low,
        "high": test.high,
        "p": test.p,
        "method": test.method,
    }
