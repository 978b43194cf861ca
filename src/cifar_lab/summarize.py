"""Compare the runs below a folder, finished or not, at any time, from their files alone."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_lab import cli

if TYPE_CHECKING:
    from cifar_lab.cells import Study

MOST_EMBEDDINGS = 4
"""Cells in embedding.png."""

MOST_CURVES = 24
"""Cells in curves.png, the best ones; report.html has them all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m cifar_lab.summarize FOLDER`."""
    return cli.run(_summarize, argv)


def _summarize(argv: list[str]) -> int:
    parser = cli.Parser(prog="python -m cifar_lab.summarize", description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder with run folders at or below it")
    parser.add_argument(
        "--test", action="store_true", help="show every cell's test score, not the best one's only"
    )
    parser.add_argument(
        "--metric", default=None, help="rank by this measure instead of best_val_accuracy"
    )
    parser.add_argument(
        "--timing", action="store_true", help="print the seconds per epoch of each device and model"
    )
    parser.add_argument(
        "--embed",
        choices=("pca", "tsne"),
        help="draw the features of the best cells side by side in embedding.png",
    )
    arguments = parser.parse_args(argv)

    from cifar_lab import cells, claims, measures, report_html, tables
    from cifar_lab.files import write_text

    if arguments.metric is not None:
        measures.check(arguments.metric)
    folder: Path = arguments.folder
    study = cells.read_study(folder)
    cells.rank(study, arguments.metric)
    found = claims.measured(study)
    write_text(folder / "summary.csv", tables.summary_csv(study, test=arguments.test))
    write_text(folder / "summary.md", tables.summary_md(study, found, test=arguments.test))
    _draw(study)
    page = report_html.report(study, found, test=arguments.test)
    write_text(folder / "report.html", page)
    print(tables.summary_md(study, found, test=arguments.test), end="")
    if arguments.timing:
        from cifar_lab.figures.timing import timing_table

        print("\n" + timing_table(run.run for run in study.runs), end="")
    if arguments.embed:
        _embed(study, arguments.embed)
    return 0 if study.cells else 1


def _embed(study: "Study", method: str) -> None:
    """Write embedding.png: the features of the first such run of each of the best cells."""
    from cifar_lab.errors import RequestError
    from cifar_lab.figures import pca, tsne
    from cifar_lab.files import replacing
    from cifar_lab.run_dir import RunDir

    found: dict[str, RunDir] = {}
    for cell in study.ranking:
        runs = [run.run for run in cell.finished if run.run.features_file.exists()]
        if runs and len(found) < MOST_EMBEDDINGS:
            found[study.short_label(cell)] = runs[0]
    if not found:
        raise RequestError(
            f"no finished run below {study.folder} has a features.npz; train with "
            "figures=embeddings"
        )
    side_by_side = pca.side_by_side if method == "pca" else tsne.side_by_side
    figure = side_by_side(list(found.values()), list(found))
    path = study.folder / "embedding.png"
    with replacing(path) as handle:
        figure.savefig(handle, dpi=120, format="png")
    print(f"\nFeatures of {len(found)} cells: {path}")


def _draw(study: "Study") -> None:
    """Write grid.png and curves.png."""
    from cifar_lab import measures
    from cifar_lab.figures import curves, grid
    from cifar_lab.files import replacing
    from cifar_lab.run_dir import RunDir

    squares = []
    for cell in study.cells:
        found = cell.interval(study.metric)
        squares.append(
            grid.Square(
                cell.key,
                None if found is None else found.mean,
                None if found is None else found.half_width,
                0 if found is None else found.n,
                cell.chosen,
            )
        )
    groups: dict[str, list[RunDir]] = {}
    for cell in study.ranking[:MOST_CURVES]:
        runs = [run.run for run in cell.finished or cell.runs]
        groups.setdefault(study.short_label(cell), []).extend(runs)
    pictures = {
        "grid": grid.draw(
            study.axes,
            [study.values(axis) for axis in study.axes],
            squares,
            study.metric,
            fraction=measures.is_fraction(study.metric),
            higher_is_better=measures.higher_is_better(study.metric),
        ),
        "curves": curves.bands(groups),
    }
    for name, figure in pictures.items():
        with replacing(study.folder / f"{name}.png") as handle:
            figure.savefig(handle, dpi=120, format="png")


if __name__ == "__main__":
    sys.exit(main())
