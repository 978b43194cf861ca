"""A study as text: summary.csv, summary.md, and the table that the console shows."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cifar_lab import measures, significance
from cifar_lab.cells import Cell, FoundRun, Study
from cifar_lab.claims import Measured, reported, show_settings
from cifar_lab.schema import shorten
from cifar_lab.significance import Interval, PairedTest

SPREAD_OVER_SEEDS = ("best_val_accuracy", "final_val_accuracy", "best_val_loss", "test_accuracy")
"""Measures that summary.csv gives with standard deviation and interval."""

MEANS = ("best_epoch", "epochs", "test_loss", "parameters", "seconds_per_epoch")
"""Measures of which the mean is enough; the last is a time and never the same twice."""


def summary_csv(study: Study, *, test: bool) -> str:
    """Return a row per cell; test columns are empty but for the chosen cell, unless `test`."""
    names = list(dict.fromkeys([study.metric, *SPREAD_OVER_SEEDS]))
    header = [*study.axes, "rank", "chosen", "n", "seeds", "unfinished", "failed"]
    for name in names:
        header += [name, f"{name}_std", f"{name}_low", f"{name}_high"]
    header += ["difference_from_best", "p_adjusted", *MEANS]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([_csv_text(name) for name in header])
    for cell in study.cells:
        counts = status_counts(cell)
        row: list[Any] = [_csv_text(value) for value in cell.key]
        row += [cell.rank, "yes" if cell.chosen else "", len(cell.finished)]
        row += [" ".join(str(run.config.seed) for run in cell.finished)]
        row += [
            sum(counts.get(s, 0) for s in ("queued", "running", "interrupted")),
            counts.get("failed", 0),
        ]
        for name in names:
            found = cell.interval(name) if shows(name, cell, test=test) else None
            spread = (found.mean, found.std, found.low, found.high) if found else (None,) * 4
            row += [_number(value) for value in spread]
        against = cell.against_best
        row += [_number(-against.difference if against else None), _number(cell.p_adjusted)]
        row += [_number(cell.mean(n) if shows(n, cell, test=test) else None) for n in MEANS]
        writer.writerow(["" if value is None else value for value in row])
    return buffer.getvalue()


def summary_md(study: Study, claims: Sequence[Measured], *, test: bool) -> str:
    """Return what the folder shows, in words and tables."""
    parts = [f"# Summary of {markdown(study.folder.resolve().name)}", counts_text(study)]
    if study.axes:
        parts.append("Axes: " + ", ".join(f"`{_code(axis)}`" for axis in study.axes) + ".")
    parts += [f"> {markdown(note)}" for note in study.notes]
    best = [cell for cell in study.ranking if cell.chosen]
    if best:
        parts.append("## Best")
        parts += [f"- {markdown(best_text(study, cell))}" for cell in best]
    parts += ["## Ranking" if study.ranked else "## Cells", ranking_table(study, test=test)]
    if any(cell.against_best or cell.not_tested for cell in study.cells):
        parts.append(testing_text(study))
    if claims:
        parts += ["## Reported and measured", claims_table(study, claims)]
    open_cells = unfinished_table(study)
    if open_cells:
        parts += ["## Unfinished and failed", open_cells]
    problems = [
        f"- {markdown(folder_text(study, run.run.path))}: {markdown(shorten(problem, 300))}"
        for run in study.runs
        for problem in run.problems
    ]
    problems += [
        f"- {markdown(folder_text(study, u.path))}: {markdown(u.reason)}" for u in study.unreadable
    ]
    if problems:
        parts += ["## Not readable", "\n".join(problems)]
    return "\n\n".join(parts) + "\n"


def counts_text(study: Study) -> str:
    """Return how many runs there are, and in which state."""
    counts: dict[str, int] = {}
    for cell in study.cells:
        for status, number in status_counts(cell).items():
            counts[status] = counts.get(status, 0) + number
    if study.unreadable:
        counts["not readable"] = len(study.unreadable)
    states = ", ".join(f"{number} {status}" for status, number in counts.items())
    total = sum(counts.values())
    cells = len(study.cells)
    return f"{total} run{'s' * (total != 1)} in {cells} cell{'s' * (cells != 1)}: {states}."


def status_counts(cell: Cell) -> dict[str, int]:
    """Return how many of a cell's runs are in which state."""
    order = ("finished", "running", "interrupted", "queued", "failed")
    counts = {status: sum(run.summary.status == status for run in cell.runs) for status in order}
    return {status: number for status, number in counts.items() if number}


def shows(name: str, cell: Cell, *, test: bool) -> bool:
    """Whether a measure is shown for a cell: a test score for the chosen one, unless asked."""
    return test or cell.chosen or not measures.is_test(name)


def best_text(study: Study, cell: Cell) -> str:
    """Return the best cell of a dataset, its scores, and who shares the first place."""
    found = cell.interval(study.metric)
    assert found is not None
    n = found.n
    text = (
        f"{cell.dataset}: {study.label(cell)} has the best {study.metric}: "
        f"{measures.show(study.metric, found.mean, found.half_width)} "
        + (f"(mean of {n} seeds and its 95 % interval)" if n > 1 else "(one seed)")
    )
    tested = cell.interval("test_accuracy")
    if tested is not None and study.metric != "test_accuracy":
        shown = measures.show("test_accuracy", tested.mean, tested.half_width)
        text += f"; test accuracy {shown}"
    ties = [c for c in study.cells if c.dataset == cell.dataset and c.tied_with_best]
    if ties:
        others = f"{len(ties)} other cell{'s' * (len(ties) > 1)}"
        text += f". No difference from {others} is shown"
    return text + "."


def against_best_text(cell: Cell) -> str:
    """Return what the paired test says of a cell and the best one."""
    if cell.chosen:
        return "best"
    if cell.against_best is None or cell.p_adjusted is None:
        return cell.not_tested
    points = -100 * cell.against_best.difference
    shown = f"{points:+.2f} points, {significance.show_p(cell.p_adjusted)}"
    return f"{shown}: no difference shown" if cell.tied_with_best else shown


def ranking_table(study: Study, *, test: bool) -> str:
    """Return the cells in order of rank as a Markdown table."""
    several = len({cell.dataset for cell in study.cells}) > 1
    names = list(dict.fromkeys([study.metric, "best_val_accuracy", "best_val_loss", "best_epoch"]))
    names = [n for n in names if any(cell.mean(n) is not None for cell in study.cells)]
    shown_test = [n for n in ("test_accuracy",) if n not in names]
    shown_test = [
        n
        for n in shown_test
        if any(shows(n, c, test=test) and c.mean(n) is not None for c in study.cells)
    ]
    tested = any(cell.against_best or cell.not_tested for cell in study.cells)
    header = (["dataset"] if several and "dataset" not in study.axes else []) + ["rank"]
    header += [*study.axes, "n", *names, *shown_test, *(["against the best"] * tested)]
    rows = []
    for cell in study.ranking:
        row = [cell.dataset] if header[0] == "dataset" else []
        row += [str(cell.rank or "–"), *cell.key, runs_text(cell)]
        for name in [*names, *shown_test]:
            found = cell.interval(name) if shows(name, cell, test=test) else None
            row.append(score_text(name, found))
        rows.append([*row, against_best_text(cell)] if tested else row)
    return table(header, rows)


def score_text(name: str, found: Interval | None) -> str:
    """Return a mean and half of its 95 % interval's width; of an epoch the mean alone."""
    if found is None:
        return "–"
    return measures.show(name, found.mean, None if "epoch" in name else found.half_width)


def runs_text(cell: Cell) -> str:
    """Return how many runs are finished, and of how many where some are not."""
    done, all_runs = len(cell.finished), len(cell.runs)
    return str(done) if done == all_runs else f"{done} of {all_runs}"


def testing_text(study: Study) -> str:
    """Return how the cells were compared with the best one."""
    tests = [cell.against_best for cell in study.cells if cell.against_best]
    if not tests:
        return ""
    methods = sorted({test.method for test in tests})
    images = sorted({test.images for test in tests})
    which = "test" if measures.is_test(study.metric) else "validation"
    return (
        f"Against the best: difference in accuracy on {', '.join(f'{n:,}' for n in images)} "
        f"{which} images, tested by {' and '.join(methods)}, p values adjusted for "
        f"{len(tests)} comparison{'s' * (len(tests) > 1)} (Holm). "
        "Without p < 0.05 no difference is shown."
    )


def claims_table(study: Study, claims: Sequence[Measured]) -> str:
    """Return reported against measured as a Markdown table."""
    rows = []
    for row in claims:
        claim, found = row.claim, row.interval
        where = show_settings(claim.where)
        if row.cell is not None and len([c for c in claims if c.claim == claim]) > 1:
            where = study.label(row.cell)
        rows.append(
            [
                claim.id or row.report,
                claim.metric,
                where,
                reported(claim),
                score_text(claim.metric, found),
                str(found.n) if found else "0",
                measures.show_difference(claim.metric, row.off),
                row.verdict,
                "; ".join(filter(None, [claim.says, claim.source, claim.note])),
            ]
        )
    header = ["claim", "measure", "where", "reported", "measured", "n", "difference", "verdict"]
    return table([*header, "source"], rows)


def unfinished_table(study: Study) -> str:
    """Return the runs that are not finished, with their progress or error; "" if all are."""
    rows = [
        [
            run.summary.status,
            study.label(cell),
            str(run.config.seed),
            progress_text(run),
            shorten(run.summary.error or "", 300),
            folder_text(study, run.run.path),
        ]
        for cell in study.cells
        for run in cell.runs
        if not run.finished
    ]
    header = ["status", "cell", "seed", "epoch", "error", "folder"]
    return table(header, rows) if rows else ""


def folder_text(study: Study, path: Path) -> str:
    """Return a run's folder, relative to the study's."""
    return shorten(str(path.relative_to(study.folder)), 200)


def progress_text(run: FoundRun) -> str:
    """Return the epoch that a run is in, of how many."""
    return f"{len(run.history)} of {run.config.training.epochs}"


def test_text(test: PairedTest, a: str, b: str) -> str:
    """Return a paired test in words."""
    if test.about_settings:
        counts = (
            f"On {test.images:,} images, {a} ({test.seeds[0]} seeds) minus {b} ({test.seeds[1]} "
            f"seeds): "
        )
        counts += f"{100 * test.difference:+.2f} points"
    else:
        counts = (
            f"{a} is right where {b} is wrong on {test.only_a:,} of {test.images:,} images, {b} "
            f"where {a} on {test.only_b:,}: {100 * test.difference:+.2f} points"
        )
    bounds = f"95 % interval {100 * test.low:+.2f} to {100 * test.high:+.2f}"
    verdict = (
        "no difference is shown"
        if test.p >= significance.LEVEL
        else ("the settings differ" if test.about_settings else "these two networks differ")
    )
    return f"{counts} ({bounds}); {test.method}: {significance.show_p(test.p)}: {verdict}."


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are aligned in the source too."""
    lines = [[markdown(cell) for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(header))]

    def line(cells: Iterable[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = line("-" * width for width in widths)
    return "\n".join([line(lines[0]), rule, *(line(cells) for cells in lines[1:])])


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
