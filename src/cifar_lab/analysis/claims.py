"""What reports claim beside what runs measured: each claim is matched to its runs, and judged.

A claim speaks of the configurations of its experiment that fit its `where`. It is judged by the
finished runs of such a configuration, one value per seed, by one written rule (see `verdicts`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cifar_lab.analysis import run_metrics
from cifar_lab.analysis.contrasts import Deviation
from cifar_lab.analysis.load_runs import FoundRun, show_value
from cifar_lab.analysis.statistics import Interval, interval
from cifar_lab.analysis.verdicts import EpochStudy, Verdict, judge, pooled_deviation
from cifar_lab.config.reports import Claim, Report, ReportedExperiment
from cifar_lab.config.run_config import RunConfig, flatten, to_plain

Runs = tuple[FoundRun, ...]


@dataclass(frozen=True)
class Candidate:
    """A configuration that claims may speak of: its config (of any seed) and one run per seed.

    `pool`: groups of runs that scatter as these do, by which their deviation is estimated; none for
    their own alone. `study`: where the report does not say how long it trained, the runs of several
    lengths; `runs` are then those of the length that fits, `pool` those of each.
    """

    config: RunConfig
    runs: Runs = ()
    pool: tuple[Runs, ...] = ()
    study: EpochStudy | None = None

    @cached_property
    def _flat(self) -> dict[str, Any]:
        # An option by its group's name, as on a command line: optimizer=adam.
        return {**self.config.choices, **flatten(to_plain(self.config))}

    def fits(self, where: Mapping[str, Any]) -> bool:
        """Whether its config has these values, by dotted key, or these options, by group."""
        flat = self._flat
        return all(
            key in flat and (flat[key] == value or show_value(flat[key]) == show_value(value))
            for key, value in where.items()
        )

    def metric(self, claim: Claim) -> str:
        """Return the claim's metric; the sound protocol scores the weights validation chose."""
        if self.config.protocol == "sound":
            return claim.metric.replace("test_accuracy_last", "test_accuracy")
        return claim.metric

    def values(self, claim: Claim) -> dict[FoundRun, float]:
        """Return the claim's metric of each finished run that has it."""
        return values_of(self.runs, self.metric(claim))

    def deviation(self, claim: Claim) -> Deviation | None:
        """Return the deviation of single runs; those that continue each other count as one."""
        groups = [values_of(runs, self.metric(claim)) for runs in self.pool or (self.runs,)]
        units = [
            {run.config.seed if self.study else run.run.path: v for run, v in runs.items()}
            for runs in groups
        ]
        return pooled_deviation([values for values in units if values])


@dataclass(frozen=True)
class ReportExperiment:
    """A report's experiment: its configs, with seed 0, by the protocol that is judged."""

    name: str
    configs: tuple[RunConfig, ...]
    report: Report

    @property
    def folder(self) -> Path:
        """Where its runs are."""
        return Path(self.configs[0].output_dir) / self.configs[0].name

    @property
    def reported(self) -> ReportedExperiment:
        """What the report says of it."""
        return self.report.experiments.get(self.name, ReportedExperiment())


@dataclass(frozen=True)
class Row:
    """A claim beside the runs of a configuration, and of those that its `above` compares with."""

    experiment: ReportExperiment
    claim: Claim
    candidate: Candidate
    compared: tuple[Candidate, ...] = ()

    @property
    def configs(self) -> list[RunConfig]:
        """The configs, with seed 0, of the runs that judge it."""
        return [candidate.config for candidate in (self.candidate, *self.compared)]

    @cached_property
    def _measured(self) -> dict[FoundRun, float]:
        return self.candidate.values(self.claim)

    @cached_property
    def _of_others(self) -> dict[FoundRun, float]:
        return {
            run: value for other in self.compared for run, value in other.values(self.claim).items()
        }

    @property
    def _is_difference(self) -> bool:
        """Whether the report prints a difference: runs of one seed start alike and are paired."""
        return bool(self.claim.above) and self.claim.value is not None

    @property
    def _study(self) -> EpochStudy | None:
        """The study of the number of epochs, if this is the figure by which it was chosen."""
        study = self.candidate.study
        return study if study and study.claim == self.claim else None

    @cached_property
    def values(self) -> list[float]:
        """The claim's metric, or the difference that the report prints, one for each seed."""
        if not self._is_difference:
            return list(self._measured.values())
        others = {run.config.seed: value for run, value in self._of_others.items()}
        measured = {run.config.seed: value for run, value in self._measured.items()}
        return [value - others[seed] for seed, value in measured.items() if seed in others]

    @property
    def runs(self) -> Runs:
        """Every run that it is judged by."""
        if self._study:
            return tuple(run for runs in self.candidate.pool for run in runs)
        return (*self._measured, *self._of_others)

    @cached_property
    def interval(self) -> Interval | None:
        """Mean and interval of the measured values."""
        limits = run_metrics.bounds(self.claim.metric)
        return interval(self.values, (-math.inf, math.inf) if self._is_difference else limits)

    @cached_property
    def verdict(self) -> Verdict:
        """What the rule says."""
        claim, candidate = self.claim, self.candidate
        if self._study:
            return self._study.verdict
        missing = 0
        if claim.metric.startswith("reduction_to"):  # an event, which a finished run may be without
            missing = sum(run.finished for run in candidate.runs) - len(self._measured)
        deviation, other_deviation = candidate.deviation(claim), None
        if self._is_difference:
            deviation = pooled_deviation([dict(enumerate(self.values))])
        elif self.compared and not (candidate.pool and candidate.pool == self.compared[0].pool):
            other_deviation = self.compared[0].deviation(claim)
            deviation = deviation if other_deviation else None
        return judge(
            claim,
            self.values,
            list(self._of_others.values()),
            deviation=deviation,
            other_deviation=other_deviation,
            missing=missing,
        )


def match(
    claim: Claim, candidate: Candidate, every: Sequence[Candidate]
) -> tuple[Candidate, ...] | None:
    """Return what a claim compares a configuration with; None if it does not speak of this one.

    `every`: the configurations that the claim's `above` may compare with.
    """
    run_metrics.check(claim.metric)
    if not candidate.fits(claim.where):
        return None
    config = candidate.config
    same = {} if "name" in claim.above else {"name": config.name, **claim.where}
    where = {"protocol": config.protocol, **same, **claim.above}
    return tuple(other for other in every if claim.above and other.fits(where))


def values_of(runs: Sequence[FoundRun], metric: str) -> dict[FoundRun, float]:
    """Return a metric of each finished run that has it."""
    values = {run: run.metric(metric) for run in runs if run.finished}
    return {run: value for run, value in values.items() if value is not None}


def reported(claim: Claim) -> str:
    """Return what the report says: a figure, a bound, or what it compares with."""
    if claim.above and claim.value is not None:
        difference = run_metrics.show_difference(claim.metric, claim.value)
        return f"{difference} over {show_where(claim.above)}"
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
