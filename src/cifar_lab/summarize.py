"""Compare the runs below a folder, finished or not, at any time, from their files alone."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_lab import cli

if TYPE_CHECKING:
    from cifar_lab.analysis.seed_groups import RunCollection
    from cifar_lab.runs.run_dir import RunDir

MOST_EMBEDDINGS = 4
"""Cells in embedding.png."""

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
        help="show the test score of every setting, not of the best one only",
    )
    parser.add_argument(
        "--metric", default=None, help="rank by this metric instead of the monitored score"
    )
    parser.add_argument(
        "--timing", action="store_true", help="print the seconds per epoch of each device and model"
    )
    parser.add_argument(
        "--embed",
        choices=("pca", "tsne"),
        help="draw the features of the best settings side by side in embedding.png",
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
    embedded = _with_features(collection) if arguments.embed else {}
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
    if arguments.embed:
        _embed(collection.folder / "embedding.png", embedded, arguments.embed)
    return 0 if collection.settings else 1


def _with_features(collection: "RunCollection") -> "dict[str, RunDir]":
    """Return the first run with features of each of the best settings; UsageError without any."""
    from cifar_lab.errors import UsageError, shorten_path

    runs_with: dict[str, RunDir] = {}
    for setting in collection.ranking:
        runs = [run.run for run in setting.finished if run.run.features_file.exists()]
        if runs and len(runs_with) < MOST_EMBEDDINGS:
            runs[0].read_features()  # what is damaged is refused before anything is written
            runs_with[collection.short_label(setting)] = runs[0]
    if not runs_with:
        raise UsageError(
            f"no finished run below {shorten_path(collection.folder)} has a features.npz; train "
            "with figures=embeddings"
        )
    return runs_with


def _embed(path: Path, runs: "dict[str, RunDir]", method: str) -> None:
    """Draw the features of runs side by side, each under its name."""
    from cifar_lab.figures import pca, style, tsne

    side_by_side = pca.side_by_side if method == "pca" else tsne.side_by_side
    style.save(side_by_side(list(runs.values()), list(runs)), path, dpi=120)
    print(f"\nFeatures of {len(runs)} settings: {path}")


def _draw(collection: "RunCollection") -> None:
    """Write grid.png and curves.png."""
    from cifar_lab.analysis import run_metrics
    from cifar_lab.figures import curves, grid, style

    axes = [collection.axes[i] for i in collection.main_axes]
    squares = []
    for setting in collection.settings:
        interval = setting.interval(collection.metric)
        squares.append(
            grid.Square(
                tuple(setting.key[i] for i in collection.main_axes),
                None if interval is None else interval.mean,
                None if interval is None else interval.ends,
                0 if interval is None else interval.n,
                setting.chosen,
            )
        )
    groups: dict[str, list[RunDir]] = {}
    for setting in collection.ranking[:MOST_CURVES]:
        runs = [run.run for run in setting.finished or setting.runs]
        groups.setdefault(collection.short_label(setting), []).extend(runs)
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
