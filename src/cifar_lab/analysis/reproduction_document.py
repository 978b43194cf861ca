"""Reported and measured figures as text: the table, the document with its pictures."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cifar_lab.analysis import claims, run_metrics
from cifar_lab.analysis.epoch_study import EpochStudy
from cifar_lab.analysis.html_report import PAGES
from cifar_lab.analysis.reproduction import Row, quoted, recipe
from cifar_lab.analysis.verdicts import REFUTED, Verdict, joint
from cifar_lab.runs.provenance import code_version
from cifar_lab.runs.provenance import other_code as differs_from
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.templates import render
from cifar_lab.runs.text import Table, duration, markdown


def full_table(rows: Sequence[Row]) -> str:
    """Return a Markdown table with a line for each row."""
    header = ("figure", "reported", "measured", "n", "protocol", "sound", "verdict", "source")
    return Table(header, [_line(row) for row in rows]).markdown()


def short_table(rows: Sequence[Row]) -> str:
    """Return the first figure of each configuration: what the README shows."""
    first: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row.claim.value is not None:
            where = claims.show_where(row.claim.where)
            first.setdefault((row.experiment.name, where), row)
    header = ("figure", "what", "reported", "measured", "n", "verdict")
    lines = [
        (
            row.claim.name,
            ": ".join(filter(None, [row.config.study.title or name, where]))
            + f", {row.claim.metric.replace('_', ' ')}",
            claims.reported(row.claim),
            run_metrics.show_interval(row.claim.metric, row.judged.interval),
            str(len(row.judged.values)),
            _in_short(row.judged.verdict),
        )
        for (name, where), row in first.items()
    ]
    return Table(header, lines).markdown()


def _in_short(verdict: Verdict) -> str:
    """Return a verdict's word, or of what is not judged the reason: `fitted to the report`."""
    return verdict.reason.partition(":")[0] if verdict.word == "not judged" else verdict.word


def guesses(rows: Sequence[Row]) -> str:
    """Return what had to be guessed, a paragraph for each experiment."""
    lines = {row.experiment.name: row.experiment.reported.guessed for row in rows}
    return "\n\n".join(
        f"Guessed in {name}: {markdown('; '.join(guessed))}."
        for name, guessed in lines.items()
        if guessed
    )


def margins(rows: Sequence[Row]) -> str:
    """Return which margins were stated, for which figures and why, a line for each."""
    names: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if margin := row.claim.margin:
            width = run_metrics.show_width(row.claim.metric, margin.size)
            names.setdefault((width, margin.reason), []).append(row.claim.name)
    lines = []
    for (width, reason), claims_of_it in names.items():
        listed = ", ".join(claims_of_it)
        if len(claims_of_it) > 6:
            listed = f"{len(claims_of_it)} figures, {claims_of_it[0]} to {claims_of_it[-1]}"
        lines.append(f"- ±{width} for {listed}: {reason}")
    return "\n".join(["Margins:", "", *lines]) if lines else ""


def sources(rows: Sequence[Row]) -> str:
    """Return the runs behind the rows: folder, device, time, commit."""
    lines = [
        (
            f"{run.run.path}",
            run.summary.device_name or "–",
            run.config.precision,
            duration(run.summary.seconds),
            run.summary.commit or "–",
        )
        for run in sorted(quoted(rows), key=lambda run: run.run.path)
    ]
    header = ("run", "device", "precision", "training", "commit")
    return Table(header, lines).markdown() if lines else ""


def other_code(rows: Sequence[Row]) -> str:
    """Return how many of the runs behind the rows were made by other code; "" if none were."""
    runs = quoted(rows)
    others = sum(differs_from(run.summary, code_version(run.config)) is not None for run in runs)
    if not others:
        return ""
    return f"Made by other code than today's: {others} of these {len(runs)} runs."


def joint_sentence(rows: Sequence[Row]) -> str:
    """Return one sentence about all rows of a report, adjusted for their number."""
    return joint([row.judged.verdict for row in rows])


def by_report(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each report, by its tag."""
    return _grouped(rows, lambda row: row.config.study.report or "")


def document(rows: Sequence[Row], pictures: dict[str, str], command: str) -> str:
    """Return the whole as Markdown: what the reports are, in short, then each report.

    `pictures`: {experiment or "overview": path relative to the document}.
    """
    runs = quoted(rows)
    continued = {Path(run.config.continue_from or "").name for run in runs}  # theirs count twice
    seconds = sum(run.summary.seconds for run in runs if run.run.path.name not in continued)
    return render(
        PAGES / "reproduction.md",
        rows=rows,
        reports=by_report(rows),
        by_experiment=_by_experiment,
        measured=lambda part: any(row.judged.values for row in part),
        counts=sorted(Counter(row.judged.verdict.word for row in rows).items()),
        runs=len(runs),
        time=duration(seconds),
        command=command,
        pictures=pictures,
        short_table=short_table,
        full_table=full_table,
        joint=joint_sentence,
        studies=_studies,
        guesses=guesses,
        margins=margins,
        sources=sources,
    )


def draw(rows: Sequence[Row]) -> Iterator[tuple[str, Any]]:
    """Yield (name, figure): the overview of accuracies, then the curves of each experiment."""
    from cifar_lab.figures import curves
    from cifar_lab.figures.epoch_study import draw as draw_epochs
    from cifar_lab.figures.reproduction import Mark, draw_marks

    marks = [
        Mark(row.claim.name, row.claim.value, mean.mean, mean.ends, row.judged.verdict.word)
        for row in rows
        if (mean := row.judged.interval) and row.claim.value is not None
        if "accuracy" in row.claim.metric and not row.claim.above
    ]
    if marks:
        yield "overview", draw_marks(marks)
    for name, chosen in _by_experiment(rows).items():
        for study in _studies(chosen):
            reported = study.claim.value or 0.0
            means = {epochs: reported + e.off for epochs, e in study.estimates.items()}
            yield (
                f"{name}_epochs",
                draw_epochs(means, study.halves, reported, study.claim.rounding),
            )
        if lines := _curves(chosen):
            yield name, curves.bands(lines)


def _studies(rows: Sequence[Row]) -> list[EpochStudy]:
    """Return the study of the number of epochs, if the rows hold the figure it is chosen by."""
    candidates = [row.judged.candidate for row in rows]
    studies = [candidate.study for candidate in candidates if candidate and candidate.study]
    return [study for study in studies[:1] if study.claim in [row.claim for row in rows]]


def _by_experiment(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return _grouped(rows, lambda row: row.experiment.name)


def _grouped(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _curves(rows: Sequence[Row]) -> dict[str, list[RunDir]]:
    """Return the runs of an experiment's rows by configuration, without those of others."""
    experiment = rows[0].experiment
    labels = {recipe(config): experiment.label(config) for config in experiment.configs}
    lines: dict[str, list[RunDir]] = {}
    for run in quoted(rows):
        if label := labels.get(recipe(run.config)):
            lines.setdefault(label, []).append(run.run)
    return lines


def _line(row: Row) -> tuple[str, ...]:
    claim, verdict = row.claim, str(row.judged.verdict)
    if row.judged.verdict.word in REFUTED and claim.suspected:
        verdict += f"; suspected: {claim.suspected}"
    sound = run_metrics.show_interval(claim.metric, row.sound_interval)
    if row.sound:
        sound += f" (n = {len(row.sound)})"
    if row.same_as_sound:
        sound = "the same"
    if row.config.protocol == "sound":
        sound = "this one"
    return (
        claim.name,
        claims.reported(claim),
        run_metrics.show_interval(claim.metric, row.judged.interval),
        str(len(row.judged.values)),
        row.config.protocol,
        sound,
        verdict,
        row.judged.source,
    )
