"""The rule by which a report's claim is judged: what a number of measured values says of it.

A report's figure comes from one run. With seeds enough, our mean is as exact as we like, but that
one run stays one run: so a figure is *reproduced* where our mean is the same within a margin that
was stated beforehand (two one-sided tests, Schuirmann 1987), and *differs* only where one more run
of ours would not give it. More seeds sharpen either; none makes a verdict by being unsure.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any, Literal

import numpy as np

from cifar_lab.analysis.contrasts import Deviation, welch
from cifar_lab.analysis.run_metrics import show_difference, show_width
from cifar_lab.analysis.statistics import LEVEL, holm, variance
from cifar_lab.config.reports import Claim

Settled = Literal["reproduced", "holds", "differs", "contradicted"]
Word = Literal[Settled, "inconclusive", "not judged", "not measured yet"]

CONFIRMED: tuple[Word, ...] = ("reproduced", "holds")
REFUTED: tuple[Word, ...] = ("differs", "contradicted")

_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Verdict:
    """A word of the rule, and the reason in a few more.

    `p_confirmed` is the p value against "not the same" (or "does not hold"), `p_refuted` against
    "the same recipe" (or "holds"); both are 1 where nothing was tested.
    """

    word: Word
    reason: str = ""
    p_confirmed: float = 1.0
    p_refuted: float = 1.0

    def __str__(self) -> str:
        return f"{self.word} ({self.reason})" if self.reason else self.word


@dataclass(frozen=True)
class Estimate:
    """How far a measured mean is off a reference, with the variance of that, and of a single run.

    `n` runs at least stand behind it; with k times as many, its variance is k times smaller.
    """

    off: float
    variance: float
    single: float
    degrees: float
    n: int

    def half(self, level: float, single: float = 0.0) -> float:
        """Return half the width of the interval that leaves out `level`; for a `single` run, too.

        Of the mean by default; with the variance of a run, the interval for one more run.
        """
        from scipy import special

        quantile = float(special.stdtrit(self.degrees, 1 - level / 2))
        return quantile * math.sqrt(self.variance + single)

    def p_beyond(self, distance: float, single: float = 0.0) -> float:
        """Return the probability that chance alone takes it so far, to one side."""
        from scipy import special

        return float(special.stdtr(self.degrees, -distance / math.sqrt(self.variance + single)))


def pooled_deviation(groups: Sequence[Mapping[Any, float]]) -> Deviation | None:
    """Return the deviation of runs from the mean of their group, over all groups.

    A group maps each run's unit to its value. Runs that continue each other have one unit in
    several groups (a group for each number of epochs): they deviate alike, and count as one. Their
    correlation r within a unit is estimated by the method of moments, and the degrees of freedom
    are Satterthwaite's for the variance of such data: with S seeds of L lengths, L(S - 1) if r is
    0, and S - 1 if r is 1. A group whose values are all equal is left out: values that are cut off
    (the last epoch) do not say how much runs vary. None where no group is left.
    """
    groups = [group for group in groups if variance(list(group.values()))]
    if not groups:
        return None
    rows = [(g, unit, value) for g, of in enumerate(groups) for unit, value in of.items()]
    values = np.array([value for *_, value in rows])
    degrees = len(values) - len(groups)
    # a[i, j]: subtracts the mean of the group; k[i, j]: whether i and j are one unit
    same, k = (np.array([[p[i] == q[i] for q in rows] for p in rows], float) for i in (0, 1))
    a = np.eye(len(values)) - same / same.sum(axis=1, keepdims=True)
    residuals = a @ values
    mean_square = float(residuals @ residuals) / degrees
    together = float(np.trace(a @ k @ a @ k))
    r = 0.0
    if together > degrees + 1e-9:
        product = float(residuals @ k @ residuals) / mean_square
        r = min(max((product - degrees) / (together - degrees), 0.0), 1.0)
    return Deviation(math.sqrt(mean_square), degrees**2 / (degrees * (1 - r**2) + together * r**2))


def judge(
    claim: Claim,
    values: Sequence[float],
    others: Sequence[float] = (),
    *,
    deviation: Deviation | None,
    other_deviation: Deviation | None = None,
    missing: int = 0,
) -> Verdict:
    """Return the verdict on a claim, given one measured value per seed.

    `deviation` is that of single runs, `other_deviation` that of `others`, which `above` compares
    with; None for the latter: the same, pooled. A reported difference comes as differences by seed.
    `missing` counts finished runs in which the measured event did not happen.

    A figure is reproduced if the 90 % interval of (mean - reported) lies within its margin and
    rounding. It differs if the mean is outside, and the reported value, rounding included, is
    outside the 95 % interval for one more run. What the report says in words holds, or is
    contradicted, if the 95 % interval of the difference lies on one side. All else is inconclusive.
    """
    if not values or (claim.above and claim.value is None and not others):
        return Verdict("not measured yet")
    if claim.not_judged:
        return Verdict("not judged", claim.not_judged)
    if missing:
        total = missing + len(values)
        return Verdict("inconclusive", f"in {missing} of {total} runs it did not happen")
    if deviation is None:
        reason = "runs that are single or all equal do not say how much chance moves them"
        return Verdict("inconclusive", reason)
    # How far the mean is off, positive on the side that the report's words ask for.
    mean, n, variance, degrees = fmean(values), len(values), deviation.std**2, deviation.degrees
    of_mean = variance / n
    if claim.above and claim.value is None:
        off, n = mean - fmean(others), min(n, len(others))
        if other_deviation is None:
            of_mean += variance / len(others)
        else:
            of_others = other_deviation.std**2 / len(others), other_deviation.degrees
            error, degrees = welch([(of_mean, degrees), of_others])
            of_mean = error**2
    else:
        reference = next(v for v in (claim.value, claim.at_least, claim.at_most) if v is not None)
        off = mean - reference if claim.at_most is None else reference - mean
    return _test(claim, Estimate(off, of_mean, variance, degrees, n))


def _test(claim: Claim, estimate: Estimate) -> Verdict:
    """Return the word of the rule with the numbers that decide it, and both p values."""
    word, off, metric = _word(claim, estimate), estimate.off, claim.metric
    if claim.value is None or claim.margin is None:
        shown = [
            f"difference {show_difference(metric, off)}",
            f"95 % interval ±{show_width(metric, estimate.half(LEVEL))}",
        ]
        p = min(1.0, 2 * estimate.p_beyond(abs(off)))
        confirmed, refuted = (p, 1.0) if off > 0 else (1.0, p)
    else:
        room, apart = claim.margin.size + claim.rounding, abs(off) - claim.rounding
        shown = [
            f"off by {show_difference(metric, off)}",
            f"90 % interval ±{show_width(metric, estimate.half(2 * LEVEL))}",
            f"margin ±{show_width(metric, room)}",
        ]
        if word != "reproduced":
            within = estimate.half(LEVEL, estimate.single)
            shown.append(f"one more run within ±{show_width(metric, within)}")
        confirmed = estimate.p_beyond(room - abs(off))
        refuted = min(1.0, 2 * estimate.p_beyond(max(apart, 0.0), estimate.single))
    shown.append(f"n = {estimate.n}, {estimate.degrees:.3g} df")
    if word == "inconclusive":
        shown.append(_settling(claim, estimate))
    return Verdict(word, ", ".join(shown), confirmed, refuted)


def _word(claim: Claim, estimate: Estimate) -> Word:
    """Return what the intervals say: of a printed number, or of a bound or comparison."""
    if claim.value is None or claim.margin is None:
        if abs(estimate.off) <= estimate.half(LEVEL):
            return "inconclusive"
        return "holds" if estimate.off > 0 else "contradicted"
    apart = abs(estimate.off) - claim.rounding
    if apart + estimate.half(2 * LEVEL) <= claim.margin.size:
        return "reproduced"
    if apart > max(claim.margin.size, estimate.half(LEVEL, estimate.single)):
        return "differs"
    return "inconclusive"


def _settling(claim: Claim, estimate: Estimate) -> str:
    """Say how many seeds would settle a claim, were mean and deviation to stay as they are."""
    for n in range(estimate.n + 1, _MOST_SEEDS + 1):
        variance, degrees = estimate.variance * estimate.n / n, estimate.degrees * n / estimate.n
        with_n = replace(estimate, variance=variance, degrees=degrees, n=n)
        if _word(claim, with_n) != "inconclusive":
            return f"{n} seeds would settle it"
    if claim.margin and abs(estimate.off) - claim.rounding >= claim.margin.size:
        return "no number would: a single run, as the report's, scatters by more than the margin"
    return f"more than {_MOST_SEEDS:,} seeds would be needed to settle it"


def joint(verdicts: Sequence[Verdict]) -> str:
    """Return one sentence about all verdicts of a report, adjusted for their number (Holm 1979).

    What is settled at 5 % each may be settled by chance among many; Holm's adjustment keeps the
    probability of even one such chance below 5 %, for those that are confirmed, and for those that
    are refuted.
    """
    judged = [v for v in verdicts if v.word not in ("not judged", "not measured yet")]
    counts = Counter(v.word for v in judged)
    words: tuple[Word, ...] = (*CONFIRMED, *REFUTED, "inconclusive")
    said = ", ".join(f"{counts[word]} {word}" for word in words if counts[word])
    remaining = []
    for name, kind, p_values in (
        ("confirmed", CONFIRMED, [v.p_confirmed for v in judged]),
        ("refuted", REFUTED, [v.p_refuted for v in judged]),
    ):
        adjusted = zip(judged, holm(p_values), strict=True)
        left = sum(v.word in kind and p < LEVEL for v, p in adjusted)
        if total := sum(counts[word] for word in kind):
            remaining.append(f"{left} of the {total} {name}")
    sentence = f"Of {len(judged)} figures and findings that do not follow from each other: {said}."
    if remaining:
        sentence += f" Adjusted for their number (Holm), {' and '.join(remaining)} remain."
    return sentence if len(judged) > 1 else ""


@dataclass(frozen=True)
class EpochStudy:
    """The accuracy that a report gives, beside runs of each length.

    `values`: for each number of epochs, the accuracy by seed. A longer run may continue a shorter
    one of its seed, so that a seed deviates alike at all lengths: it counts once.
    """

    claim: Claim
    values: Mapping[int, Mapping[int, float]]

    @cached_property
    def estimates(self) -> dict[int, Estimate]:
        """How far the mean is off the report's, and the variance of a run, at each length."""
        value = self.claim.value or 0.0
        deviation = pooled_deviation(list(self.values.values())) or Deviation(0.0, 1.0)
        estimates = {}
        for epochs, values in self.values.items():
            off, n, variance = fmean(values.values()) - value, len(values), deviation.std**2
            estimates[epochs] = Estimate(off, variance / n, variance, deviation.degrees, n)
        return estimates

    @property
    def halves(self) -> dict[int, float]:
        """Half the width of the 95 % interval for one more run at each number of epochs."""
        return {epochs: e.half(LEVEL, e.single) for epochs, e in self.estimates.items()}

    @property
    def fitting(self) -> list[int]:
        """The lengths at which one more run could have given the number in the report."""
        halves, rounding = self.halves, self.claim.rounding
        return [k for k, e in self.estimates.items() if abs(e.off) <= halves[k] + rounding]

    @property
    def nearest(self) -> int:
        """The number of epochs at which the mean is nearest to the report's."""
        return min(self.estimates, key=lambda epochs: abs(self.estimates[epochs].off))

    @property
    def fit(self) -> str:
        """Say at which lengths the accuracy fits."""
        lengths, fitting = list(self.values), self.fitting
        tried = f"{lengths[0]} to {lengths[-1]} epochs"
        if fitting and fitting != lengths:
            return f"fits from {fitting[0]} to {fitting[-1]} of {tried}"
        return f"fits at {'every' if fitting else 'no'} length tried, {tried}"

    @property
    def verdict(self) -> Verdict:
        """The length was chosen by this figure, which can therefore only differ at all lengths."""
        if not self.fitting:
            return Verdict("differs", self.fit)
        return Verdict("not judged", f"fitted to the report: {self.fit}")
