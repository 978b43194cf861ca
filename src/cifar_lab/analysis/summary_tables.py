"""A collection of runs as summary.csv and summary.md, which the console shows too."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from cifar_lab.analysis import run_metrics, texts
from cifar_lab.analysis.claims import JudgedClaim, reported, show_where
from cifar_lab.analysis.load_runs import FoundRun
from cifar_lab.analysis.seed_groups import RunCollection, SeedGroup
from cifar_lab.errors import shorten
from cifar_lab.runs.text import duration, markdown_table

WITH_SPREAD = ("best_val_accuracy", "final_val_accuracy", "best_val_loss", "test_accuracy")
"""Metrics that summary.csv gives with standard deviation and interval."""

MEANS = ("best_epoch", "epochs", "test_loss", "parameters", "seconds_per_epoch")
"""Metrics of which the mean is enough; the last is a time and never the same twice."""

Claims = Sequence[tuple[str, SeedGroup | None, JudgedClaim]]
"""What `claims.of_collection` returns."""


def summary_csv(collection: RunCollection, *, test: bool) -> str:
    """Return a row per setting; the test columns of all but the best are empty unless `test`."""
    names = list(dict.fromkeys([collection.metric, *WITH_SPREAD]))
    with_folds = any(setting.folds is not None for setting in collection.settings)
    header = [*collection.axes, "rank", "chosen", "n", "seeds", *(["folds"] * with_folds)]
    header += ["unfinished", "failed"]
    for name in names:
        header += [name, f"{name}_std", f"{name}_low", f"{name}_high"]
    header += ["difference_from_best", "p_adjusted", *MEANS]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([_csv_text(name) for name in header])
    for setting in collection.settings:
        counts = texts.status_counts(setting)
        row: list[Any] = [_csv_text(value) for value in setting.key]
        row += [setting.rank, "yes" if setting.chosen else "", len(setting.finished)]
        seeds = (run.config.seed for run in setting.finished)
        row += [" ".join(str(seed) for seed in (dict.fromkeys(seeds) if with_folds else seeds))]
        row += [" ".join(map(str, setting.finished_folds))] * with_folds
        row += [
            sum(counts.get(s, 0) for s in ("queued", "running", "interrupted")),
            counts.get("failed", 0),
        ]
        for name in names:
            found = setting.interval(name) if shows(name, setting, test=test) else None
            spread = (found.mean, found.std, found.low, found.high) if found else (None,) * 4
            row += [_number(value) for value in spread]
        against = setting.against_best
        row += [_number(-against.difference if against else None), _number(setting.p_adjusted)]
        row += [_number(setting.mean(n) if shows(n, setting, test=test) else None) for n in MEANS]
        writer.writerow(["" if value is None else value for value in row])
    return buffer.getvalue()


def summary_md(collection: RunCollection, claims: Claims, *, test: bool) -> str:
    """Return what the folder shows, in words and tables."""
    title = markdown(collection.folder.resolve().name)
    parts = [f"# Summary of {title}", texts.counts_text(collection)]
    if collection.axes:
        parts.append(_axes_text(collection))
    parts += [f"> {markdown(note)}" for note in collection.notes]
    best = [setting for setting in collection.ranking if setting.chosen]
    if best:
        parts.append("## Best")
        parts += [f"- {markdown(texts.best_text(collection, setting))}" for setting in best]
    parts += ["## Ranking" if collection.ranked else "## Settings"]
    parts += [ranking_table(collection, test=test), texts.testing_text(collection)]
    if claims:
        parts += ["## Reported and measured", claims_table(collection, claims)]
    unfinished = unfinished_table(collection)
    if unfinished:
        parts += ["## Unfinished and failed", unfinished]
    problems = [
        f"- {markdown(texts.folder_text(collection, run.run.path))}: {markdown(shorten(text, 300))}"
        for run in collection.runs
        for text in run.problems
    ]
    problems += [
        f"- {markdown(texts.folder_text(collection, one.path))}: {markdown(one.reason)}"
        for one in collection.unreadable
    ]
    if problems:
        parts += ["## Not readable", "\n".join(problems)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _axes_text(collection: RunCollection) -> str:
    """Return which config groups and keys differ between the runs."""
    names = [f"`{_code(axis)}`" for axis in collection.axes]
    main = [names[i] for i in collection.main_axes]
    others = [name for name in names if name not in main]
    text = f"Axes: {', '.join(main)}."
    return text + f" These follow from them: {', '.join(others)}." * bool(others)


def shows(name: str, setting: SeedGroup, *, test: bool) -> bool:
    """Whether a metric is shown for a setting: a test score for the best alone, unless `test`."""
    return test or setting.chosen or not run_metrics.is_test(name)


def ranking_table(collection: RunCollection, *, test: bool) -> str:
    """Return the settings in order of rank as a Markdown table."""
    settings = collection.ranking
    names = [
        name
        for name in dict.fromkeys(
            [collection.metric, *("best_val_accuracy", "best_val_loss", "best_epoch")]
        )
        if any(setting.mean(name) is not None for setting in settings)
    ]
    tested = [
        one.mean("test_accuracy") for one in settings if shows("test_accuracy", one, test=test)
    ]
    if "test_accuracy" not in names and any(mean is not None for mean in tested):
        names.append("test_accuracy")
    several = len({one.dataset for one in settings}) > 1 and "dataset" not in collection.axes
    compared = texts.has_verdicts(collection)
    axes = collection.main_axes
    header = [*(["dataset"] * several), "rank", *(collection.axes[i] for i in axes), "n", *names]
    header += ["against the best"] * compared
    rows = []
    for setting in settings:
        row = [setting.dataset] * several
        row += [str(setting.rank or "–"), *(setting.key[i] for i in axes), texts.runs_text(setting)]
        for name in names:
            found = setting.interval(name) if shows(name, setting, test=test) else None
            row.append(run_metrics.show_interval(name, found))
        rows.append([*row, *([texts.verdict_text(setting)] * compared)])
    return table(header, rows)


def claims_table(collection: RunCollection, claims: Claims) -> str:
    """Return reported against measured as a Markdown table."""
    rows = []
    for report, setting, judged in claims:
        claim, found = judged.claim, judged.interval
        where = show_where(claim.where)
        if setting is not None and sum(one.claim == claim for _, _, one in claims) > 1:
            where = collection.label(setting)
        rows.append(
            [
                claim.id or report,
                judged.metric,
                where,
                reported(claim),
                run_metrics.show_interval(claim.metric, found),
                str(found.n) if found else "0",
                run_metrics.show_difference(claim.metric, judged.off),
                str(judged.verdict),
                judged.source,
            ]
        )
    header = ["claim", "metric", "where", "reported", "measured", "n", "difference", "verdict"]
    return table([*header, "source"], rows)


def unfinished_table(collection: RunCollection) -> str:
    """Return the runs that are not finished, with their progress or error; "" if all are."""
    rows = [
        [
            run.summary.status,
            collection.label(setting),
            run.replicate_text,
            texts.progress_text(run),
            shorten(run.summary.error or "", 300),
            texts.folder_text(collection, run.run.path),
        ]
        for setting in collection.settings
        for run in setting.runs
        if not run.finished
    ]
    header = ["status", "setting", "run", "epoch", "error", "folder"]
    return table(header, rows) if rows else ""


def timing_table(runs: Iterable[FoundRun]) -> str:
    """Return a Markdown table of training times, a row for each device, precision and model.

    Runs that share what decides the time are one row: seconds per epoch is their mean over all
    epochs, images per second all images by all seconds. Runs without an epoch are left out.
    """
    groups: dict[tuple[str, ...], list[FoundRun]] = {}
    key: tuple[str, ...]
    for run in runs:
        if run.history:
            summary = run.summary
            key = (
                summary.device,
                summary.device_name or "–",
                summary.precision,
                "–" if summary.threads is None else str(summary.threads),
                run.choices["model"],
                run.config.dataset.name,
                str(run.config.training.batch_size),
            )
            groups.setdefault(key, []).append(run)
    rows: list[tuple[str, ...]] = []
    for key in sorted(groups):
        members = groups[key]
        epochs = [row for run in members for row in run.history]
        seconds = sum(row.seconds for row in epochs)
        images = sum(row.seconds * row.images_per_second for row in epochs)
        rate = f"{images / seconds:,.0f}" if seconds > 0 else "–"
        counts = (str(len(members)), str(len(epochs)), f"{seconds / len(epochs):.1f}")
        rows.append((*key, *counts, rate, duration(seconds)))
    header = ("device", "device name", "precision", "threads", "model", "dataset", "batch size")
    times = ("runs", "epochs", "seconds per epoch", "images per second", "total")
    return table((*header, *times), rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are aligned in the source too."""
    escaped = [[markdown(cell) for cell in row] for row in rows]
    return markdown_table([markdown(cell) for cell in header], escaped)


def markdown(text: str) -> str:
    """Return text that Markdown shows as it is, on one line; no HTML in it is HTML."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    line = re.sub(r"&(?=[#\w])", "&amp;", line)
    line = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", line)
    line = re.sub(r"([\\`*\[\]|~])", r"\\\1", line)
    return re.sub(r"^([>#+-])(?= |$)", r"\\\1", line)


def _code(text: str) -> str:
    return shorten(text, 80).replace("`", "'")


def _number(value: float | None) -> str | None:
    if value is None:
        return None
    return str(int(value)) if float(value).is_integer() and abs(value) >= 1 else f"{value:.10g}"


def _csv_text(text: str) -> str:
    """Return a cell that no spreadsheet reads as a formula."""
    try:
        float(text)
    except ValueError:
        return "'" + text if text[:1] in "=+-@\t\r" and text[:1] else text
    return text
