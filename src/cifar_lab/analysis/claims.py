"""What reports claim beside what runs measured: each claim is matched to its runs, and judged.

A claim of a study speaks of the settings that fit its `where`. It is judged by the finished runs of
such a setting, one value per seed, by one written rule (see `verdicts`).
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
from cifar_lab.errors import UsageError


@dataclass(frozen=True)
class Candidate:
    """A setting that claims may speak of: its config (of any seed) and its runs, one per seed.

    `hinges_on`: the guesses that decide the report's numbers; `lengths`: where it does not say how
    long it trained, the runs of the same setting by their number of epochs, three seeds or more of
    each.
    """

    config: RunConfig
    runs: tuple[FoundRun, ...]
    hinges_on: str | None = None
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
    `hinges_on`: the guesses that decide it; `by_epochs`: the metric of runs of other lengths, where
    the report does not give the epochs.
    """

    claim: Claim
    config: RunConfig | None
    values: Mapping[FoundRun, float]
    others: Mapping[FoundRun, float]
    problem: str = ""
    hinges_on: str | None = None
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
        values, others = list(self.values.values()), list(self.others.values())
        return judge(self.claim, self.config, values, others, hinges_on=self.hinges_on)

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


def match(claim: Claim, candidate: Candidate, every: Sequence[Candidate]) -> JudgedClaim | None:
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
    return JudgedClaim(
        claim,
        config,
        candidate.values(metric),
        others,
        hinges_on=candidate.hinges_on,
        by_epochs=by_epochs,
    )


def of_collection(
    collection: RunCollection, config_dir: Path | None = None
) -> list[tuple[str, SeedGroup | None, JudgedClaim]]:
    """Return each claim of the runs of a collection: its report, its setting (if any), judged.

    Runs of one setting that belong to different experiments are judged apart. `config_dir` may hold
    one's own reports.
    """
    studies: dict[tuple[str, str], list[tuple[SeedGroup, Candidate]]] = {}
    for setting in collection.settings:
        runs: dict[tuple[str, str], list[FoundRun]] = {}
        for run in setting.runs:
            runs.setdefault((run.config.study.report or "", run.config.name), []).append(run)
        for study, chosen in runs.items():
            hinges_on = reported_of(chosen[0].config, config_dir).hinges_on
            candidate = Candidate(chosen[0].config, tuple(chosen), hinges_on)
            studies.setdefault(study, []).append((setting, candidate))
    every = [candidate for members in studies.values() for _, candidate in members]
    rows: list[tuple[str, SeedGroup | None, JudgedClaim]] = []
    for (report, _), members in studies.items():
        for claim in reported_of(members[0][1].config, config_dir).claims:
            problem = _unknown_metric(claim)
            matched = [
                (report, setting, judged)
                for setting, candidate in members
                if not problem and (judged := match(claim, candidate, every)) is not None
            ]
            rows += matched or [(report, None, JudgedClaim(claim, None, {}, {}, problem))]
    return rows


def _unknown_metric(claim: Claim) -> str:
    try:
        run_metrics.check(claim.metric)
    except UsageError as error:
        return str(error)
    return ""


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


def _where_of_others(claim: Claim, config: RunConfig) -> dict[str, Any]:
    above = claim.above or {}
    same = {} if "name" in above else {"name": config.name, **claim.where}
    return {"protocol": config.protocol, **same, **above}


def _fits(flat: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    return all(key in flat and _same(flat[key], value) for key, value in where.items())


def _same(a: Any, b: Any) -> bool:
    return show_value(a) == show_value(b) or a == b
