"""Reported and measured figures as text: the table, the document with its pictures."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cifar_lab.analysis import claims, run_metrics
from cifar_lab.analysis.epoch_study import EpochStudy
from cifar_lab.analysis.reproduction import Row, quoted, recipe
from cifar_lab.analysis.verdicts import REFUTED, Verdict, joint
from cifar_lab.runs.provenance import code_version
from cifar_lab.runs.provenance import other_code as differs_from
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.text import Table, duration, markdown

_ABOUT = (
    "Five students' reports describe how image classifiers were trained in a course on deep "
    "learning, and what accuracy they reached. The reports leave details open and repeat common "
    "mistakes, such as choosing a model by its test score. cifar_lab trains the same networks "
    "again; this page sets each figure and each finding of the reports beside what was measured:"
)

_RULE = """\
How to read the tables:

- **reported** is what the report prints. **measured** is the mean over runs with different seeds, \
with the 95 % confidence interval of the mean; **n** is the number of runs. Some of them may have \
been trained on another device or in another precision (bf16 in place of fp32); the tables of runs \
name both.
- **protocol** is how the data were split and which weights were tested. `report` does what the \
report did, mistakes included. **sound** gives the figure under the sound protocol: validation \
images are taken from the training set, and the weights that are best on them are tested once.
- A printed number has a **margin**, stated with its reason in `conf/report`: what would count as \
the same. To it comes its rounding (76 % means 75.5 to 76.5 %). It is *reproduced* if the 90 % \
interval of measured minus reported lies within the margin (two one-sided tests at 5 %: Schuirmann \
1987). It *differs* if the mean is outside the margin, and the reported value outside the 95 % \
interval for one more run, mean ± t s √(1 + 1/n): no seed of ours would have given it.
- What a report says in words ("at least", "more than with") *holds* or is *contradicted* if the \
95 % interval of the difference lies on one side of it (Welch's, or with a pooled deviation).
- All else is *inconclusive*, with the number of seeds that would settle it if mean and deviation \
stayed as they are. No number does where a single run, such as the report's, scatters by more than \
the margin.
- The deviation s is that of the configuration's own seeds, or pooled over an experiment where \
`conf/report` gives a reason for it; **df** are its degrees of freedom. Runs that continue each \
other count as one (a random effect of the seed).
- *Not judged* are seconds, which depend on the machine; figures that follow from others; and \
figures *fitted to the report*, by which a guess was chosen.
- Of many figures some are settled by chance. The sentence at the head of each report says what \
remains after Holm's adjustment (1979), which keeps the chance of even one such below 5 %.

The rule is the function `judge` in `src/cifar_lab/analysis/verdicts.py`."""


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


def document(rows: Sequence[Row], pictures: dict[str, str], command: str) -> str:
    """Return the whole as Markdown: what the reports are, in short, then each report.

    `pictures`: {experiment or "overview": path relative to the document}.
    """
    counts = Counter(row.judged.verdict.word for row in rows)
    runs = quoted(rows)
    of_reports: dict[str, list[Row]] = {}
    for row in rows:
        of_reports.setdefault(row.config.study.report or "", []).append(row)
    reports = {tag: chosen[0].experiment.report for tag, chosen in of_reports.items()}
    continued = {Path(run.config.continue_from or "").name for run in runs}  # theirs count twice
    seconds = sum(run.summary.seconds for run in runs if run.run.path.name not in continued)
    parts = [
        "# Reported and measured",
        _ABOUT,
        "\n".join(
            f"- **{tag}**: {report.about}" for tag, report in reports.items() if report.about
        ),
        f"Written by `{command}` from the runs that are kept in `docs/results`: "
        f"{len(runs)} runs, {duration(seconds)} of training (hours:minutes:seconds). Of "
        f"{len(rows)} figures and findings: "
        + ", ".join(f"{n} {word}" for word, n in sorted(counts.items()))
        + ".",
        _RULE,
        "## In short",
        short_table(rows),
    ]
    if "overview" in pictures:
        parts.append(f"![Reported and measured accuracies]({pictures['overview']})")
    for tag, chosen in of_reports.items():
        parts += [f"## {tag}", reports[tag].about, joint([row.judged.verdict for row in chosen])]
        if facts := reports[tag].facts:
            parts += ["Without training:", "\n".join(f"- {fact}" for fact in facts)]
        for name, part in _by_experiment(chosen).items():
            parts += _experiment(name, part, pictures)
    return "\n\n".join(part for part in parts if part) + "\n"


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
            yield (
                f"{name}_epochs",
                draw_epochs(study.means, study.halves, study.reported, study.claim.rounding),
            )
        if lines := _curves(chosen):
            yield name, curves.bands(lines)


def _studies(rows: Sequence[Row]) -> list[EpochStudy]:
    """Return the study of the number of epochs, if the rows hold the figure it is chosen by."""
    candidates = [row.judged.candidate for row in rows]
    studies = [candidate.study for candidate in candidates if candidate and candidate.study]
    return [study for study in studies[:1] if study.claim in [row.claim for row in rows]]


def _by_experiment(rows: Sequence[Row]) -> dict[str, list[Row]]:
    experiments: dict[str, list[Row]] = {}
    for row in rows:
        experiments.setdefault(row.experiment.name, []).append(row)
    return experiments


def _curves(rows: Sequence[Row]) -> dict[str, list[RunDir]]:
    """Return the runs of an experiment's rows by configuration, without those of others."""
    experiment = rows[0].experiment
    labels = {recipe(config): experiment.label(config) for config in experiment.configs}
    lines: dict[str, list[RunDir]] = {}
    for run in quoted(rows):
        if label := labels.get(recipe(run.config)):
            lines.setdefault(label, []).append(run.run)
    return lines


def _experiment(name: str, rows: Sequence[Row], pictures: dict[str, str]) -> list[str]:
    """Return the part of the document about an experiment."""
    title = f"### {name}: {rows[0].config.study.title or ''}"
    if not any(row.judged.values for row in rows):
        figures = f"{len(rows)} figure{'s' * (len(rows) > 1)}"
        command = f"`python -m cifar_lab.reproduce {name}` runs it"
        return [title, f"Not measured yet ({figures}); {command}."]
    parts = [title, full_table(rows)]
    if name in pictures:
        parts.append(f"![Curves of {name}]({pictures[name]})")
    parts += [str(study) for study in _studies(rows)]
    if f"{name}_epochs" in pictures:
        parts.append(f"![{name} by the number of epochs]({pictures[f'{name}_epochs']})")
    return [*parts, guesses(rows), sources(rows)]


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
