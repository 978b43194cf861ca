"""What reports claim beside what runs measured: each claim matched to its runs, and judged, here.

A claim of a study speaks of the settings that fit its `where`. It is judged by the finished runs of
such a setting, one value per seed, by one written rule (see `judge`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, variance
from typing import Any, Literal

from cifar_lab.analysis import run_metrics
from cifar_lab.analysis.load_runs import FoundRun, show_value
from cifar_lab.analysis.run_metrics import show_difference, show_interval, show_width
from cifar_lab.analysis.seed_groups import RunCollection, SeedGroup
from cifar_lab.analysis.statistics import (
    MIN_VALUES,
    Interval,
    difference_of_means,
    interval,
    t_quantile,
)
from cifar_lab.config.run_config import RunConfig, flatten, to_plain
from cifar_lab.config.study_config import ClaimConfig
from cifar_lab.errors import UsageError

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


@dataclass(frozen=True)
class Candidate:
    """A setting that claims may speak of: its config (of any seed) and its runs, one per seed.

    `lengths`: where the report does not say how long it trained, the runs of the same setting by
    their number of epochs, three seeds or more of each.
    """

    config: RunConfig
    runs: tuple[FoundRun, ...]
    lengths: Mapping[int, tuple[FoundRun, ...]] = field(default_factory=dict)

    @cached_property
    def flat(self) -> dict[str, Any]:
        """The config's values by dotted key."""
        return flatten(to_plain(self.config))

    def values(self, metric: str) -> dict[FoundRun, float]:
        """Return a metric of each finished run that has it."""
        found = {run: run.metric(metric) for run in self.runs if run.finished}
        return {run: value for run, value in found.items() if value is not None}


@dataclass(frozen=True)
class JudgedClaim:
    """A claim beside the runs of one setting; `config` is None where no setting fits the claim.

    `values`: the claim's metric by run; `others`: that of the runs which `above` compares with;
    `by_epochs`: the metric of runs of other lengths, where the report does not give the epochs.
    """

    claim: ClaimConfig
    config: RunConfig | None
    values: Mapping[FoundRun, float]
    others: Mapping[FoundRun, float]
    problem: str = ""
    by_epochs: Mapping[int, Mapping[FoundRun, float]] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """The metric that is measured."""
        return metric_of(self.claim, self.config) if self.config else self.claim.metric

    @property
    def values_by_epochs(self) -> dict[int, list[float]]:
        """The values of `by_epochs`, one per seed."""
        return {epochs: list(found.values()) for epochs, found in self.by_epochs.items()}

    @cached_property
    def interval(self) -> Interval | None:
        """Mean and interval of the measured values."""
        return interval(list(self.values.values()), run_metrics.bounds(self.metric))

    @cached_property
    def verdict(self) -> Verdict:
        """What the rule says."""
        if self.config is None:
            return Verdict("cannot be judged" if self.problem else "not measured yet", self.problem)
        if self.by_epochs and self.claim.value is not None:
            return judge_by_epochs(self.claim, self.values_by_epochs)
        return judge(
            self.claim, self.config, list(self.values.values()), list(self.others.values())
        )

    @property
    def off(self) -> float | None:
        """Measured minus reported, or minus the others' mean; None where there is nothing."""
        found, compared = self.interval, interval(list(self.others.values()))
        if found is None:
            return None
        if self.claim.above:
            return found.mean - compared.mean if compared else None
        return None if self.claim.value is None else found.mean - self.claim.value

    @property
    def source(self) -> str:
        """Where the report says it, with its words and our note."""
        claim = self.claim
        return "; ".join(filter(None, [claim.says, claim.source, claim.note]))


def match(
    claim: ClaimConfig, candidate: Candidate, every: Sequence[Candidate]
) -> JudgedClaim | None:
    """Return a claim judged by a setting's runs, None if it does not speak of that setting.

    `every`: the settings that the claim's `above` may compare with.
    """
    config = candidate.config
    if not _fits(candidate.flat, claim.where):
        return None
    others: dict[FoundRun, float] = {}
    for other in every if claim.above else ():
        if _fits(other.flat, _where_of_others(claim, config)):
            others |= other.values(metric_of(claim, other.config))
    metric = metric_of(claim, config)
    by_epochs = {
        epochs: values
        for epochs, runs in candidate.lengths.items()
        if len(values := Candidate(config, runs).values(metric)) >= MIN_VALUES
    }
    return JudgedClaim(claim, config, candidate.values(metric), others, by_epochs=by_epochs)


def of_collection(
    collection: RunCollection,
) -> list[tuple[str, SeedGroup | None, JudgedClaim]]:
    """Return each claim of the runs of a collection: its report, its setting (if any), judged.

    Runs of one setting that belong to different experiments are judged apart.
    """
    settings: dict[tuple[str, str], list[tuple[SeedGroup, Candidate]]] = {}
    claims: dict[tuple[str, ...], tuple[tuple[str, str], ClaimConfig]] = {}
    for setting in collection.settings:
        runs: dict[tuple[str, str], list[FoundRun]] = {}
        for run in setting.runs:
            study = (run.config.study.report or "", run.config.name)
            runs.setdefault(study, []).append(run)
            for claim in run.config.study.claims:
                claims.setdefault((*study, *_identity(claim)), (study, claim))
        for study, chosen in runs.items():
            candidate = Candidate(chosen[0].config, tuple(chosen))
            settings.setdefault(study, []).append((setting, candidate))
    every = [candidate for found in settings.values() for _, candidate in found]
    rows: list[tuple[str, SeedGroup | None, JudgedClaim]] = []
    for study, claim in claims.values():
        report = study[0] or study[1]
        problem = _unknown_metric(claim)
        matched = [
            (report, setting, judged)
            for setting, candidate in settings[study]
            if not problem and (judged := match(claim, candidate, every)) is not None
        ]
        rows += matched or [(report, None, JudgedClaim(claim, None, {}, {}, problem))]
    return rows


def _unknown_metric(claim: ClaimConfig) -> str:
    try:
        run_metrics.check(claim.metric)
    except UsageError as error:
        return str(error)
    return ""


def metric_of(claim: ClaimConfig, config: RunConfig) -> str:
    """Return the claim's metric; the sound protocol scores the weights that validation chose."""
    if config.protocol == "sound":
        return claim.metric.replace("test_accuracy_last", "test_accuracy")
    return claim.metric


def speaks_of(claim: ClaimConfig, config: RunConfig) -> bool:
    """Whether a run has the config values of the claim's `where`."""
    return _fits(flatten(to_plain(config)), claim.where)


def is_other(claim: ClaimConfig, config: RunConfig, other: RunConfig) -> bool:
    """Whether `other` is a run that the claim's `above` compares those like `config` with."""
    where = _where_of_others(claim, config)
    return bool(claim.above) and _fits(flatten(to_plain(other)), where)


def reported(claim: ClaimConfig) -> str:
    """Return what the report says: a figure, a bound, or what it compares with."""
    if claim.above:
        return f"more than with {show_where(claim.above)}"
    for words, value in (("at least ", claim.at_least), ("at most ", claim.at_most)):
        if value is not None:
            return words + run_metrics.show(claim.metric, value)
    return run_metrics.show(claim.metric, claim.value)


def show_where(where: Mapping[str, Any]) -> str:
    """Return config values as the shell takes them: `optimizer=adam, optimizer.lr=0.001`."""
    return ", ".join(
        f"{key.removeprefix('choices.')}={show_value(value)}" for key, value in where.items()
    )


def _where_of_others(claim: ClaimConfig, config: RunConfig) -> dict[str, Any]:
    above = claim.above or {}
    same = {} if "name" in above else {"name": config.name, **claim.where}
    return {"protocol": config.protocol, **same, **above}


def _fits(flat: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    return all(key in flat and _same(flat[key], value) for key, value in where.items())


def _same(a: Any, b: Any) -> bool:
    return show_value(a) == show_value(b) or a == b


def _identity(claim: ClaimConfig) -> tuple[str, ...]:
    where = (f"{key}={show_value(value)}" for key, value in sorted(claim.where.items()))
    return (claim.id or "", claim.metric, claim.source, *where)


# --- the rule -------------------------------------------------------------------------------------


def judge(
    claim: ClaimConfig, config: RunConfig, values: Sequence[float], others: Sequence[float] = ()
) -> Verdict:
    """Return the verdict on a claim, given one measured value per seed.

    Cannot be judged: `study.hinges_on` names a guess that decides the figure (for the number of
    epochs, see `judge_by_epochs`). With three seeds or more: reproduced if the reported figure lies
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
        return _compare(claim, config, values, others)
    if claim.value is None:
        return _bound(claim, config, found)
    off = found.mean - claim.value
    off_by = f"off by {show_difference(claim.metric, off)}"
    if config.study.hinges_on:
        return Verdict("cannot be judged", f"{config.study.hinges_on} guessed; {off_by}")
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


def judge_by_epochs(claim: ClaimConfig, values: Mapping[int, Sequence[float]]) -> Verdict:
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


def reproduced_at(claim: ClaimConfig, values: Mapping[int, Sequence[float]]) -> list[int]:
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


def _bound(claim: ClaimConfig, config: RunConfig, found: Interval) -> Verdict:
    """Judge `at_least` and `at_most`; `over` is how far the mean lies on the right side."""
    sign, bound = (1, claim.at_least) if claim.at_least is not None else (-1, claim.at_most)
    assert bound is not None
    over = sign * (found.mean - bound)
    size = show_width(claim.metric, abs(over))
    side = f"{size} {'on the right side' if over >= 0 else 'short of it'}"
    if config.study.hinges_on:
        return Verdict("cannot be judged", f"{config.study.hinges_on} guessed; {side}")
    if found.low is not None and found.high is not None and not found.low < bound < found.high:
        shown = show_interval(claim.metric, found)
        return Verdict("reproduced" if over >= 0 else "differs", f"{side}, {shown}, n = {found.n}")
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
    if min(len(values), len(others)) >= MIN_VALUES and half is not None:
        if abs(difference) > half:
            return Verdict("reproduced" if difference > 0 else "differs", f"{shown}, {seeds}")
        shown += f" within chance (±{show_width(claim.metric, half)})"
    return Verdict("consistent" if difference > 0 else "differs so far", f"{shown}, {seeds}")


def prediction_half_width(claim: ClaimConfig, config: RunConfig, values: Sequence[float]) -> float:
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
