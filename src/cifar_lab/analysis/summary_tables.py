"""A collection of runs as tables: summary.csv, and summary.md, which the console shows too."""

from collections.abc import Iterable, Sequence
from typing import Any

from cifar_lab.analysis import run_metrics, texts
from cifar_lab.analysis.claims import JudgedClaim, reported, show_where
from cifar_lab.analysis.load_runs import FoundRun
from cifar_lab.analysis.seed_groups import RunCollection, SeedGroup
from cifar_lab.errors import shorten
from cifar_lab.runs.text import Table, duration, markdown

WITH_SPREAD = ("best_val_accuracy", "final_val_accuracy", "best_val_loss", "test_accuracy")
"""Metrics that summary.csv gives with standard deviation and interval."""

MEANS = ("best_epoch", "epochs", "test_loss", "parameters", "seconds_per_epoch")
"""Metrics of which the mean is enough; the last is a time and never the same twice."""

Claims = Sequence[tuple[str, SeedGroup | None, JudgedClaim]]
"""What `claims.of_collection` returns."""


def summary_csv(collection: RunCollection, *, test: bool) -> str:
    """Return a row per group; the test columns of all but the best are empty unless `test`."""
    names = list(dict.fromkeys([collection.metric, *WITH_SPREAD]))
    with_folds = any(group.folds is not None for group in collection.groups)
    header = [*collection.axes, "rank", "chosen", "n", "seeds", *(["folds"] * with_folds)]
    header += ["unfinished", "failed"]
    header += [f"{name}{part}" for name in names for part in ("", "_std", "_low", "_high")]
    header += ["difference_from_best", "p_adjusted", *MEANS]
    rows = []
    for group in collection.groups:
        finished = group.finished
        failed = sum(run.summary.status == "failed" for run in group.runs)
        row: list[Any] = [*group.key, group.rank, "yes" if group.chosen else None]
        seeds = [str(run.config.seed) for run in finished]
        row += [len(finished), " ".join(dict.fromkeys(seeds) if with_folds else seeds)]
        row += [" ".join(map(str, group.finished_folds))] * with_folds
        row += [len(group.runs) - len(finished) - failed, failed]
        for name in names:
            found = group.interval(name) if shows(name, group, test=test) else None
            row += [found.mean, found.std, found.low, found.high] if found else [None] * 4
        against = group.against_best
        row += [-against.difference if against else None, group.p_adjusted]
        row += [group.mean(n) if shows(n, group, test=test) else None for n in MEANS]
        rows.append(row)
    return Table(header, rows).csv()


def summary_md(collection: RunCollection, claims: Claims, *, test: bool) -> str:
    """Return what the folder shows, in words and tables."""
    title = markdown(collection.folder.resolve().name)
    parts = [f"# Summary of {title}", texts.counts_text(collection)]
    if collection.axes:
        parts.append(_axes_text(collection))
    parts += [f"> {markdown(note)}" for note in collection.notes]
    best = [group for group in collection.ranking if group.chosen]
    if best:
        parts.append("## Best")
        parts += [f"- {markdown(texts.best_text(collection, group))}" for group in best]
    parts += ["## Ranking" if collection.ranked else "## Configurations"]
    parts += [ranking_table(collection, test=test).markdown(), texts.testing_text(collection)]
    if claims:
        parts += ["## Reported and measured", claims_table(collection, claims).markdown()]
    unfinished = unfinished_table(collection)
    if unfinished.rows:
        parts += ["## Unfinished and failed", unfinished.markdown()]
    problems = [
        f"- {markdown(folder)}: {markdown(text)}" for folder, text in texts.problems(collection)
    ]
    if problems:
        parts += ["## Not readable", "\n".join(problems)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _axes_text(collection: RunCollection) -> str:
    """Return which config groups and keys differ between the runs."""
    names = ["`" + shorten(axis, 80).replace("`", "'") + "`" for axis in collection.axes]
    main = [names[i] for i in collection.main_axes]
    others = [name for name in names if name not in main]
    text = f"Axes: {', '.join(main)}."
    return text + f" These follow from them: {', '.join(others)}." * bool(others)


def shows(name: str, group: SeedGroup, *, test: bool) -> bool:
    """Whether a metric is shown for a group: a test score for the best alone, unless `test`."""
    return test or group.chosen or not run_metrics.is_test(name)


def ranking_table(collection: RunCollection, *, test: bool) -> Table:
    """Return the configurations in order of rank."""
    groups = collection.ranking
    wanted = [collection.metric, "best_val_accuracy", "best_val_loss", "best_epoch"]
    names = [
        name
        for name in dict.fromkeys(wanted)
        if any(group.mean(name) is not None for group in groups)
    ]
    tested = [one.mean("test_accuracy") for one in groups if shows("test_accuracy", one, test=test)]
    if "test_accuracy" not in names and any(mean is not None for mean in tested):
        names.append("test_accuracy")
    several = len({one.dataset for one in groups}) > 1 and "dataset" not in collection.axes
    compared = texts.has_verdicts(collection)
    axes = collection.main_axes
    header = [*(["dataset"] * several), "rank", *(collection.axes[i] for i in axes), "n", *names]
    header += ["against the best"] * compared
    rows = []
    for group in groups:
        row = [group.dataset] * several
        row += [str(group.rank or "–"), *(group.key[i] for i in axes), texts.runs_text(group)]
        for name in names:
            found = group.interval(name) if shows(name, group, test=test) else None
            row.append(run_metrics.show_interval(name, found))
        rows.append([*row, *([texts.verdict_text(group)] * compared)])
    return Table(header, rows)


def claims_table(collection: RunCollection, claims: Claims) -> Table:
    """Return reported against measured."""
    rows = []
    for report, group, judged in claims:
        claim, found = judged.claim, judged.interval
        where = show_where(claim.where)
        if group is not None and sum(one.claim == claim for _, _, one in claims) > 1:
            where = collection.label(group)
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
    return Table([*header, "source"], rows)


def unfinished_table(collection: RunCollection) -> Table:
    """Return the runs that are not finished, with their progress or error."""
    rows = [
        [
            run.summary.status,
            collection.label(group),
            run.replicate_text,
            texts.progress_text(run),
            shorten(run.summary.error or "", 300),
            texts.folder_text(collection, run.run.path),
        ]
        for group in collection.groups
        for run in group.runs
        if not run.finished
    ]
    return Table(["status", "configuration", "run", "epoch", "error", "folder"], rows)


def timing_table(runs: Iterable[FoundRun]) -> Table:
    """Return training times, a row for each device, precision and model.

    Runs that share what decides the time are one row: seconds per epoch is their mean over all
    epochs, images per second all images by all seconds. Runs without an epoch are left out.
    """
    groups: dict[tuple[str, ...], list[FoundRun]] = {}
    for run in runs:
        if run.history:
            summary = run.summary
            key: tuple[str, ...] = (
                summary.device,
                summary.device_name or "–",
                summary.precision,
                "–" if summary.threads is None else str(summary.threads),
                run.choices["model"],
                run.config.dataset.name,
                str(run.config.training.batch_size),
            )
            groups.setdefault(key, []).append(run)
    rows = []
    for key, members in sorted(groups.items(), key=lambda item: item[0]):
        epochs = [row for run in members for row in run.history]
        seconds = sum(row.seconds for row in epochs)
        images = sum(row.seconds * row.images_per_second for row in epochs)
        rate = f"{images / seconds:,.0f}" if seconds > 0 else "–"
        counts = (str(len(members)), str(len(epochs)), f"{seconds / len(epochs):.1f}")
        rows.append([*key, *counts, rate, duration(seconds)])
    header = ("device", "device name", "precision", "threads", "model", "dataset", "batch size")
    times = ("runs", "epochs", "seconds per epoch", "images per second", "total")
    return Table((*header, *times), rows)
