"""The closed table of measures that claims, rankings and tables name: numbers of one run."""

import math
import re
from collections.abc import Callable, Sequence

from cifar_lab.errors import RequestError, did_you_mean
from cifar_lab.metrics import EpochMetrics
from cifar_lab.run_dir import RunDir, RunSummary

Measure = Callable[[RunDir, RunSummary, Sequence[EpochMetrics]], float | None]

PER_CLASS = ("class_precision", "class_recall", "class_f1")
"""Measures of one class, named with its number: `class_recall:3`."""

PAIR = "confusion_rank"
"""The place of two classes among the most confused, named with their numbers."""


def _of_summary(field: str) -> Measure:
    return lambda run, summary, history: getattr(summary, field)


def _of_entry(field: str, name: str) -> Measure:
    return lambda run, summary, history: getattr(summary, field).get(name)


def _of_epoch(column: str, index: int) -> Measure:
    return lambda run, summary, history: getattr(history[index], column) if history else None


def _macro(kind: str) -> Measure:
    def mean(run: RunDir, summary: RunSummary, history: Sequence[EpochMetrics]) -> float | None:
        values = class_scores(run, summary)[kind]
        return sum(values) / len(values) if values else None

    return mean


def _last_reduction(
    run: RunDir, summary: RunSummary, history: Sequence[EpochMetrics]
) -> float | None:
    """Return the last epoch after which the learning rate fell."""
    rates = [row.learning_rate for row in history]
    falls = [
        row.epoch for row, now, then in zip(history, rates, rates[1:], strict=False) if then < now
    ]
    return falls[-1] if falls else None


def _seconds(run: RunDir, summary: RunSummary, history: Sequence[EpochMetrics]) -> float | None:
    return sum(row.seconds for row in history) / len(history) if history else None


MEASURES: dict[str, Measure] = {
    **{
        name: _of_summary(name)
        for name in (
            *("best_val_accuracy", "best_val_loss", "best_epoch", "epochs"),
            *("test_accuracy", "test_accuracy_last", "test_loss", "parameters"),
        )
    },
    **{
        f"{moment}_{split}_{quantity}": _of_epoch(f"{split}_{quantity}", index)
        for moment, index in (("first", 0), ("final", -1))
        for split in ("train", "val", "test")
        for quantity in ("loss", "accuracy")
    },
    **{f"macro_{kind}": _macro(kind) for kind in ("precision", "recall", "f1")},
    **{f"feature_{name}": _of_entry("separation", name) for name in ("knn_accuracy", "silhouette")},
    "best_val_loss_epoch": _of_entry("diagnosis", "best_val_loss_epoch"),
    "last_reduction_epoch": _last_reduction,
    "seconds_per_epoch": _seconds,
}
"""`first_`, `final_`: of the first and the last epoch; `test_` ones of an epoch exist where the
study watched the test set. `macro_`: mean over the classes, of the test predictions. `feature_`:
how well the features keep the classes apart. `last_reduction_epoch`: the last one after which the
learning rate fell."""


def check(name: str) -> None:
    """RequestError unless `name` is a measure."""
    if name in MEASURES or _of_classes(name) is not None:
        return
    known = [*MEASURES, *(f"{kind}:<class>" for kind in PER_CLASS), f"{PAIR}:<class>:<class>"]
    raise RequestError(
        f"there is no measure {name[:80]}{did_you_mean(name, known)}; there are {', '.join(known)}"
    )


def _of_classes(name: str) -> tuple[str, list[int]] | None:
    """Return the kind and the class numbers of `class_recall:3` or `confusion_rank:3:5`."""
    kind, *numbers = name.split(":")
    wanted = 1 if kind in PER_CLASS else 2 if kind == PAIR else 0
    if not wanted or len(numbers) != wanted or not all(n.isdecimal() for n in numbers):
        return None
    return kind, [int(number) for number in numbers]


def measure(
    name: str, run: RunDir, summary: RunSummary, history: Sequence[EpochMetrics]
) -> float | None:
    """Return a measure of a run; None where the run has no such number (yet).

    RequestError for an unknown name, RunFailed for a damaged report.
    """
    check(name)
    found = _of_classes(name)
    if found is None:
        value = MEASURES[name](run, summary, history)
    elif found[0] == PAIR:
        value = _confusion_rank(summary, *found[1])
    else:
        values = class_scores(run, summary)[found[0].removeprefix("class_")]
        value = values[found[1][0]] if found[1][0] < len(values) else None
    return None if value is None or not math.isfinite(value) else float(value)


def class_scores(run: RunDir, summary: RunSummary) -> dict[str, list[float]]:
    """Return precision, recall and f1 of each class on the test images; 0 where undefined."""
    report = run.read_report()
    rows = [report[name] for name in summary.per_class_accuracy if name in report]
    columns = {"precision": "precision", "recall": "recall", "f1": "f1-score"}
    return {kind: [row[column] for row in rows] for kind, column in columns.items()}


def _confusion_rank(summary: RunSummary, one: int, other: int) -> float | None:
    """Return the place of two classes, either way round, among the most confused; None if low."""
    names = list(summary.per_class_accuracy)
    if max(one, other) >= len(names):
        return None
    for place, pair in enumerate(summary.most_confused, start=1):
        if {pair["label"], pair["predicted"]} == {names[one], names[other]}:
            return place
    return None


def higher_is_better(name: str) -> bool:
    """Whether more of it is better: accuracies and their kin, not losses, times or sizes."""
    return any(word in name for word in ("accuracy", "precision", "recall", "f1"))


def is_fraction(name: str) -> bool:
    """Whether the measure lies in [0, 1] and is written in per cent."""
    return higher_is_better(name)


def is_test(name: str) -> bool:
    """Whether the measure looks at the test images."""
    return "test" in name or name.startswith(("macro_", "class_"))


def show(name: str, value: float | None, spread: float | None = None) -> str:
    """Return a measure's value for people, with its spread: `87.31 ± 0.42 %`, `0.4123`, `–`."""
    if value is None:
        return "–"
    scale, form, unit = (100, ".2f", " %") if is_fraction(name) else (1, ".4f", "")
    if name == "seconds_per_epoch":
        form, unit = ".1f", " s"
    elif name in ("epochs", "parameters") or name.endswith("_epoch") or name.startswith(PAIR):
        form = ",.0f" if float(value).is_integer() else ",.1f"
    beside = "" if spread is None else f" ± {scale * spread:{form}}"
    return f"{scale * value:{form}}{beside}{unit}"


def show_width(name: str, value: float) -> str:
    """Return how far apart two values are: `1.84 points` of per cent, `0.0123`, `2`."""
    return show(name, value).replace(" %", " points")


def show_difference(name: str, value: float | None) -> str:
    """Return a difference with its sign: `-1.84 points`, `+0.0123`, `+2`, `–`."""
    if value is None:
        return "–"
    shown = show_width(name, abs(value))
    return ("-" if value < 0 else "+") + shown if re.search("[1-9]", shown) else shown
