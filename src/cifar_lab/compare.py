"""Two runs side by side: their configs, their scores, a paired test on their predictions."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_lab import cli

if TYPE_CHECKING:
    from cifar_lab.cells import FoundRun

SCORES = (
    *("best_val_accuracy", "best_val_loss", "best_epoch", "epochs", "final_train_accuracy"),
    *("test_accuracy", "test_accuracy_last", "test_loss", "parameters", "seconds_per_epoch"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m cifar_lab.compare RUN_DIR RUN_DIR`."""
    return cli.run(_compare, argv)


def _compare(argv: list[str]) -> int:
    parser = cli.Parser(prog="python -m cifar_lab.compare", description=__doc__)
    parser.add_argument("a", type=Path, metavar="RUN_DIR", help="the first run, called A")
    parser.add_argument("b", type=Path, metavar="RUN_DIR", help="the second run, called B")
    parser.add_argument(
        "--embed", choices=("pca", "tsne"), help="draw the features of both runs side by side"
    )
    parser.add_argument(
        "--to", type=Path, default=Path("embedding.png"), help="where --embed draws (embedding.png)"
    )
    arguments = parser.parse_args(argv)

    from cifar_lab import tables
    from cifar_lab.cells import FoundRun
    from cifar_lab.run_dir import RunDir

    a, b = FoundRun(RunDir(arguments.a)), FoundRun(RunDir(arguments.b))
    said = [_paired(a, b, split) for split in ("test", "validation")]
    print(f"A: {arguments.a} ({a.summary.status})\nB: {arguments.b} ({b.summary.status})\n")
    different = _different_settings(a, b)
    print(tables.table(["setting", "A", "B"], different) if different else "The configs are equal.")
    print()
    print(tables.table(["measure", "A", "B", "B - A"], _scores(a, b)))
    print()
    print("\n".join(line for line in said if line))
    if different and {name for name, *_ in different} == {"seed"}:
        print("They differ in their seed alone: what differs between them is chance.")
    if arguments.embed:
        print(_embed([a, b], arguments.embed, arguments.to))
    return 0


def _paired(a: "FoundRun", b: "FoundRun", split: str) -> str:
    """Return the paired test in words; RequestError if the two were tested on other images."""
    from cifar_lab import significance, tables
    from cifar_lab.errors import RequestError, RunFailed

    found = []
    for name, run in (("A", a), ("B", b)):
        predictions = run.predictions(split)
        if run.problems:
            raise RunFailed(run.problems[0])
        if predictions is None:
            hint = f"; python -m cifar_lab.evaluate {run.run.path} makes them"
            return f"No paired test: {name} has no test predictions{hint}." * (split == "test")
        found.append(predictions)
    try:
        test = significance.compare(found[:1], found[1:])
    except RequestError as error:
        if split == "test":
            raise RequestError(
                f"{a.run.path} and {b.run.path} cannot be compared: {error}; take two runs of the "
                "same dataset and test split"
            ) from None
        return "Their validation images differ, so only the test images compare them."
    words = f"{split.capitalize()} images: {tables.test_text(test, 'A', 'B')}"
    if test.low <= 0 <= test.high:
        points, width = 100 * abs(test.difference), 50 * (test.high - test.low)
        words += f" {points:.2f} points are less than the interval's {width:.2f} to either side."
    return words


def _different_settings(a: "FoundRun", b: "FoundRun") -> list[list[str]]:
    from cifar_lab.cells import MISSING, show_value

    of_a, of_b = (
        {**run.choices, **run.settings, "seed": run.config.seed, "threads": run.summary.threads}
        for run in (a, b)
    )
    rows = []
    for name in dict.fromkeys([*of_a, *of_b]):
        shown = [show_value(s[name]) if name in s else MISSING for s in (of_a, of_b)]
        if shown[0] != shown[1]:
            rows.append([name, *shown])
    return rows


def _scores(a: "FoundRun", b: "FoundRun") -> list[list[str]]:
    """Return the scores side by side; an accuracy with half its 95 % binomial interval's width."""
    from cifar_lab import measures
    from cifar_lab.metrics import binomial_half_width

    rows = []
    for name in SCORES:
        values = [run.measure(name) for run in (a, b)]
        cells = []
        for run, value in zip((a, b), values, strict=True):
            images = run.summary.test_size if measures.is_test(name) else None
            known = value is not None and "accuracy" in name and images
            spread = binomial_half_width(value or 0.0, images or 0) if known else None
            cells.append(measures.show(name, value, spread))
        first, second = values
        off = None if first is None or second is None else second - first
        rows.append([name, *cells, measures.show_difference(name, off)])
    return rows


def _embed(runs: "list[FoundRun]", method: str, path: Path) -> str:
    """Draw the features of the runs side by side; return where, or why not."""
    from cifar_lab.errors import RequestError
    from cifar_lab.figures import pca, tsne
    from cifar_lab.files import replacing

    for run in runs:
        if not run.run.features_file.exists():
            raise RequestError(
                f"{run.run.path} has no features.npz; train or evaluate with figures=embeddings"
            )
    side_by_side = pca.side_by_side if method == "pca" else tsne.side_by_side
    figure = side_by_side([run.run for run in runs], ["A", "B"])
    with replacing(path) as handle:
        figure.savefig(handle, dpi=150, format="png")
    return f"Features of both: {path}"


if __name__ == "__main__":
    sys.exit(main())
