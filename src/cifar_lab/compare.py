"""Two runs side by side: their configs, their scores, a paired test on their predictions."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cifar_lab import cli

if TYPE_CHECKING:
    from cifar_lab.analysis.load_runs import FoundRun

SCORES = (
    *("best_val_accuracy", "best_val_loss", "best_val_balanced_accuracy", "best_val_macro_f1"),
    *("best_epoch", "epochs", "final_train_accuracy"),
    *("test_accuracy", "test_accuracy_last", "test_loss", "parameters", "seconds_per_epoch"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m cifar_lab.compare RUN_DIR RUN_DIR`."""
    return cli.run(_compare, argv)


def _compare(argv: list[str]) -> int:
    parser = cli.Parser("compare", __doc__)
    parser.add_argument("a", type=cli.path, metavar="RUN_DIR", help="the first run, called A")
    parser.add_argument("b", type=cli.path, metavar="RUN_DIR", help="the second run, called B")
    arguments = parser.parse_args(argv)

    from cifar_lab.analysis.load_runs import FoundRun
    from cifar_lab.analysis.run_differences import config_differences
    from cifar_lab.runs.run_dir import RunDir
    from cifar_lab.runs.text import Table

    a, b = FoundRun(RunDir(arguments.a)), FoundRun(RunDir(arguments.b))
    said = [_paired(a, b, split) for split in ("test", "validation")]
    print(f"A: {arguments.a} ({a.summary.status})\nB: {arguments.b} ({b.summary.status})\n")
    different = config_differences(a, b, replicates=True)
    print(Table(["key", "A", "B"], different).markdown() if different else "The configs are equal.")
    print()
    print(Table(["metric", "A", "B", "B - A"], _scores(a, b)).markdown())
    print()
    print("\n".join(line for line in said if line))
    names = {name for name, *_ in different}
    if names == {"seed"}:
        print("They differ in their seed alone: what differs between them is chance.")
    elif names == {"split.fold"}:
        print("They are folds of one setting: what differs between them is chance.")
    return 0


def _paired(a: "FoundRun", b: "FoundRun", split: str) -> str:
    """Return the paired test in words; UsageError if the two were tested on other images."""
    from cifar_lab.analysis import statistics, texts
    from cifar_lab.errors import RunFailed, UsageError

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
        test = statistics.compare(found[:1], found[1:])
    except UsageError as error:
        if split == "test":
            raise UsageError(
                f"{a.run.path} and {b.run.path} cannot be compared: {error}; take two runs of the "
                "same dataset and test split"
            ) from None
        return "Their validation images differ, so only the test images compare them."
    words = f"{split.capitalize()} images: {texts.test_text(test, 'A', 'B')}"
    if test.low <= 0 <= test.high:
        points, width = 100 * abs(test.difference), 50 * (test.high - test.low)
        words += f" {points:.2f} points are less than the interval's {width:.2f} to either side."
    return words


def _scores(a: "FoundRun", b: "FoundRun") -> list[list[str]]:
    """Return the scores side by side; a test accuracy with its 95 % binomial interval."""
    from cifar_lab.analysis import run_metrics
    from cifar_lab.runs.metrics import wilson_interval

    rows = []
    for name in SCORES:
        values = [run.metric(name) for run in (a, b)]
        cells = []
        for run, value in zip((a, b), values, strict=True):
            images = run.summary.test_size if run_metrics.is_test(name) else None
            if value is not None and "accuracy" in name and images:
                limits = wilson_interval(value, images)
                cells.append(run_metrics.show_within(name, value, limits))
            else:
                cells.append(run_metrics.show(name, value))
        first, second = values
        off = None if first is None or second is None else second - first
        rows.append([name, *cells, run_metrics.show_difference(name, off)])
    return rows


if __name__ == "__main__":
    sys.exit(main())
