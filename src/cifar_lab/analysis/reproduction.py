"""The experiments of the reports, and each figure that a report gives beside the runs for it."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cifar_lab.analysis import run_metrics
from cifar_lab.analysis.claims import Candidate, JudgedClaim, match, metric_of, speaks_of
from cifar_lab.analysis.load_runs import FoundRun, identity_without, show_value
from cifar_lab.analysis.statistics import MIN_VALUES, Interval, interval
from cifar_lab.config.identity import identity
from cifar_lab.config.reports import Claim, Report, ReportedExperiment
from cifar_lab.config.run_config import RunConfig, flatten
from cifar_lab.errors import RunFailed, UsageError
from cifar_lab.runs.run_dir import find_runs

_NOT_THE_RECIPE = ("seed", "device", "precision")
"""What may differ between runs that measure the same figure; threads are no part of identity."""


@dataclass(frozen=True)
class ReportExperiment:
    """A report's experiment: its configs with seed 0, by the judged protocol and the sound one.

    A report chooses its own protocol; the sound one takes validation images from the training set
    and scores the test set once.
    """

    name: str
    configs: tuple[RunConfig, ...]
    sound: tuple[RunConfig, ...]
    report: Report

    @property
    def reported(self) -> ReportedExperiment:
        """What the report says of it."""
        return self.report.experiments.get(self.name, ReportedExperiment())

    def label(self, config: RunConfig) -> str:
        """Return what tells one of its settings from the others, for a legend."""
        options = [one.choices for one in self.configs]
        groups = [g for g in config.choices if len({one.get(g) for one in options}) > 1]
        flat = [flatten(identity(one)) for one in self.configs]
        own = flatten(identity(config))
        keys = [
            key
            for key in own
            if key.partition(".")[0] not in groups and any(one.get(key) != own[key] for one in flat)
        ]
        parts = [config.choices[group] for group in groups]
        parts += [f"{key.removeprefix('optimizer.')} {show_value(own[key])}" for key in keys]
        return ", ".join(parts) or self.name


@dataclass(frozen=True)
class Row:
    """A claim of an experiment, judged, beside the figure under the sound protocol.

    `sound`: None without a run, or where the protocol that is judged is the sound one;
    `same_as_sound`: the two protocols make the same run of it.
    """

    experiment: ReportExperiment
    config: RunConfig
    judged: JudgedClaim
    sound: Interval | None
    sound_runs: tuple[FoundRun, ...]
    same_as_sound: bool

    @property
    def claim(self) -> Claim:
        """What the report says."""
        return self.judged.claim

    @property
    def runs(self) -> tuple[FoundRun, ...]:
        """Every run that the row quotes."""
        judged = self.judged
        lengths = [run for found in judged.by_epochs.values() for run in found]
        return (*judged.values, *judged.others, *lengths, *self.sound_runs)


def read_finished(experiments: Sequence[ReportExperiment]) -> list[FoundRun]:
    """Read the finished runs of experiments from their folders, whatever their seed and device."""
    folders = {
        Path(config.output_dir) / config.name
        for experiment in experiments
        for config in (*experiment.configs, *experiment.sound)
    }
    found = []
    for folder in sorted(folders):
        for run in find_runs(folder) if folder.is_dir() else ():
            try:
                one = FoundRun(run)
            except (UsageError, RunFailed):
                continue  # summarize names it and says why; here it is a figure not measured yet
            if one.finished:
                found.append(one)
    return found


def rows(
    experiments: Sequence[ReportExperiment], runs: Sequence[FoundRun], only: str | None
) -> list[Row]:
    """Set each claim that `only` asks for beside its runs."""
    by_recipe: dict[str, dict[int, FoundRun]] = {}
    for run in runs:  # one run per seed, even where two devices computed it
        by_recipe.setdefault(recipe(run.config), {}).setdefault(run.config.seed, run)

    def candidate(config: RunConfig, hinges_on: str | None = None) -> Candidate:
        seeds = by_recipe.get(recipe(config), {})
        lengths = lengths_of(config, runs) if hinges_on == "epochs" else {}
        ordered = tuple(run for _, run in sorted(seeds.items()))
        return Candidate(config, ordered, hinges_on, lengths)

    settings = [
        [candidate(config, one.reported.hinges_on) for config in one.configs] for one in experiments
    ]
    every = [one for found in settings for one in found]
    result = []
    for experiment, candidates in zip(experiments, settings, strict=True):
        for claim in experiment.reported.claims:
            if not is_asked(claim, only):
                continue
            sound = next((c for c in experiment.sound if speaks_of(claim, c)), None)
            for one in candidates:
                judged = match(claim, one, every)
                if judged is None:
                    continue
                same = sound is not None and recipe(sound) == recipe(
                    replace(one.config, protocol=sound.protocol)
                )
                beside = (
                    candidate(sound).values(metric_of(claim, sound)) if sound and not same else {}
                )
                mean = interval(list(beside.values()), run_metrics.bounds(claim.metric))
                result.append(Row(experiment, one.config, judged, mean, tuple(beside), same))
    return result


def lengths_of(config: RunConfig, runs: Sequence[FoundRun]) -> dict[int, tuple[FoundRun, ...]]:
    """Return runs of a setting, a constant learning rate's, by the number of epochs they trained.

    Only those count that were scored by their last weights, whether they began anew or continued
    another run, and only numbers of epochs with three seeds or more; {} if there is only one.
    """
    if config.scheduler is not None:
        return {}
    wanted = _but_for_epochs(config)
    found: dict[int, dict[int, FoundRun]] = {}
    for run in runs:
        epochs = run.config.training.epochs
        scored_last = run.summary.scored_weights == "last" or run.summary.best_epoch == epochs
        if scored_last and _but_for_epochs(run.config) == wanted:
            found.setdefault(epochs, {}).setdefault(run.config.seed, run)
    enough = {
        epochs: tuple(run for _, run in sorted(seeds.items()))
        for epochs, seeds in sorted(found.items())
        if len(seeds) >= MIN_VALUES
    }
    return enough if len(enough) > 1 else {}


def _but_for_epochs(config: RunConfig) -> str:
    training = replace(config.training, epochs=1)
    evaluation = replace(config.evaluation, scored_weights="last")
    same = replace(config, training=training, evaluation=evaluation, continue_from=None)
    return recipe(same)


def quoted(found: Iterable[Row]) -> list[FoundRun]:
    """Return every run that the rows quote, once."""
    return list({run.run.path: run for row in found for run in row.runs}.values())


def is_asked(claim: Claim, only: str | None) -> bool:
    """Whether a claim's id (or metric) starts with `only`."""
    return only is None or (claim.id or claim.metric).startswith(only)


def recipe(config: RunConfig) -> str:
    """Return what runs that measure the same figure have in common."""
    return json.dumps(identity_without(config, *_NOT_THE_RECIPE), sort_keys=True)
