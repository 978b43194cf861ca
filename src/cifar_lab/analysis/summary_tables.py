"""A collection of runs as tables and documents: summary.csv, summary.md, the console, a paper."""

from collections.abc import Sequence
from typing import Any

from cifar_lab.analysis import run_metrics, texts
from cifar_lab.analysis.ranking import MainEffects
from cifar_lab.analysis.seed_groups import RunCollection, SeedGroup, short_names
from cifar_lab.errors import shorten
from cifar_lab.runs.text import Table, fill, markdown

WITH_SPREAD = ("best_val_accuracy", "final_val_accuracy", "best_val_loss", "test_accuracy")
"""Metrics that summary.csv gives with standard deviation and interval."""

MEANS = ("best_epoch", "epochs", "test_loss", "parameters", "seconds_per_epoch")
"""Metrics of which the mean is enough; the last is a time and never the same twice."""

Block = str | list[str] | Table
"""A paragraph, a list of points, or a table."""

Section = tuple[str, Sequence[Block]]
"""A part of a document: its title, and what stands below it."""


def summary_csv(collection: RunCollection, *, test: bool) -> str:
    """Return a row per group; the test columns of all but the best are empty unless `test`."""
    names = list(dict.fromkeys([collection.metric, *WITH_SPREAD]))
    with_folds = any(group.folds is not None for group in collection.groups)
    header = [*collection.axes, "rank", "chosen", "n", "seeds"]
    header += [*["folds"] * with_folds, "unfinished", "failed"]
    header += [f"{name}{part}" for name in names for part in ("", "_std", "_low", "_high")]
    to = "baseline" if collection.baseline else "best"
    header += [f"difference_from_{to}", "difference_low", "difference_high", "p_adjusted"]
    header += ["smallest_shown", *MEANS]
    rows = []
    for group in collection.groups:
        finished = group.finished
        failed = sum(run.summary.status == "failed" for run in group.runs)
        row: list[Any] = [*group.key, group.rank]
        row += ["yes" if group.chosen else None]
        seeds = [str(run.config.seed) for run in finished]
        row += [len(finished), " ".join(dict.fromkeys(seeds) if with_folds else seeds)]
        row += [" ".join(map(str, group.finished_folds))] * with_folds
        row += [len(group.runs) - len(finished) - failed, failed]
        for name in names:
            found = group.interval(name) if shows(name, group, test=test) else None
            row += [found.mean, found.std, found.low, found.high] if found else [None] * 4
        d = group.difference
        row += [d.value, d.low, d.high, d.p, d.smallest] if d else [None] * 5
        row += [group.mean(n) if shows(n, group, test=test) else None for n in MEANS]
        rows.append(row)
    return Table(header, rows).csv()


def sections(
    collection: RunCollection, effects: Sequence[MainEffects], *, test: bool
) -> list[Section]:
    """Return what the folder shows: the first section has the folder's name."""
    notes = [f"Note: {note}" for note in collection.notes]
    names = [shorten(axis, 80) for axis in collection.axes]
    main = [names[i] for i in collection.main_axes]
    others = ", ".join(name for name in names if name not in main)
    axes = [f"Axes: {', '.join(main)}."] * bool(main)
    axes += [f"These follow from them: {others}."] * bool(others)
    first: list[Block] = [texts.counts_text(collection), " ".join(axes), *notes]
    parts: list[Section] = [(f"Summary of {collection.folder.resolve().name}", first)]
    if best := texts.conclusion(collection):
        parts.append(("Best", [best]))
    below = [texts.testing_text(collection), texts.selection_text(collection)]
    title = "Ranking" if collection.ranked else "Configurations"
    parts.append((title, [ranking_table(collection, test=test), *below]))
    parts += [
        (
            f"Main effects on {run_metrics.in_words(collection.metric)}, {found.dataset}",
            [texts.effects_lines(collection, found)],
        )
        for found in effects
    ]
    unfinished = unfinished_table(collection)
    if unfinished.rows:
        parts.append(("Unfinished and failed", [unfinished]))
    problems = [f"{folder}: {text}" for folder, text in texts.problems(collection)]
    if problems:
        parts.append(("Not readable, or contradictory", [problems]))
    return parts


def as_markdown(parts: Sequence[Section]) -> str:
    """Return a document as Markdown, in which names and values are shown as they are."""

    def shown(block: Block) -> str:
        if isinstance(block, Table):
            return block.markdown()
        if isinstance(block, list):
            return "\n".join(f"- {markdown(point)}" for point in block)
        return f"> {markdown(block[6:])}" if block.startswith("Note: ") else markdown(block)

    chunks = []
    for level, (title, blocks) in enumerate(parts):
        chunks += [f"{'#' if level == 0 else '##'} {markdown(title)}"]
        chunks += [shown(block) for block in blocks if block]
    return "\n\n".join(chunks) + "\n"


def as_text(parts: Sequence[Section], width: int) -> str:
    """Return a document for a terminal of that width."""

    def shown(block: Block) -> str:
        if isinstance(block, Table):
            return block.text(width)
        points = block if isinstance(block, list) else [block]
        return "\n".join(fill(point, width, "- " if points is block else "") for point in points)

    chunks = []
    for title, blocks in parts:
        chunks.append(title + "\n" + "-" * min(len(title), width))
        chunks += [shown(block) for block in blocks if block]
    return "\n\n".join(chunks) + "\n"


def shows(name: str, group: SeedGroup, *, test: bool) -> bool:
    """Whether a metric is shown for a group: a test score for the best alone, unless `test`."""
    return test or group.chosen or not run_metrics.is_test(name)


def ranking_table(collection: RunCollection, *, test: bool) -> Table:
    """Return the groups in order of rank, each with its difference to the reference."""
    groups = collection.ranking
    wanted = dict.fromkeys([collection.metric, "best_val_accuracy", "best_val_loss", "best_epoch"])
    names = [name for name in wanted if any(group.mean(name) is not None for group in groups)]
    shown_test = (g.mean("test_accuracy") for g in groups if shows("test_accuracy", g, test=test))
    if "test_accuracy" not in names and any(mean is not None for mean in shown_test):
        names.insert(1, "test_accuracy")
    axes = [collection.axes[i] for i in collection.main_axes]
    compared = any(group.difference for group in groups)
    header = ["rank", *short_names(axes), "n"]
    header += [run_metrics.in_words(names[0])] if names else []
    header += [f"to {texts.reference_name(collection)}", "p", "verdict", "would show"] * compared
    essential = len(header)
    header += [run_metrics.in_words(name) for name in names[1:]]
    rows = []
    for group in groups:
        scores = [
            run_metrics.show_interval(
                name, group.interval(name) if shows(name, group, test=test) else None
            )
            for name in names
        ]
        said = texts.say_of(collection, group)
        p = said.p.removeprefix("p ").removeprefix("= ")
        judged = [said.difference, p, said.verdict, said.would_show] * compared
        row = [str(group.rank or "–"), *(group.key[i] for i in collection.main_axes)]
        done, every = len(group.finished), len(group.runs)
        row += [str(done) if done == every else f"{done} of {every}"]
        rows.append([*row, *scores[:1], *judged, *scores[1:]])
    return Table(header, rows, essential)


def paper(collection: RunCollection, form: str, *, test: bool) -> str:
    """Return the ranking for a paper as `latex`, `csv` or `markdown`, with the marks explained."""
    whole = ranking_table(collection, test=test)
    left_out = {"rank", "p", "verdict", "would show", "validation loss", "best epoch"}
    left_out |= set() if test else {"test accuracy"}  # which only the best has
    left_out -= {run_metrics.in_words(collection.metric)}
    header, columns = [], []
    for i, name in enumerate(whole.header):
        if name in left_out:
            continue
        cells = [str(row[i]) for row in whole.rows]
        for unit in ("%", "points"):  # once, in the header
            if all(cell.endswith(f" {unit}") or cell in ("", "–") for cell in cells):
                name = f"{name} ({unit})"
                cells = [cell.removesuffix(f" {unit}") for cell in cells]
        if name.startswith("to the"):
            marks = (" †" * group.is_tied for group in collection.ranking)
            cells = [cell + mark for cell, mark in zip(cells, marks, strict=True)]
        header.append(name)
        columns.append(cells)
    table = Table(header, list(zip(*columns, strict=True)))
    testing = texts.testing_text(collection).partition(" Not told apart")[0]
    tied = " †: not told apart." * any(group.is_tied for group in collection.groups)
    caption = f"Mean over n runs with its 95 % interval. {testing}".rstrip() + tied
    if form == "markdown":
        return f"{table.markdown()}\n\n{markdown(caption)}\n"
    return table.latex(caption) if form == "latex" else table.csv()


def unfinished_table(collection: RunCollection) -> Table:
    """Return the runs that are not finished, with their progress or error."""
    rows = []
    for group in collection.groups:
        for run in (run for run in group.runs if not run.finished):
            row = [run.summary.status, collection.label(group), run.replicate_text]
            row += [run.progress_text, shorten(run.summary.error or "", 300)]
            rows.append([*row, texts.folder_text(collection, run.run.path)])
    return Table(["status", "configuration", "run", "epoch", "error", "folder"], rows)
