"""The written rule by which a report's figure is set against measured ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cifar_lab.config import ClaimConfig, RunConfig
from cifar_lab.measures import show_difference, show_width
from cifar_lab.significance import Interval, difference_of_means, interval, t_quantile

SEEDS_FOR_A_VERDICT = 3

Word = Literal[
    "reproduced",
    "consistent",
    "differs",
    "differs so far",
    "cannot be judged",
    "not measured yet",
]


@dataclass(frozen=True)
class Verdict:
    """A word of the rule, and the reason in a few more."""

    word: Word
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.word} ({self.reason})" if self.reason else self.word


def judge(
    claim: ClaimConfig, config: RunConfig, values: Sequence[float], others: Sequence[float] = ()
) -> Verdict:
    """Return the verdict on a claim, given one measured value per seed.

    Cannot be judged: `study.hinges_on` names a guess that decides the figure. With three seeds or
    more: reproduced if the reported figure lies in the 95 % prediction interval for one more run,
    mean ± t * s * sqrt(1 + 1/n), with the binomial variance added where the validation images are
    drawn at random (a report's draw is not ours); else differs. With fewer: consistent within the
    claim's tolerance, else differs so far.

    What a report says in words: of a bound, the 95 % interval of the mean, and of a comparison with
    `others`, that of the difference (Welch), must lie on the right side (reproduced) or on the
    wrong one (differs). Otherwise, and with fewer seeds, the mean alone decides between consistent
    and differs so far.
    """
    found = interval(values)
    if found is None or (claim.above and not others):
        return Verdict("not measured yet")
    if claim.above:
        return _compare(claim, config, values, others)
    if claim.value is None:
        return _bound(claim, config, found)
    off = found.mean - claim.value
    off_by = f"off by {show_difference(claim.metric, off)}"
    if config.study.hinges_on:
        return Verdict("cannot be judged", f"{config.study.hinges_on} guessed; {off_by}")
    if found.n < SEEDS_FOR_A_VERDICT or found.std is None:
        if claim.tolerance is None:
            return Verdict("cannot be judged", f"no tolerance and {found.n} seed")
        near = abs(off) <= claim.tolerance * (1 + 1e-9)
        tolerance = show_width(claim.metric, claim.tolerance)
        reason = f"{off_by}, tolerance ±{tolerance}, n = {found.n}"
        return Verdict("consistent" if near else "differs so far", reason)
    half = prediction_half_width(claim, config, values)
    within = show_width(claim.metric, half)
    reason = f"{off_by}, one more run within ±{within}, n = {found.n}"
    return Verdict("reproduced" if abs(off) <= half else "differs", reason)


def _bound(claim: ClaimConfig, config: RunConfig, found: Interval) -> Verdict:
    """Judge `at_least` and `at_most`; `over` is how far the mean lies on the right side."""
    sign, bound = (1, claim.at_least) if claim.at_least is not None else (-1, claim.at_most)
    assert bound is not None
    over = sign * (found.mean - bound)
    size = show_width(claim.metric, abs(over))
    side = f"{size} {'on the right side' if over >= 0 else 'short of it'}"
    if config.study.hinges_on:
        return Verdict("cannot be judged", f"{config.study.hinges_on} guessed; {side}")
    half = found.half_width if found.n >= SEEDS_FOR_A_VERDICT else None
    if half is not None and abs(over) >= half:
        word: Word = "reproduced" if over >= 0 else "differs"
        width = show_width(claim.metric, half)
        return Verdict(word, f"{side}, interval ±{width}, n = {found.n}")
    near = over >= -(claim.tolerance or 0.0) * (1 + 1e-9)
    return Verdict("consistent" if near else "differs so far", f"{side}, n = {found.n}")


def _compare(
    claim: ClaimConfig, config: RunConfig, values: Sequence[float], others: Sequence[float]
) -> Verdict:
    """Judge `above`: whether the measure is higher than in the other runs."""
    difference, half = difference_of_means(values, others)
    seeds = f"n = {len(values)} and {len(others)}"
    shown = f"difference {show_difference(claim.metric, difference)}"
    if config.study.hinges_on:
        return Verdict("cannot be judged", f"{config.study.hinges_on} guessed; {shown}")
    if min(len(values), len(others)) >= SEEDS_FOR_A_VERDICT and half is not None:
        if abs(difference) > half:
            return Verdict("reproduced" if difference > 0 else "differs", f"{shown}, {seeds}")
        shown += f" within chance (±{show_width(claim.metric, half)})"
    return Verdict("consistent" if difference > 0 else "differs so far", f"{shown}, {seeds}")


def prediction_half_width(claim: ClaimConfig, config: RunConfig, values: Sequence[float]) -> float:
    """Return half the width of the 95 % prediction interval for one more run's value."""
    found = interval(values)
    if found is None or found.std is None:
        raise ValueError("a prediction interval needs at least two values")
    variance = found.std**2 * (1 + 1 / found.n)
    split = config.split
    drawn = split.method in ("random", "stratified") and split.validation > 0
    if drawn and "val_accuracy" in claim.metric:
        size = config.dataset.train_size or 0
        images = split.validation if split.validation >= 1 else split.validation * size
        variance += found.mean * (1 - found.mean) / max(images, 1)
    return t_quantile(found.n - 1) * math.sqrt(variance)
