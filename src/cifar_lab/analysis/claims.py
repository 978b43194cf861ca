"""What reports claim beside what runs measured: each claim is matched to its runs, and judged.

A claim speaks of the configurations of its experiment that fit its `where`. It is judged by the
finished runs of such a configuration, one value per seed, by one written rule (see `verdicts`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cifar_lab.analysis import run_metrics
from cifar_lab.analysis.load_runs import FoundRun, show_value
from cifar_lab.analysis.seed_groups import RunCollection, SeedGroup
from cifar_lab.analysis.statistics import MIN_VALUES, Interval, interval
from cifar_lab.analysis.verdicts import Verdict, judge, judge_by_epochs
from cifar_lab.config.reports import Claim, reported_of
from cifar_lab.config.run_config import RunConfig, flatten, to_plain

Values = Mapping[FoundRun, float]
"""A metric of each run that has it."""


@dataclass(frozen=True)
class Candidate:
    """A configuration that claims may speak of: its config (of any seed) and one run per seed.

    `hinges_on`: the guesses that decide the report's numbers; `lengths`: where it does not say how
    long it trained, the runs of the same configuration by their number of epochs.
    """

    config: RunConfig
    runs: tuple[FoundRun, ...]
    hinges_on: str | None = None
    lengths: Mapping[int, tuple[FoundRun, ...]] = field(default_factory=dict)

    @cached_property
    def flat(self) -> dict[str, Any]:
        """The config's values by dotted key."""
        return flatten(to_plain(self.config))

    def values(self, claim: Claim) -> Values:
        """Return the claim's metric of each finished run that has it."""
        return _values(self.runs, metric_of(claim, self.config))


@dataclass(frozen=True)
class JudgedClaim:
    """A claim beside the runs of a configuration; `config` is None where none fits the claim.

    `values`: the claim's metric by run; `others`: that of the runs which `above` compares with;
    `hinges_on`: the guesses that decide it; `by_epochs`: the metric of runs of other lengths, where
    the report does not give the epochs.
    """

    claim: Claim
    config: RunConfig | None = None
    values: Values = field(default_factory=dict)
    others: Values = field(default_factory=dict)
    hinges_on: str | None = None
    by_epochs: Mapping[int, Values] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """The metric that is measured."""
        return metric_of(self.claim, self.config) if self.config else self.claim.metric

    @property
    def values_by_epochs(self) -> dict[int, list[float]]:
        """The values of `by_epochs`, one per seed."""
        return {epochs: list(values.values()) for epochs, values in self.by_epochs.items()}

    @cached_property
    def interval(self) -> Interval | None:
        """Mean and interval of the measured values."""
        return interval(list(self.values.values()), run_metrics.bounds(self.metric))

    @cached_property
    def verdict(self) -> Verdict:
        """What the rule says."""
        if self.config is None:
            return Verdict("not measured yet")
        if self.by_epochs and self.claim.value is not None:
            return judge_by_epochs(self.claim, self.values_by_epochs)
        values, others = list(self.values.values()), list(self.others.values())
        return judge(self.claim, self.config, values, others, hinges_on=self.hinges_on)

    @property
    def off(self) -> float | None:
        """Measured minus reported, or minus the others' mean; None where there is nothing."""
        others = interval(list(self.others.values()))
        reference = self.claim.value
        if self.claim.above:
            reference = others.mean if others else None
        return self.interval.mean - reference if self.interval and reference is not None else None

    @property
    def source(self) -> str:
        """Where the report says it, with its words and our note."""
        claim = self.claim
        return "; ".join(filter(None, [claim.says, claim.source, claim.note]))


def match(claim: Claim, candidate: Candidate, every: Sequence[Candidate]) -> JudgedClaim | None:
    """Return a claim judged by a configuration's runs, None if it does not speak of these.

    `every`: the configurations that the claim's `above` may compare with.
    """
    run_metrics.check(claim.metric)
    config = candidate.config
    if not _fits(candidate.flat, claim.where):
        return None
    others: dict[FoundRun, float] = {}
    for other in every if claim.above else ():
        if _fits(other.flat, _where_of_others(claim, config)):
            others |= other.values(claim)
    by_epochs = {
        epochs: values
        for epochs, runs in candidate.lengths.items()
        if len(values := _values(runs, metric_of(claim, config))) >= MIN_VALUES
    }
    hinges_on = candidate.hinges_on
    return JudgedClaim(claim, config, candidate.values(claim), others, hinges_on, by_epochs)


def of_collection(
    collection: RunCollection, config_dir: Path | None = None
) -> list[tuple[str, SeedGroup | None, JudgedClaim]]:
    """Return each claim of the runs of a collection: its report, its seed group (if any), judged.

    Runs of one group that belong to different experiments are judged apart. `config_dir` may hold
    one's own reports.
    """
    studies: dict[tuple[str, str], list[tuple[SeedGroup, Candidate]]] = {}
    for group in collection.groups:
        runs: dict[tuple[str, str], list[FoundRun]] = {}
        for run in group.runs:
            runs.setdefault((run.config.study.report or "", run.config.name), []).append(run)
        for study, chosen in runs.items():
            config = chosen[0].config
            hinges_on = reported_of(config, config_dir).hinges_on
            candidate = Candidate(config, tuple(chosen), hinges_on)
            studies.setdefault(study, []).append((group, candidate))
    every = [candidate for members in studies.values() for _, candidate in members]
    rows: list[tuple[str, SeedGroup | None, JudgedClaim]] = []
    for (report, _), members in studies.items():
        for claim in reported_of(members[0][1].config, config_dir).claims:
            matched = [
                (report, group, judged)
                for group, candidate in members
                if (judged := match(claim, candidate, every)) is not None
            ]
            rows += matched or [(report, None, JudgedClaim(claim))]
    return rows


def metric_of(claim: Claim, config: RunConfig) -> str:
    """Return the claim's metric; the sound protocol scores the weights that validation chose."""
    if config.protocol == "sound":
        return claim.metric.replace("test_accuracy_last", "test_accuracy")
    return claim.metric


def speaks_of(claim: Claim, config: RunConfig) -> bool:
    """Whether a run has the config values of the claim's `where`."""
    return _fits(flatten(to_plain(config)), claim.where)


def is_other(claim: Claim, config: RunConfig, other: RunConfig) -> bool:
    """Whether `other` is a run that the claim's `above` compares those like `config` with."""
    where = _where_of_others(claim, config)
    return bool(claim.above) and _fits(flatten(to_plain(other)), where)


def reported(claim: Claim) -> str:
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


def _values(runs: Sequence[FoundRun], metric: str) -> Values:
    values = {run: run.metric(metric) for run in runs if run.finished}
    return {run: value for run, value in values.items() if value is not None}


def _where_of_others(claim: Claim, config: RunConfig) -> dict[str, Any]:
    same = {} if "name" in claim.above else {"name": config.name, **claim.where}
    return {"protocol": config.protocol, **same, **claim.above}


def _fits(flat: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    return all(
        key in flat and (flat[key] == value or show_value(flat[key]) == show_value(value))
        for key, value in where.items()
    )
