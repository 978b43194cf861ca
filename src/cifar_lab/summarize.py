"""Compare the runs below a folder, finished or not, at any time, from their files alone."""

import shutil
from pathlib import Path

from cifar_lab import cli
from cifar_lab.analysis import grouping, summary_tables
from cifar_lab.analysis.summary import PICTURES, Summary, report, summary_of
from cifar_lab.errors import first_line
from cifar_lab.runs.files import write_text

WIDE = 160
"""Columns of what is printed where no terminal says how many it has."""

PAPER_TABLES = {"latex": ".tex", "csv": ".csv", "markdown": ".md"}
"""The formats of the table for a paper, and how their files end."""


@cli.command
def main(argv: list[str]) -> int:
    """Run `python -m cifar_lab.summarize FOLDER`."""
    parser = cli.Parser("summarize", __doc__)
    parser.add("folder", "a folder with run folders at or below it", type=cli.path)
    parser.add_flag("--test", "show the test score of every configuration, not only of the best")
    parser.add("--metric", "rank by this metric instead of the monitored score")
    baseline = "set every configuration against this one instead of the best: optimizer=sgd"
    parser.add("--baseline", baseline, metavar="KEY=VALUE,...")
    seeds = "say how many seeds per configuration would show a difference of so many points"
    parser.add_number("--detect", seeds, 0.001, 100.0)
    for name, ending in PAPER_TABLES.items():
        parser.add_output(f"--{name}", f"write the table for a paper ({ending})", ending)
    arguments = parser.parse_args(argv)

    folder: Path = arguments.folder
    collection = grouping.read_collection(folder)
    chosen = {name: getattr(arguments, name) for name in ("metric", "baseline", "test")}
    summary = summary_of(collection, **chosen)
    drawn = _draw(summary)
    write_text(folder / "summary.csv", summary_tables.summary_csv(collection, test=summary.test))
    parts = summary.sections
    write_text(folder / "summary.md", summary_tables.as_markdown(parts))
    write_text(folder / "report.html", report(summary))
    if arguments.detect is not None:
        parts.append(("Seeds needed", [summary.seeds_needed(arguments.detect)]))
    print(summary_tables.as_text(parts, shutil.get_terminal_size((WIDE, 24)).columns))
    for name in PAPER_TABLES:
        path = getattr(arguments, name)
        if path is not None:
            write_text(path, summary_tables.paper(collection, name, test=summary.test))
            print(f"table: {path}")
    print(f"written to {folder}: {', '.join(['summary.csv', 'summary.md', 'report.html', *drawn])}")
    return 0 if collection.groups else 1


def _draw(summary: Summary) -> list[str]:
    """Write the pictures; return the names of those that could be drawn."""
    from cifar_lab.figures import style

    drawn = []
    for name in PICTURES:
        path = summary.collection.folder / f"{name}.png"
        try:
            style.save(summary.figure(name), path, dpi=150)
            drawn.append(path.name)
        except Exception as error:  # a figure never ends a table
            reason = f"{path.name} is not drawn: {type(error).__name__}: {first_line(error)}"
            summary.collection.notes.append(reason)
    return drawn


if __name__ == "__main__":
    raise SystemExit(main())
