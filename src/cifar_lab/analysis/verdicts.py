"""The rule by which a report's claim is judged: what a number of measured values says of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Literal

from cifar_lab.analysis import run_metrics
from cifar_lab.analysis.run_metrics import show_difference, show_interval, show_width
from cifar_lab.analysis.statistics import (
    MIN_VALUES,
    Interval,
    difference_of_means,
    interval,
    t_quantile,
)
from cifar_lab.config.reports import Claim
from cifar_lab.config.run_config import RunConfig

Word = Literal[
    "reproduced",
    "reproduced at some epochs",
    "consistent",
    "differs",
    "differs so far",
    "differs at all epochs",
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
    claim: Claim,
    config: RunConfig,
    values: Sequence[float],
    others: Sequence[float] = (),
    *,
    hinges_on: str | None = None,
) -> Verdict:
    """Return the verdict on a claim, given one measured value per seed.

    Cannot be judged: `hinges_on` names a guess that decides the figure (for the number of epochs,
    see `judge_by_epochs`). With three seeds or more: reproduced if the reported figure lies
    in the 95 % prediction interval for one more run, mean ± t * s * sqrt(1 + 1/n), with the
    binomial variance added where the validation images are drawn at random (a report's draw is not
    ours); else differs. With fewer: consistent within the claim's tolerance, else differs so far.

    What a report says in words: of a bound, the 95 % interval of the mean, and of a comparison with
    `others`, that of the difference (Welch), must lie on the right side (reproduced) or on the
    wrong one (differs). Otherwise, and with fewer seeds, the mean alone decides between consistent
    and differs so far.
    """
    found = interval(values, run_metrics.bounds(claim.metric))
    if found is None or (claim.above and not others):
        return Verdict("not measured yet")
    if claim.above:
        return _compare(claim, values, others, hinges_on)
    if claim.value is None:
        return _bound(claim, found, hinges_on)
    off = found.mean - claim.value
    off_by = f"off by {show_difference(claim.metric, off)}"
    if hinges_on:
        return Verdict("cannot be judged", f"{hinges_on} guessed; {off_by}")
    if found.n < MIN_VALUES or found.std is None:
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


def judge_by_epochs(claim: Claim, values: Mapping[int, Sequence[float]]) -> Verdict:
    """Return the verdict on a figure of a report that does not say how long it trained.

    `values`: one measured value per seed (three or more) for each number of epochs. The figure is
    reproduced at the numbers of epochs whose prediction interval for one more run contains it, as
    in `judge`, but with the variance of the seeds pooled over all numbers of epochs: three seeds
    alone say little about it. Where there is none, the figure differs at all of them.
    """
    assert claim.value is not None
    off = {epochs: fmean(found) - claim.value for epochs, found in sorted(values.items())}
    measured = f"{min(off)} to {max(off)}"
    n = min(len(found) for found in values.values())
    if fits := reproduced_at(claim, values):
        return Verdict(
            "reproduced at some epochs", f"{spans(fits, list(off))} of {measured}, n = {n}"
        )
    nearest = min(off, key=lambda epochs: abs(off[epochs]))
    off_by = show_difference(claim.metric, off[nearest])
    reason = f"{measured}: least at {nearest}, off by {off_by}, n = {n}"
    return Verdict("differs at all epochs", reason)


def reproduced_at(claim: Claim, values: Mapping[int, Sequence[float]]) -> list[int]:
    """Return the numbers of epochs at which a figure is reproduced."""
    assert claim.value is not None
    freedom = sum(len(found) - 1 for found in values.values())
    pooled = sum((len(found) - 1) * variance(found) for found in values.values()) / freedom
    t = t_quantile(freedom)
    return [
        epochs
        for epochs, found in sorted(values.items())
        if abs(fmean(found) - claim.value) <= t * math.sqrt(pooled * (1 + 1 / len(found)))
    ]


def spans(chosen: Sequence[int], of: Sequence[int]) -> str:
    """Return some of the numbers in words: `22, 26 to 30`."""
    return ", ".join(f"{a} to {b}" if a != b else f"{a}" for a, b in neighbours(chosen, of))


def neighbours(chosen: Sequence[int], of: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and the last of each group of chosen numbers that are next to each other."""
    groups: list[tuple[int, int]] = []
    for before, number in zip([None, *of], of, strict=False):
        if number not in chosen:
            continue
        if groups and groups[-1][1] == before:
            groups[-1] = (groups[-1][0], number)
        else:
            groups.append((number, number))
    return groups


def _bound(claim: Claim, found: Interval, hinges_on: str | None) -> Verdict:
    """Judge `at_least` and `at_most`; `over` is how far the mean lies on the right side."""
    sign, bound = (1, claim.at_least) if claim.at_least is not None else (-1, claim.at_most)
    assert bound is not None
    over = sign * (found.mean - bound)
    size = show_width(claim.metric, abs(over))
    side = f"{size} {'on the right side' if over >= 0 else 'short of it'}"
    if hinges_on:
        return Verdict("cannot be judged", f"{hinges_on} guessed; {side}")
    if found.low is not None and found.high is not None and not found.low < bound < found.high:
        shown = show_interval(claim.metric, found)
        return Verdict("reproduced" if over >= 0 else "differs", f"{side}, {shown}, n = {found.n}")
    near = over >= -(claim.tolerance or 0.0) * (1 + 1e-9)
    return Verdict("consistent" if near else "differs so far", f"{side}, n = {found.n}")


def _compare(
    claim: Claim, values: Sequence[float], others: Sequence[float], hinges_on: str | None
) -> Verdict:
    """Judge `above`: whether the measure is higher than in the other runs."""
    difference, half = difference_of_means(values, others)
    seeds = f"n = {len(values)} and {len(others)}"
    shown = f"difference {show_difference(claim.metric, difference)}"
    if hinges_on:
        return Verdict("cannot be judged", f"{hinges_on} guessed; {shown}")
    if min(len(values), len(others)) >= MIN_VALUES and half is not None:
        if abs(difference) > half:
            return Verdict("reproduced" if difference > 0 else "differs", f"{shown}, {seeds}")
        shown += f" within chance (±{show_width(claim.metric, half)})"
    return Verdict("consistent" if difference > 0 else "differs so far", f"{shown}, {seeds}")


def prediction_half_width(claim: Claim, config: RunConfig, values: Sequence[float]) -> float:
    """Return half the width of the 95 % prediction interval for one more run's value."""
    found = interval(values)
    if found is None or found.std is None:
        raise ValueError("a prediction interval needs at least two values")
    expected = found.std**2 * (1 + 1 / found.n)
    split = config.split
    drawn = split.method in ("random", "stratified") and split.validation > 0
    if drawn and "val_accuracy" in claim.metric:
        size = config.dataset.train_size or 0
        expected += found.mean * (1 - found.mean) / max(split.held_out(size), 1)
    return t_quantile(found.n - 1) * math.sqrt(expected)
