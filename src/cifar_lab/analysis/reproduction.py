"""The experiments of the reports, and each figure that a report gives beside the runs for it."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from cifar_lab.analysis import run_metrics
from cifar_lab.analysis.claims import (
    Candidate,
    ReportExperiment,
    Row,
    Runs,
    match,
    reported,
    values_of,
)
from cifar_lab.analysis.load_runs import FoundRun, identity_without, read_runs
from cifar_lab.analysis.statistics import MIN_VALUES
from cifar_lab.analysis.verdicts import REFUTED, EpochStudy
from cifar_lab.config.reports import ReportedExperiment
from cifar_lab.config.run_config import RunConfig
from cifar_lab.runs.provenance import code_version, other_code
from cifar_lab.runs.run_dir import find_runs
from cifar_lab.runs.text import Table, duration, markdown

_NOT_THE_RECIPE = ("seed", "device", "precision")
"""What may differ between runs that measure the same figure; threads are no part of identity."""


def read_finished(folder: Path) -> list[FoundRun]:
    """Read the finished runs of an experiment's folder, whatever their seed and device.

    What cannot be read is a figure not measured yet; summarize names it and says why.
    """
    there = folder.is_dir() and find_runs(folder)
    return [run for run in read_runs(folder)[0] if run.finished] if there else []


def rows(
    experiments: Sequence[ReportExperiment], runs: Sequence[FoundRun], only: str | None
) -> list[Row]:
    """Set each claim that `only` asks for beside its runs."""
    by_recipe: dict[str, dict[int, FoundRun]] = {}
    for run in runs:  # one run per seed, even where two devices computed it
        by_recipe.setdefault(recipe(run.config), {}).setdefault(run.config.seed, run)
    owned: list[tuple[ReportExperiment, Candidate]] = []
    pools: dict[str, list[Runs]] = {}  # those of one reason share what tells their deviation
    for experiment in experiments:
        reason = experiment.reported.pool
        for config in experiment.configs:
            own = Candidate(config, _by_seed(by_recipe.get(recipe(config), {})))
            own = _at_fitted_length(own, experiment.reported, runs)
            owned.append((experiment, own))
            pools.setdefault(reason or "", []).append(own.runs)
    owned = [
        (e, replace(own, pool=tuple(pools[e.reported.pool])) if e.reported.pool else own)
        for e, own in owned
    ]
    every = [candidate for _, candidate in owned]
    return [
        Row(experiment, claim, candidate, others)
        for experiment in experiments
        for claim in experiment.reported.claims
        if only is None or claim.name.startswith(only)
        for owner, candidate in owned
        if owner is experiment and (others := match(claim, candidate, every)) is not None
    ]


def _at_fitted_length(
    candidate: Candidate, reported: ReportedExperiment, runs: Sequence[FoundRun]
) -> Candidate:
    """Give a configuration its runs of the length that fits best, if the report gives none."""
    claim = next((c for c in reported.claims if c.name == reported.epochs_fitted_to), None)
    lengths = lengths_of(candidate.config, runs) if claim else {}
    if claim is None or not lengths:
        return candidate
    values = {e: values_of(runs, candidate.metric(claim)) for e, runs in lengths.items()}
    by_seed = {e: {run.config.seed: v for run, v in of.items()} for e, of in values.items()}
    study, pool = EpochStudy(claim, by_seed), tuple(lengths.values())
    return replace(candidate, runs=lengths[study.nearest], pool=pool, study=study)


def lengths_of(config: RunConfig, runs: Sequence[FoundRun]) -> dict[int, tuple[FoundRun, ...]]:
    """Return runs like these, of a constant learning rate, by the number of epochs they trained.

    Only those count that were told to be scored by their last weights: those whose best epoch
    happens to be the last are the luckier ones. Only numbers of epochs with three seeds or more
    count; {} if there is only one.
    """
    if config.scheduler is not None:
        return {}
    wanted = _but_for_epochs(config)
    lengths: dict[int, dict[int, FoundRun]] = {}
    for run in runs:
        epochs = run.config.training.epochs
        if run.summary.scored_weights == "last" and _but_for_epochs(run.config) == wanted:
            lengths.setdefault(epochs, {}).setdefault(run.config.seed, run)
    ordered = sorted(lengths.items())
    enough = {epochs: _by_seed(seeds) for epochs, seeds in ordered if len(seeds) >= MIN_VALUES}
    return enough if len(enough) > 1 else {}


def _by_seed(runs: dict[int, FoundRun]) -> tuple[FoundRun, ...]:
    return tuple(run for _, run in sorted(runs.items()))


def _but_for_epochs(config: RunConfig) -> str:
    training = replace(config.training, epochs=1)
    evaluation = replace(config.evaluation, scored_weights="last")
    return recipe(replace(config, training=training, evaluation=evaluation, continue_from=None))


def quoted(rows: Iterable[Row]) -> list[FoundRun]:
    """Return every run that the rows quote, once."""
    return list({run.run.path: run for row in rows for run in row.runs}.values())


def recipe(config: RunConfig) -> str:
    """Return what runs that measure the same figure have in common."""
    return json.dumps(identity_without(config, *_NOT_THE_RECIPE), sort_keys=True)


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
    lines = [
        (
            f"{run.run.path}",
            run.summary.device_name or "–",
            run.config.precision,
            duration(run.summary.seconds),
            run.summary.commit or "–",
        )
        for run in runs
    ]
    header = ("run", "device", "precision", "training", "commit")
    others = sum(other_code(run.summary, code_version(run.config)) is not None for run in runs)
    note = f"\n\nMade by other code than today's: {others} of these {len(runs)} runs."
    return Table(header, lines).markdown() + note * bool(others) if runs else ""
