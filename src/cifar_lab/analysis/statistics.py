"""What numbers of few seeds and finite image sets support: intervals and paired tests."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cifar_lab.errors import UsageError
from cifar_lab.runs.metrics import Predictions

Right = npt.NDArray[np.bool_]

LEVEL = 0.05
"""A p value below it is called a difference; intervals are 1 minus it."""


MIN_VALUES = 3
"""Values that an interval is given for: of two values, Student's t makes one of 12.7 deviations."""


@dataclass(frozen=True)
class Interval:
    """Mean of `n` values, their standard deviation (n - 1), the 95 % t interval of the mean.

    `std` is None for a single value, `low` and `high` below MIN_VALUES; `smallest` and `largest`
    are those of the values.
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


def interval(
    values: Sequence[float], bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Interval | None:
    """Return mean, standard deviation and interval; None of no values.

    The interval is cut at `bounds`, between which all values lie by their nature.
    """
    if not values:
        return None
    n = len(values)
    # Sorted, so that the last bit does not depend on the order in which runs were found.
    ordered = sorted(values)
    mean = math.fsum(ordered) / n
    std = low = high = None
    if n > 1:
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in ordered) / (n - 1))
        if n >= MIN_VALUES:
            half = t_quantile(n - 1) * std / math.sqrt(n)
            low, high = max(mean - half, bounds[0]), min(mean + half, bounds[1])
    return Interval(n, mean, std, low, high, ordered[0], ordered[-1])


def interval_over_folds(
    values: Sequence[tuple[int, float]],
    folds: int,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval | None:
    """Return what `interval` does for values of runs, each with the fold that it validated on.

    The training sets of two of the `folds` overlap, so that the runs are more alike than
    independent ones: the variance of the mean over k folds is that of the folds times
    1/k + 1/(folds - 1) instead of 1/k (Nadeau and Bengio 2003). The runs of one fold (its seeds)
    are averaged, and an interval is given from MIN_VALUES folds on.
    """
    by_fold: dict[int, list[float]] = {}
    for fold, value in values:
        by_fold.setdefault(fold, []).append(value)
    means = [math.fsum(sorted(by_fold[fold])) / len(by_fold[fold]) for fold in sorted(by_fold)]
    runs, over_folds = interval([value for _, value in values], bounds), interval(means)
    if runs is None or over_folds is None:
        return None
    count, mean = over_folds.n, over_folds.mean
    low = high = None
    if over_folds.std is not None and count >= MIN_VALUES:
        half = t_quantile(count - 1) * over_folds.std * math.sqrt(1 / count + 1 / (folds - 1))
        low, high = max(mean - half, bounds[0]), min(mean + half, bounds[1])
    return dataclasses.replace(runs, mean=mean, low=low, high=high)


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
    from scipy import special

    return float(special.stdtrit(degrees, 1 - LEVEL / 2))


@dataclass(frozen=True)
class PairedTest:
    """Two configurations on the same images: A's accuracy minus B's, its 95 % interval, a p value.

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
    p = 1.0
    if only_a != only_b:  # twice "at most as few" minus "exactly as few"
        at_most, below = (float(special.bdtr(k, total, 0.5)) for k in (fewer, fewer - 1))
        p = min(1.0, at_most + (below if fewer else 0.0))
    centre = (only_a - only_b) / (images + 2)
    variance = ((total + 1) / (images + 2) - centre**2) / (images + 2)
    width = 1.96 * math.sqrt(variance)
    difference = (only_a - only_b) / images
    low, high = centre - width, centre + width
    return PairedTest("McNemar, mid-p", images, (1, 1), only_a, only_b, difference, low, high, p)


def seeds_test(a: Right, b: Right) -> PairedTest:
    """Compare two groups with two or more seeds each: right answers (seeds, N) and (seeds, N).

    A t test whose variance is that between A's seeds, that between B's and that between images,
    with Satterthwaite's degrees of freedom: it keeps its level with two or three seeds, where a
    bootstrap over seeds does not.
    """
    (seeds_a, images), seeds_b = a.shape, len(b)
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    per_image = mean_a - mean_b
    parts = (
        (float(a.mean(axis=1).var(ddof=1)) / seeds_a, seeds_a - 1),
        (float(b.mean(axis=1).var(ddof=1)) / seeds_b, seeds_b - 1),
        (float(per_image.var(ddof=1)) / images if images > 1 else 0.0, max(images - 1, 1)),
    )
    return _t_test(
        "paired t over seeds and images",
        images,
        (seeds_a, seeds_b),
        images * float((mean_a * (1 - mean_b)).mean()),
        images * float((mean_b * (1 - mean_a)).mean()),
        float(per_image.mean()),
        *_welch(parts),
    )


def folds_test(
    a: Mapping[bytes, Right], b: Mapping[bytes, Right], training_images: int
) -> PairedTest:
    """Compare two configurations trained on the same folds: right answers (runs, N) by fold.

    The corrected resampled t test (Nadeau and Bengio 2003): the training sets of two folds overlap,
    so the variance of the mean difference over k folds is that of the differences times
    1/k + n_validation / n_training instead of 1/k. The runs of one fold (its seeds) are averaged.
    """
    folds = [fold for fold in a if fold in b]
    differences = np.array([float(a[fold].mean() - b[fold].mean()) for fold in folds])
    sizes = [a[fold].shape[1] for fold in folds]
    images, size = sum(sizes), sum(sizes) / len(folds)
    variance = float(differences.var(ddof=1)) * (1 / len(folds) + size / training_images)
    means = [(a[fold].mean(axis=0), b[fold].mean(axis=0)) for fold in folds]
    return _t_test(
        f"corrected resampled t over {len(folds)} folds",
        images,
        (sum(len(a[fold]) for fold in folds), sum(len(b[fold]) for fold in folds)),
        math.fsum(float((one * (1 - other)).sum()) for one, other in means),
        math.fsum(float((other * (1 - one)).sum()) for one, other in means),
        float(differences.mean()),
        variance,
        len(folds) - 1,
    )


def _t_test(
    method: str,
    images: int,
    seeds: tuple[int, int],
    only_a: float,
    only_b: float,
    difference: float,
    variance: float,
    degrees: float,
) -> PairedTest:
    """Return the t test of a difference with this variance and degrees of freedom."""
    from scipy import special

    width, p = 0.0, 1.0 if difference == 0 else 0.0
    if variance:
        p = 2 * float(special.stdtr(degrees, -abs(difference) / math.sqrt(variance)))
        width = t_quantile(degrees) * math.sqrt(variance)
    low, high = difference - width, difference + width
    return PairedTest(method, images, seeds, only_a, only_b, difference, low, high, p)


def in_order(predictions: Predictions) -> Predictions:
    """Return predictions in the order of their images' indices."""
    order = np.argsort(predictions.indices, kind="stable")
    logits, labels, indices = predictions.logits, predictions.labels, predictions.indices
    return Predictions(logits[order], labels[order], indices[order])


def right_answers(predictions: Sequence[Predictions]) -> dict[bytes, Right]:
    """Return which images the runs of one group get right, (runs, N) for each set of images.

    A key stands for a set: indices and labels. Images are put in the order of their indices.
    """
    sets: dict[bytes, list[Right]] = {}
    for run in map(in_order, predictions):
        images = np.stack([run.indices, run.labels]).astype(np.int64)
        sets.setdefault(images.tobytes(), []).append(run.predicted == run.labels)
    return {images: np.stack(rows) for images, rows in sets.items()}


def compare(
    a: Sequence[Predictions], b: Sequence[Predictions], training_images: int | None = None
) -> PairedTest:
    """Test two configurations by the predictions of their runs; UsageError on different images.

    With one run on a side the first runs are compared, by McNemar's test. Runs that were scored on
    several sets of images are compared by folds, which needs the number of `training_images` of a
    fold.
    """
    right_a, right_b = right_answers(a), right_answers(b)
    shared = [images for images in right_a if images in right_b]
    if len(right_a) == len(right_b) == len(shared) == 1:
        one, other = right_a[shared[0]], right_b[shared[0]]
        if min(len(one), len(other)) > 1:
            return seeds_test(one, other)
        return mcnemar(one[0], other[0])
    if len(shared) > 1 and training_images:
        return folds_test(right_a, right_b, training_images)
    if max(len(right_a), len(right_b)) > 1:
        raise UsageError("its runs were scored on different images")
    raise UsageError("they were scored on different images")


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
