"""Compare the runs below a folder, finished or not, at any time, from their files alone."""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_lab import cli
from cifar_lab.errors import UsageError

if TYPE_CHECKING:
    import argparse

    from matplotlib.figure import Figure

    from cifar_lab.analysis.seed_groups import RunCollection

WIDE = 160
"""Columns of what is printed where no terminal says how many it has."""

PAPER_TABLES = {"latex": ".tex", "csv": ".csv", "markdown": ".md"}
"""The formats of the table for a paper, and how their files end."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m cifar_lab.summarize FOLDER`."""
    return cli.run(_summarize, argv)


def _summarize(argv: list[str]) -> int:
    parser = cli.Parser("summarize", __doc__)
    parser.add_argument("folder", type=cli.path, help="a folder with run folders at or below it")
    parser.add_argument(
        "--test",
        action="store_true",
        help="show the test score of every configuration, not of the best one only",
    )
    parser.add_argument(
        "--metric", default=None, help="rank by this metric instead of the monitored score"
    )
    parser.add_argument(
        "--timing", action="store_true", help="print the seconds per epoch of each device and model"
    )
    parser.add_argument(
        "--baseline",
        metavar="KEY=VALUE,...",
        help="set every configuration against this one instead of the best: optimizer=sgd",
    )
    parser.add_argument(
        "--detect",
        type=float,
        metavar="POINTS",
        help="say how many seeds per configuration would show a difference of so many points",
    )
    for name, ending in PAPER_TABLES.items():
        parser.add_argument(
            f"--{name}",
            type=cli.path,
            metavar="FILE",
            help=f"write the table for a paper ({ending})",
        )
    parser.add_argument(
        "--config-dir", type=cli.path, help="a folder with reports of one's own, report/TAG.yaml"
    )
    arguments = parser.parse_args(argv)
    _check(arguments)

    from cifar_lab.analysis import claims, grouping, html_report, ranking, summary_tables, texts
    from cifar_lab.analysis.effects import main_effects
    from cifar_lab.runs.files import write_text

    folder: Path = arguments.folder
    collection = grouping.read_collection(folder)
    ranking.rank(collection, arguments.metric, arguments.baseline)
    judged = claims.of_collection(collection, arguments.config_dir)
    effects = main_effects(collection)
    test = arguments.test
    write_text(folder / "summary.csv", summary_tables.summary_csv(collection, test=test))
    written = ["summary.csv", "summary.md", "report.html"]
    problems = []
    for name, draw in pictures(collection).items():
        try:
            draw(folder / f"{name}.png")
            written.append(f"{name}.png")
        except Exception as error:  # a figure never ends a table
            problems.append(f"{name}.png is not drawn: {type(error).__name__}: {error}")
    collection.notes += problems
    parts = summary_tables.sections(collection, judged, effects, test=test)
    write_text(folder / "summary.md", summary_tables.as_markdown(parts))
    page = html_report.report(collection, judged, effects, test=test)
    write_text(folder / "report.html", page)
    if arguments.detect is not None:
        lines = texts.detect_text(collection, arguments.detect)
        parts.append(summary_tables.Section("Seeds needed", [lines]))
    if arguments.timing:
        table = summary_tables.timing_table(collection.runs)
        parts.append(summary_tables.Section("Time", [table]))
    width = shutil.get_terminal_size((WIDE, 24)).columns
    print(summary_tables.as_text(parts, width))
    for name in PAPER_TABLES:
        path = getattr(arguments, name)
        if path is not None:
            write_text(path, summary_tables.paper(collection, name, test=test))
            print(f"table: {path}")
    print(f"written to {folder}: {', '.join(written)}")
    return 0 if collection.groups else 1


def _check(arguments: "argparse.Namespace") -> None:
    """UsageError for what no folder could fulfil, before anything is read."""
    from cifar_lab.analysis import run_metrics

    if arguments.metric is not None:
        run_metrics.check(arguments.metric)
    if arguments.detect is not None and not 0 < arguments.detect <= 100:
        raise UsageError(
            f"--detect {arguments.detect:g} is wrong: it must be above 0 and at most 100 points"
        )
    for name, ending in PAPER_TABLES.items():
        path = getattr(arguments, name)
        if path is not None:
            cli.check_output_file(f"--{name}", path, (ending,))


def pictures(collection: "RunCollection") -> "dict[str, Callable[[Path], None]]":
    """Return what draws each picture of a ranked collection into a file, by the picture's name."""
    from cifar_lab.analysis import drawing
    from cifar_lab.figures import style

    def into(draw: "Callable[[RunCollection], Figure]", dpi: int) -> "Callable[[Path], None]":
        return lambda path: style.save(draw(collection), path, dpi=dpi)

    return {
        "grid": into(drawing.grid_of, 120),
        "curves": into(drawing.curves_of, 120),
        "effects": into(drawing.effects_of, 150),
    }


if __name__ == "__main__":
    sys.exit(main())
