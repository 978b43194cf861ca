"""What reports say beside what runs measured: the rows, the tables, the document, its pictures."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from cifar_lab import tables
from cifar_lab.cells import FoundRun, show_value
from cifar_lab.claims import is_other, reported, show_settings, speaks_of
from cifar_lab.components import code_hash
from cifar_lab.config import ClaimConfig, RunConfig, flatten, identity
from cifar_lab.errors import RequestError, RunFailed
from cifar_lab.planning import duration
from cifar_lab.run_dir import RunDir, find_runs
from cifar_lab.significance import Interval, interval
from cifar_lab.verdicts import Verdict, judge

_NOT_THE_RECIPE = ("seed", "device", "precision")
"""What may differ between runs that measure the same figure; threads are no part of identity."""


@dataclass(frozen=True)
class Study:
    """An experiment: its cells' configs, seed 0, under the protocol to judge and the sound one."""

    name: str
    configs: tuple[RunConfig, ...]
    sound: tuple[RunConfig, ...]

    @property
    def report(self) -> str:
        """The tag of the report that it reproduces."""
        return self.configs[0].study.report or self.name


@dataclass(frozen=True)
class Row:
    """A claim beside the runs that measure it, and beside the sound protocol's figure.

    `sound`: None without such a run, or where the protocol that is judged is the sound one.
    `beside`: the runs that the claim compares with, and those of the sound protocol.
    """

    study: Study
    claim: ClaimConfig
    config: RunConfig
    runs: tuple[FoundRun, ...]
    values: tuple[float, ...]
    others: tuple[float, ...]
    sound: Interval | None
    same_as_sound: bool
    beside: tuple[FoundRun, ...]

    @property
    def all_runs(self) -> tuple[FoundRun, ...]:
        """Every run that the row quotes."""
        return (*self.runs, *self.beside)

    @property
    def verdict(self) -> Verdict:
        """What the rule says."""
        return judge(self.claim, self.config, self.values, self.others)

    @property
    def measured(self) -> str:
        """The mean and half of its 95 % interval's width."""
        return tables.score_text(self.claim.metric, interval(self.values))


def find(studies: Sequence[Study]) -> list[FoundRun]:
    """Read the finished runs of the studies from their folders, whatever their seed and device."""
    folders = {
        Path(config.output_dir) / config.name
        for study in studies
        for config in (*study.configs, *study.sound)
    }
    found = []
    for folder in sorted(folders):
        for run in find_runs(folder) if folder.is_dir() else ():
            try:
                one = FoundRun(run)
            except (RequestError, RunFailed):
                continue  # summarize names it and says why; here it is a figure not measured yet
            if one.finished:
                found.append(one)
    return found


def rows(studies: Sequence[Study], runs: Sequence[FoundRun], only: str | None) -> list[Row]:
    """Set each claim that `only` asks for beside its runs."""
    by_recipe: dict[str, dict[int, FoundRun]] = {}
    for run in runs:  # one run a seed, even where two devices computed it
        by_recipe.setdefault(_recipe(run.config), {}).setdefault(run.config.seed, run)
    every = [config for study in studies for config in study.configs]

    def values(config: RunConfig, metric: str) -> dict[FoundRun, float]:
        if config.protocol == "sound":  # its figure is that of the weights that validation chose
            metric = metric.replace("test_accuracy_last", "test_accuracy")
        seeds = by_recipe.get(_recipe(config), {})
        measured = {run: run.measure(metric) for _, run in sorted(seeds.items())}
        return {run: value for run, value in measured.items() if value is not None}

    result = []
    for study in studies:
        for claim in study.configs[0].study.claims:
            if not is_asked(claim, only):
                continue
            for config in (c for c in study.configs if speaks_of(claim, c)):
                found = values(config, claim.metric)
                others: dict[FoundRun, float] = {}
                for other in (c for c in every if is_other(claim, config, c)):
                    others |= values(other, claim.metric)
                sound = next((c for c in study.sound if speaks_of(claim, c)), None)
                same = sound is not None and _recipe(sound) == _recipe(
                    replace(config, protocol=sound.protocol)
                )
                fair = values(sound, claim.metric) if sound and not same else {}
                result.append(
                    Row(
                        study,
                        claim,
                        config,
                        tuple(found),
                        tuple(found.values()),
                        tuple(others.values()),
                        interval(tuple(fair.values())),
                        same,
                        (*others, *fair),
                    )
                )
    return result


def quoted(found: Iterable[Row]) -> list[FoundRun]:
    """Return every run that the rows quote, once."""
    return list({run.run.path: run for row in found for run in row.all_runs}.values())


def is_asked(claim: ClaimConfig, only: str | None) -> bool:
    """Whether a claim's id (or metric) starts with `only`."""
    return only is None or (claim.id or claim.metric).startswith(only)


def table(found: Sequence[Row]) -> str:
    """Return rows as a Markdown table."""
    header = ("figure", "reported", "measured", "seeds", "protocol", "sound", "verdict", "source")
    return tables.table(header, [_cells(row) for row in found])


def short_table(found: Sequence[Row]) -> str:
    """Return the first claim of each setting: what the README shows."""
    first: dict[tuple[str, str], Row] = {}
    for row in found:
        where = json.dumps(row.claim.where, sort_keys=True)
        if row.claim.value is not None:
            first.setdefault((row.study.name, where), row)
    header = ("figure", "what", "reported", "measured", "seeds", "verdict")
    lines = [
        (
            row.claim.id or row.claim.metric,
            _what(row),
            reported(row.claim),
            row.measured,
            str(len(row.values)),
            row.verdict.word,
        )
        for row in first.values()
    ]
    return tables.table(header, lines)


def guesses(found: Sequence[Row]) -> str:
    """Return what had to be guessed, a line for each experiment."""
    lines = {row.study.name: row.config.study.guessed for row in found}
    return "\n\n".join(
        f"Guessed in {name}: {tables.markdown('; '.join(guessed))}."
        for name, guessed in lines.items()
        if guessed
    )


def sources(found: Sequence[Row]) -> str:
    """Return the runs behind the rows: folder, device, time, commit."""
    runs = sorted(quoted(found), key=lambda run: run.run.path)
    lines = [
        (
            f"{run.run.path}",
            run.summary.device_name or "–",
            duration(run.summary.seconds),
            run.summary.commit or "–",
        )
        for run in runs
    ]
    return tables.table(("run", "device", "training", "commit"), lines) if lines else ""


def other_code(found: Sequence[Row]) -> str:
    """Return how many of the runs behind the rows today's code did not make; "" where it did."""
    runs = quoted(found)
    others = sum(run.summary.code_hash not in (None, code_hash(run.config)) for run in runs)
    if not others:
        return ""
    return f"Made by other code than today's: {others} of these {len(runs)} runs."


def document(found: Sequence[Row], pictures: dict[str, str], command: str) -> str:
    """Return the whole as Markdown: in short, then each report with pictures, guesses and runs.

    `pictures`: {experiment or "overview": path relative to the document}.
    """
    counts: dict[str, int] = {}
    for row in found:
        counts[row.verdict.word] = counts.get(row.verdict.word, 0) + 1
    runs = quoted(found)
    seconds = sum(run.summary.seconds for run in runs)
    parts = [
        "# Reported and measured",
        f"Written by `{command}` from the runs that are kept in `docs/results`: "
        f"{len(runs)} runs, {duration(seconds)} of training (hours:minutes:seconds). Of "
        f"{len(found)} figures and findings: "
        + ", ".join(f"{n} {word}" for word, n in sorted(counts.items()))
        + ".",
        _RULE,
        "## In short",
        short_table(found),
    ]
    if "overview" in pictures:
        parts.append(f"![Reported and measured accuracies]({pictures['overview']})")
    for report in dict.fromkeys(row.study.report for row in found):
        parts.append(f"## {report}")
        of_report = [row for row in found if row.study.report == report]
        for name in dict.fromkeys(row.study.name for row in of_report):
            chosen = [row for row in of_report if row.study.name == name]
            study = chosen[0].config.study
            parts.append(f"### {name}: {study.title or ''}")
            if not any(row.runs for row in chosen):
                figures = f"{len(chosen)} figure{'s' * (len(chosen) > 1)}"
                run_it = f"`python -m cifar_lab.reproduce {name}` runs it"
                parts.append(f"Not measured yet ({figures}); {run_it}.")
                continue
            parts.append(table(chosen))
            if name in pictures:
                parts.append(f"![Curves of {name}]({pictures[name]})")
            parts += [text for text in (guesses(chosen), sources(chosen)) if text]
    return "\n\n".join(parts) + "\n"


def draw(found: Sequence[Row]) -> Iterator[tuple[str, Any]]:
    """Yield (name, figure): the overview of accuracies, then the curves of each experiment."""
    from cifar_lab.figures import curves
    from cifar_lab.figures.reproduction import Mark, draw_marks

    marks = []
    for row in found:
        measured = interval(row.values)
        if measured and row.claim.value is not None and "accuracy" in row.claim.metric:
            name = row.claim.id or row.claim.metric
            marks.append(
                Mark(name, row.claim.value, measured.mean, measured.half_width, row.verdict.word)
            )
    if marks:
        yield "overview", draw_marks(marks)
    groups: dict[str, dict[str, list[RunDir]]] = {}
    protocols: dict[str, set[str]] = {}
    for row in found:
        protocols.setdefault(row.study.name, set()).add(row.config.protocol)
    for study, rows_of_study in groupby(found, key=lambda row: row.study):
        both = len(protocols[study.name]) > 1
        labels = {_recipe(config): _setting(config, study) for config in study.configs}
        for run in quoted(rows_of_study):
            label = labels.get(_recipe(run.config))
            if label is not None:  # else it is of another experiment, or of the sound protocol
                label += f", {run.config.protocol} protocol" * both
                groups.setdefault(study.name, {}).setdefault(label, []).append(run.run)
    for name, cells in groups.items():
        yield name, curves.bands(cells)


_RULE = (
    "How a figure is judged (`src/cifar_lab/verdicts.py`). With three seeds or more it is "
    "*reproduced* if it lies in the 95 % prediction interval for one more run (t distribution; "
    "the binomial variance is added where the validation images were drawn at random), else it "
    "*differs*. With fewer it is *consistent* within the row's tolerance, else it *differs so "
    "far*. What a report says in words is judged by the interval of the mean, or of the "
    "difference. It *cannot be judged* where a guess decides. Measured: the mean and half of the "
    "width of its 95 % interval over the seeds. Sound: the figure under the sound protocol, which "
    "takes validation from the training images and tests once, with the weights that validation "
    "chose."
)


def _cells(row: Row) -> tuple[str, ...]:
    claim, verdict = row.claim, str(row.verdict)
    if row.verdict.word.startswith("differs") and claim.suspected:
        verdict += f"; suspected: {claim.suspected}"
    if row.config.protocol == "sound":
        sound = "this one"
    elif row.same_as_sound:
        sound = "the same"
    else:
        sound = tables.score_text(claim.metric, row.sound)
    return (
        claim.id or claim.metric,
        reported(claim),
        row.measured,
        str(len(row.values)),
        row.config.protocol,
        sound,
        verdict,
        "; ".join(filter(None, [claim.says, claim.source, claim.note])),
    )


def _what(row: Row) -> str:
    setting = show_settings(row.claim.where)
    title = row.config.study.title or row.study.name
    return ": ".join(filter(None, [title, setting])) + f", {row.claim.metric.replace('_', ' ')}"


def _setting(config: RunConfig, study: Study) -> str:
    """Return what tells a cell of an experiment from the others, for a legend."""
    choices = [c.choices for c in study.configs]
    groups = [g for g in config.choices if len({one.get(g) for one in choices}) > 1]
    flat = [flatten(identity(one)) for one in study.configs]
    own = flatten(identity(config))
    keys = [
        key
        for key in own
        if key.partition(".")[0] not in groups and any(one.get(key) != own[key] for one in flat)
    ]
    parts = [config.choices[group] for group in groups]
    parts += [f"{key.removeprefix('optimizer.')} {show_value(own[key])}" for key in keys]
    return ", ".join(parts) or study.name


def _recipe(config: RunConfig) -> str:
    """Return what runs that measure the same figure have in common."""
    plain = {k: v for k, v in identity(config).items() if k not in _NOT_THE_RECIPE}
    return json.dumps(plain, sort_keys=True)
