"""The metrics of one run that claims, rankings and tables can name."""

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise

from cifar_lab.analysis.statistics import Interval
from cifar_lab.errors import UsageError, did_you_mean
from cifar_lab.runs.metrics import BY_CLASS, EpochMetrics
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.summary import RunSummary

Metric = Callable[[RunDir, RunSummary, Sequence[EpochMetrics]], float | None]

PER_CLASS = ("class_precision", "class_recall", "class_f1")
"""Metrics of one class, named with its number: `class_recall:3`."""

PAIR = "confusion_rank"
"""The place of two classes among the most confused, named with their numbers."""


def _of_summary(field: str) -> Metric:
    return lambda run, summary, history: getattr(summary, field)


def _of_entry(field: str, name: str) -> Metric:
    return lambda run, summary, history: getattr(summary, field).get(name)


def _of_epoch(column: str, index: int) -> Metric:
    return lambda run, summary, history: getattr(history[index], column) if history else None


def _macro(kind: str) -> Metric:
    def mean(run: RunDir, summary: RunSummary, history: Sequence[EpochMetrics]) -> float | None:
        values = class_scores(run, summary)[kind]
        return sum(values) / len(values) if values else None

    return mean


def _last_reduction(
    run: RunDir, summary: RunSummary, history: Sequence[EpochMetrics]
) -> float | None:
    """Return the last epoch after which the learning rate fell."""
    falls = [
        row.epoch for row, later in pairwise(history) if later.learning_rate < row.learning_rate
    ]
    return falls[-1] if falls else None


def _seconds(run: RunDir, summary: RunSummary, history: Sequence[EpochMetrics]) -> float | None:
    return sum(row.seconds for row in history) / len(history) if history else None


_MOMENTS = (("first", 0), ("final", -1))

METRICS: dict[str, Metric] = {
    **{
        name: _of_summary(name)
        for name in (
            *("best_val_accuracy", "best_val_loss", *(f"best_{name}" for name in BY_CLASS)),
            *("best_epoch", "epochs"),
            *("test_accuracy", "test_accuracy_last", "test_loss", "parameters"),
            "expected_calibration_error",
        )
    },
    **{
        f"{moment}_{split}_{quantity}": _of_epoch(f"{split}_{quantity}", index)
        for moment, index in _MOMENTS
        for split in ("train", "val", "test")
        for quantity in ("loss", "accuracy")
    },
    **{
        f"{moment}_{name}": _of_epoch(name, index)
        for moment, index in _MOMENTS
        for name in BY_CLASS
    },
    **{f"macro_{kind}": _macro(kind) for kind in ("precision", "recall", "f1")},
    **{f"feature_{name}": _of_entry("separation", name) for name in ("knn_accuracy", "silhouette")},
    "best_val_loss_epoch": _of_entry("diagnosis", "best_val_loss_epoch"),
    "last_reduction_epoch": _last_reduction,
    "seconds_per_epoch": _seconds,
}
"""`best_val_`: of the epoch that `training.monitor` chose. `first_`, `final_`: of the first and the
last epoch; `test_` ones of an epoch exist where the study watched the test set, and those of
balanced accuracy and macro F1 where the run monitors one of them. `macro_`: mean over the classes,
of the test predictions. `feature_`: how well the features keep the classes apart.
`last_reduction_epoch`: the last one after which the learning rate fell."""


def check(name: str) -> None:
    """UsageError unless `name` is a metric."""
    if name in METRICS or _of_classes(name) is not None:
        return
    known = [*METRICS, *(f"{kind}:<class>" for kind in PER_CLASS), f"{PAIR}:<class>:<class>"]
    raise UsageError(
        f"there is no metric {name[:80]}{did_you_mean(name, known)}; there are {', '.join(known)}"
    )


def _of_classes(name: str) -> tuple[str, list[int]] | None:
    """Return the kind and the class numbers of `class_recall:3` or `confusion_rank:3:5`."""
    kind, *numbers = name.split(":")
    wanted = 1 if kind in PER_CLASS else 2 if kind == PAIR else 0
    if not wanted or len(numbers) != wanted or not all(n.isdecimal() for n in numbers):
        return None
    return kind, [int(number) for number in numbers]


def of_run(
    name: str, run: RunDir, summary: RunSummary, history: Sequence[EpochMetrics]
) -> float | None:
    """Return a metric of a run; None where the run has no such number (yet).

    UsageError for an unknown name, RunFailed for a damaged report.
    """
    check(name)
    kind, classes = _of_classes(name) or (name, [])
    if kind in METRICS:
        value = METRICS[name](run, summary, history)
    elif kind == PAIR:
        value = _confusion_rank(summary, *classes)
    else:
        values = class_scores(run, summary)[kind.removeprefix("class_")]
        value = values[classes[0]] if classes[0] < len(values) else None
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
    """Whether the metric lies in [0, 1] and is written in per cent."""
    return higher_is_better(name) or name == "expected_calibration_error"


def is_test(name: str) -> bool:
    """Whether the metric looks at the test images."""
    return "test" in name or name.startswith(("macro_", "class_", "expected_"))


def bounds(name: str) -> tuple[float, float]:
    """Return the smallest and largest value that the metric can have."""
    if is_fraction(name):
        return 0.0, 1.0
    return (-1.0 if name == "feature_silhouette" else 0.0), math.inf


_WORDS = {"val": "validation", "train": "training", "knn": "nearest-neighbour"}


def in_words(name: str) -> str:
    """Return a metric's name in words: `validation accuracy`, `final training loss`."""
    of_best_epoch = name.startswith("best_val_") and not name.endswith("_epoch")
    plain = name.removeprefix("best_") if of_best_epoch else name
    return " ".join(_WORDS.get(word, word) for word in plain.replace(":", " ").split("_"))


def show(name: str, value: float | None) -> str:
    """Return a metric's value as text: `87.31 %`, `0.4123`, `–`."""
    return "–" if value is None else _in_unit(name, "{}", value)


def show_interval(name: str, found: Interval | None) -> str:
    """Return a mean with its 95 % interval: `87.31 ± 0.42 %`, `98.90 % (97.31 to 100.00)`.

    Of two values both are shown instead, as in `87.10 and 87.52 %`; of an epoch the mean alone.
    """
    if found is None:
        return "–"
    if "epoch" in name or found.n == 1:
        return show(name, found.mean)
    if found.low is None or found.high is None:
        return _in_unit(name, "{} and {}", found.smallest, found.largest)
    below, above = found.mean - found.low, found.high - found.mean
    if math.isclose(below, above, rel_tol=1e-6, abs_tol=1e-12):
        return _in_unit(name, "{} ± {}", found.mean, below)
    return show_within(name, found.mean, (found.low, found.high))


def show_within(name: str, value: float, limits: tuple[float, float]) -> str:
    """Return a value with the ends of its interval: `98.90 % (97.31 to 100.00)`."""
    return f"{show(name, value)} ({_in_unit(name, '{} to {}', *limits).removesuffix(' %')})"


def _in_unit(name: str, form: str, *values: float) -> str:
    """Return numbers in the metric's unit, which is named once, at the end."""
    scale, digits, unit = (100, ".2f", " %") if is_fraction(name) else (1, ".4f", "")
    if name == "seconds_per_epoch":
        digits, unit = ".1f", " s"
    elif name in ("epochs", "parameters") or name.endswith("_epoch") or name.startswith(PAIR):
        digits = ",.0f" if all(float(value).is_integer() for value in values) else ",.1f"
    return form.format(*(f"{scale * value:{digits}}" for value in values)) + unit


def show_width(name: str, value: float) -> str:
    """Return how far apart two values are: `1.84 points` of per cent, `0.0123`, `2`."""
    return show(name, value).replace(" %", " points")


def show_difference(name: str, value: float | None) -> str:
    """Return a difference with its sign: `-1.84 points`, `+0.0123`, `+2`, `–`."""
    if value is None:
        return "–"
    shown = show_width(name, abs(value))
    return ("-" if value < 0 else "+") + shown if re.search("[1-9]", shown) else shown
