"""Evaluate past runs from their folders alone."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_lab import cli

if TYPE_CHECKING:
    from cifar_lab.run_dir import RunDir


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m cifar_lab.evaluate RUN_DIR...`."""
    return cli.run(_evaluate, argv)


def _evaluate(argv: list[str]) -> int:
    parser = cli.Parser(prog="python -m cifar_lab.evaluate", description=__doc__)
    parser.add_argument("run_dir", nargs="+", help="a run folder")
    parser.add_argument("--device", default=None, help="auto, cuda, cuda:N, mps or cpu")
    parser.add_argument(
        "--trust", default=[], action="append", help="a module of your own that the run names"
    )
    parser.add_argument(
        "--probabilities",
        type=int,
        default=0,
        metavar="N",
        help="print all probabilities of N random test images",
    )
    parser.add_argument(
        "--side-by-side",
        type=Path,
        metavar="FOLDER",
        help="draw PCA and t-SNE of these runs' features side by side into FOLDER",
    )
    arguments = parser.parse_args(argv)

    import dataclasses

    from cifar_lab import components
    from cifar_lab.evaluation import evaluate
    from cifar_lab.execute import draw_figures
    from cifar_lab.run_dir import RunDir

    components.trust(arguments.trust)
    runs = [RunDir(folder) for folder in arguments.run_dir]
    wants_features = arguments.side_by_side is not None
    for run in runs:
        summary = run.read_summary()
        with run.lock():
            fields = evaluate(run, on=arguments.device, features=wants_features)
            run.write_summary(dataclasses.replace(summary, **fields))
            draw_figures(run)
        print(
            f"{run.path}: test accuracy of the {fields['scored_weights']} weights: "
            f"{fields['test_accuracy']:.2%} (error {1 - fields['test_accuracy']:.2%}), "
            f"loss {fields['test_loss']:.4f}, {fields['test_size']:,} images"
        )
        if arguments.probabilities > 0:
            from cifar_lab.figures import samples

            print(samples.probability_text(run, arguments.probabilities))
    if wants_features:
        _side_by_side(runs, arguments.side_by_side)
    return 0


def _side_by_side(runs: "Sequence[RunDir]", folder: Path) -> None:
    """Draw the features of several runs beside each other, to compare trained and untrained."""
    from cifar_lab.figures import pca, tsne

    titles = []
    for run in runs:
        summary = run.read_summary()
        epochs = summary.best_epoch if summary.scored_weights == "best" else summary.epochs
        titles.append(f"lr {summary.initial_learning_rate}, epoch {epochs}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in (
        ("pca", pca.side_by_side(runs, titles)),
        ("tsne", tsne.side_by_side(runs, titles)),
    ):
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=150, format="png")
        print(f"figure: {path}")


if __name__ == "__main__":
    sys.exit(main())
