"""Compare the runs below a folder, finished or not, at any time, from their files alone."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_lab import cli

if TYPE_CHECKING:
    from cifar_lab.analysis.seed_groups import RunCollection
    from cifar_lab.runs.run_dir import RunDir

MOST_CURVES = 24
"""Cells in curves.png, the best ones; report.html has them all."""


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
        "--config-dir", type=cli.path, help="a folder with reports of one's own, report/TAG.yaml"
    )
    arguments = parser.parse_args(argv)

    from cifar_lab.analysis import claims, html_report, ranking, run_metrics, summary_tables
    from cifar_lab.analysis.seed_groups import read_collection
    from cifar_lab.runs.files import write_text

    if arguments.metric is not None:
        run_metrics.check(arguments.metric)
    folder: Path = arguments.folder
    collection = read_collection(folder)
    ranking.rank(collection, arguments.metric)
    found = claims.of_collection(collection, arguments.config_dir)
    write_text(folder / "summary.csv", summary_tables.summary_csv(collection, test=arguments.test))
    write_text(
        folder / "summary.md", summary_tables.summary_md(collection, found, test=arguments.test)
    )
    _draw(collection)
    page = html_report.report(collection, found, test=arguments.test)
    write_text(folder / "report.html", page)
    print(summary_tables.summary_md(collection, found, test=arguments.test), end="")
    if arguments.timing:
        print("\n" + summary_tables.timing_table(collection.runs).markdown())
    return 0 if collection.groups else 1


def _draw(collection: "RunCollection") -> None:
    """Write grid.png and curves.png."""
    from cifar_lab.analysis import run_metrics
    from cifar_lab.figures import curves, grid, style

    axes = [collection.axes[i] for i in collection.main_axes]
    squares = []
    for group in collection.groups:
        interval = group.interval(collection.metric)
        squares.append(
            grid.Square(
                tuple(group.key[i] for i in collection.main_axes),
                None if interval is None else interval.mean,
                None if interval is None else interval.ends,
                0 if interval is None else interval.n,
                group.chosen,
            )
        )
    groups: dict[str, list[RunDir]] = {}
    for group in collection.ranking[:MOST_CURVES]:
        runs = [run.run for run in group.finished or group.runs]
        groups.setdefault(collection.short_label(group), []).extend(runs)
    picture = grid.draw(
        axes,
        [collection.values(axis) for axis in axes],
        squares,
        collection.metric,
        fraction=run_metrics.is_fraction(collection.metric),
        higher_is_better=run_metrics.higher_is_better(collection.metric),
    )
    style.save(picture, collection.folder / "grid.png", dpi=120)
    style.save(curves.bands(groups), collection.folder / "curves.png", dpi=120)


if __name__ == "__main__":
    sys.exit(main())
