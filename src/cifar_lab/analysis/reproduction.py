"""What the reports claim beside what runs measured: each claim is matched to its runs, and judged.

A claim speaks of the configurations of its experiment that fit its `where`. It is judged by the
finished runs of such a configuration, one value per seed, by one written rule (see `verdicts`).
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cifar_lab.analysis import run_metrics
from cifar_lab.analysis.contrasts import Deviation
from cifar_lab.analysis.load_runs import FoundRun, identity_without, read_runs, show_value
from cifar_lab.analysis.statistics import MIN_VALUES, Interval, interval
from cifar_lab.analysis.verdicts import REFUTED, EpochStudy, Verdict, judge, pooled_deviation
from cifar_lab.config.reports import Claim, Report, ReportedExperiment
from cifar_lab.config.run_config import RunConfig, flatten, to_plain
from cifar_lab.errors import UsageError
from cifar_lab.runs.run_dir import find_runs
from cifar_lab.runs.summary import code_version, other_code
from cifar_lab.runs.text import Table, duration, markdown

Runs = tuple[FoundRun, ...]

_NOT_THE_RECIPE = ("seed", "device", "precision")
"""What may differ between runs that measure the same figure; threads are no part of identity."""


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
class Candidate:
    """A configuration of an experiment: its config (of any seed) and one run per seed.

    `pool`: groups of runs that scatter as these do, by which their deviation is estimated; none for
    their own alone. `study`: where the report does not say how long it trained, the runs of several
    lengths; `runs` are then those of the length that fits, `pool` those of each.
    """

    experiment: ReportExperiment
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
        return all(k in flat and show_value(flat[k]) == show_value(v) for k, v in where.items())

    def values(self, claim: Claim, runs: Runs | None = None) -> dict[FoundRun, float]:
        """Return the claim's metric of each of its runs that has it, or of each of `runs`."""
        metric = claim.metric
        if self.config.protocol == "sound":  # which scores the weights that validation chose
            metric = metric.replace("test_accuracy_last", "test_accuracy")
        values = {run: run.metric(metric) for run in (self.runs if runs is None else runs)}
        return {run: value for run, value in values.items() if value is not None}

    def deviation(self, claim: Claim) -> Deviation | None:
        """Return the deviation of single runs; those that continue each other count as one."""
        groups = [self.values(claim, runs) for runs in self.pool or (self.runs,)]
        return pooled_deviation(
            [
                {run.config.seed if self.study else run: value for run, value in group.items()}
                for group in groups
            ]
        )


@dataclass(frozen=True)
class Row:
    """A claim beside the runs of a configuration, and of those that its `above` compares with.

    `configs`: those of the runs that judge it, with seed 0; `runs`: these runs; `values`: the
    claim's metric, or the difference that the report prints, one for each seed.
    """

    claim: Claim
    candidate: Candidate
    configs: list[RunConfig]
    runs: Runs
    values: list[float]
    interval: Interval | None
    verdict: Verdict

    @property
    def experiment(self) -> ReportExperiment:
        """The experiment that the report describes so."""
        return self.candidate.experiment


def read_finished(folder: Path) -> list[FoundRun]:
    """Read the finished runs of an experiment's folder, whatever their seed and device.

    What cannot be read is a figure not measured yet; summarize names it and says why.
    """
    there = folder.is_dir() and find_runs(folder)
    return [run for run in read_runs(folder)[0] if run.finished] if there else []


def rows(
    experiments: Sequence[ReportExperiment], runs: Sequence[FoundRun], only: str | None
) -> list[Row]:
    """Set each claim that `only` asks for beside its finished runs."""
    runs = sorted(runs, key=lambda run: run.config.seed)
    by_recipe: dict[str, dict[int, FoundRun]] = {}
    for run in runs:  # one run per seed, even where two devices computed it
        by_recipe.setdefault(recipe(run.config), {}).setdefault(run.config.seed, run)
    every: list[Candidate] = []
    pools: dict[str | None, list[Runs]] = {}  # those of one reason share what tells their deviation
    for experiment in experiments:
        for claim in experiment.reported.claims:
            check(claim, experiment)
        for config in experiment.configs:
            own = tuple(by_recipe.get(recipe(config), {}).values())
            every.append(_at_fitted_length(Candidate(experiment, config, own), runs))
            pools.setdefault(experiment.reported.pool, []).append(every[-1].runs)
    for place, candidate in enumerate(every):
        if reason := candidate.experiment.reported.pool:
            every[place] = replace(candidate, pool=tuple(pools[reason]))
    return [
        _row(claim, candidate, others)
        for experiment in experiments
        for claim in experiment.reported.claims
        if only is None or claim.name.startswith(only)
        for candidate in every
        if candidate.experiment is experiment
        if (others := match(claim, candidate, every)) is not None
    ]


def _at_fitted_length(candidate: Candidate, runs: Sequence[FoundRun]) -> Candidate:
    """Give a configuration its runs of the length that fits best, if the report gives none.

    Its learning rate is constant. Only runs count that were told to be scored by their last
    weights: those whose best epoch happens to be the last are the luckier ones. There must be two
    lengths with three seeds or more.
    """
    told = candidate.experiment.reported
    claim = next((c for c in told.claims if c.name == told.epochs_fitted_to), None)
    if claim is None or candidate.config.scheduler is not None:
        return candidate
    wanted = _but_for_epochs(candidate.config)
    by_length: dict[int, dict[int, FoundRun]] = {}
    for run in runs:
        if run.summary.scored_weights == "last" and _but_for_epochs(run.config) == wanted:
            of_length = by_length.setdefault(run.config.training.epochs, {})
            of_length.setdefault(run.config.seed, run)
    lengths = {e: by_length[e] for e in sorted(by_length) if len(by_length[e]) >= MIN_VALUES}
    if len(lengths) < 2:
        return candidate
    pool = {epochs: tuple(seeds.values()) for epochs, seeds in lengths.items()}
    values = {epochs: candidate.values(claim, of_length) for epochs, of_length in pool.items()}
    by_seed = {e: {run.config.seed: v for run, v in of.items()} for e, of in values.items()}
    study = EpochStudy(claim, by_seed)
    return replace(candidate, runs=pool[study.nearest], pool=tuple(pool.values()), study=study)


def _but_for_epochs(config: RunConfig) -> str:
    training = replace(config.training, epochs=1)
    evaluation = replace(config.evaluation, scored_weights="last")
    return recipe(replace(config, training=training, evaluation=evaluation, continue_from=None))


def recipe(config: RunConfig) -> str:
    """Return what runs that measure the same figure have in common."""
    return json.dumps(identity_without(config, *_NOT_THE_RECIPE), sort_keys=True)


def match(
    claim: Claim, candidate: Candidate, every: Sequence[Candidate]
) -> tuple[Candidate, ...] | None:
    """Return what a claim compares a configuration with; None if it does not speak of this one.

    `every`: the configurations that the claim's `above` may compare with.
    """
    if not candidate.fits(claim.where):
        return None
    config = candidate.config
    same = {} if "name" in claim.above else {"name": config.name, **claim.where}
    where = {"protocol": config.protocol, **same, **claim.above}
    compared = tuple(other for other in every if claim.above and other.fits(where))
    if len(compared) > 1 or (same and claim.above and not compared):
        fitting = len(compared) or "none"
        raise UsageError(f"{claim.name}: `above` must fit one configuration, and fits {fitting}")
    return None if candidate in compared else compared


def check(claim: Claim, experiment: ReportExperiment) -> None:
    """UsageError for a number that the metric cannot have, and a `where` that fits nothing."""
    run_metrics.check(claim.metric)
    low, high = run_metrics.bounds(claim.metric) if not claim.above else (-math.inf, math.inf)
    for value in (claim.value, claim.at_least, claim.at_most):
        if value is not None and not low <= value <= high:
            raise UsageError(f"{claim.name}: {value:g} is no {claim.metric}: {low:g} to {high:g}")
    fitting = (Candidate(experiment, config).fits(claim.where) for config in experiment.configs)
    if "protocol" not in claim.where and not any(fitting):
        raise UsageError(f"{claim.name}: `where` fits no configuration of {experiment.name}")


def _row(claim: Claim, candidate: Candidate, compared: tuple[Candidate, ...]) -> Row:
    """Measure and judge a claim."""
    own, study = candidate.values(claim), candidate.study
    others = {run: value for other in compared for run, value in other.values(claim).items()}
    runs, values, limits = (*own, *others), list(own.values()), run_metrics.bounds(claim.metric)
    deviation, other_deviation = candidate.deviation(claim), None
    if claim.above and claim.value is not None:  # runs of one seed start alike and are paired
        by_seed = {run.config.seed: value for run, value in others.items()}
        values = [v - by_seed[s] for run, v in own.items() if (s := run.config.seed) in by_seed]
        deviation, limits = pooled_deviation([dict(enumerate(values))]), (-math.inf, math.inf)
    elif compared and not (candidate.pool and candidate.pool == compared[0].pool):
        other_deviation = compared[0].deviation(claim)
        deviation = deviation if other_deviation else None
    # an event, which a finished run may be without
    missing = (len(candidate.runs) - len(own)) * claim.metric.startswith("reduction_to")
    verdict = judge(
        claim,
        values,
        list(others.values()),
        deviation=deviation,
        other_deviation=other_deviation,
        missing=missing,
    )
    if study and study.claim == claim:  # the figure by which the number of epochs was chosen
        runs, verdict = tuple(run for of in candidate.pool for run in of), study.verdict
    configs = [config_of.config for config_of in (candidate, *compared)]
    found = interval(values, limits)
    return Row(claim, candidate, configs, runs, values, found, verdict)


def quoted(rows: Iterable[Row]) -> list[FoundRun]:
    """Return every run that the rows quote, once."""
    return list({run.run.path: run for row in rows for run in row.runs}.values())


def by_report(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the rows of each report, by its tag."""
    reports: dict[str, list[Row]] = {}
    for row in rows:
        reports.setdefault(row.candidate.config.study.report or "", []).append(row)
    return reports


def table(rows: Iterable[Row]) -> Table:
    """Return a table with a line for each row."""
    lines = []
    for row in rows:
        claim, verdict = row.claim, str(row.verdict)
        if row.verdict.word in REFUTED and claim.suspected:
            verdict += f"; suspected: {claim.suspected}"
        measured = run_metrics.show_interval(claim.metric, row.interval)
        figures = (claim.name, reported(claim), measured, str(len(row.values)))
        source = "; ".join(filter(None, [claim.says, claim.source, claim.note]))
        lines.append((*figures, row.candidate.config.protocol, verdict, source))
    header = ("figure", "reported", "measured", "n", "protocol", "verdict", "source")
    return Table(header, lines)


def reported(claim: Claim) -> str:
    """Return what the report says: a figure, a bound, or what it compares with."""
    above = ", ".join(f"{key}={show_value(value)}" for key, value in claim.above.items())
    if above and claim.value is not None:
        return f"{run_metrics.show_difference(claim.metric, claim.value)} over {above}"
    if above:
        return f"more than with {above}"
    for words, value in (("at least ", claim.at_least), ("at most ", claim.at_most)):
        if value is not None:
            return words + run_metrics.show(claim.metric, value)
    return run_metrics.show(claim.metric, claim.value)


def guesses(rows: Iterable[Row]) -> str:
    """Return what had to be guessed, a paragraph for each experiment."""
    lines = {row.experiment.name: row.experiment.reported.guessed for row in rows}
    return "\n\n".join(
        f"Guessed in {name}: {markdown('; '.join(guessed))}."
        for name, guessed in lines.items()
        if guessed
    )


def sources(rows: Iterable[Row]) -> str:
    """Return the runs behind the rows: folder, device, time, commit, and how many are outdated."""
    runs = sorted(quoted(rows), key=lambda run: run.run.path)
    lines = []
    for run in runs:
        told, path = run.summary, str(run.run.path)
        row = (path, told.device_name or "–", run.config.precision, duration(told.seconds))
        lines.append((*row, told.commit or "–"))
    header = ("run", "device", "precision", "training", "commit")
    others = sum(other_code(run.summary, code_version(run.config)) is not None for run in runs)
    note = f"\n\nMade by other code than today's: {others} of these {len(runs)} runs."
    return Table(header, lines).markdown() + note * bool(others) if runs else ""
