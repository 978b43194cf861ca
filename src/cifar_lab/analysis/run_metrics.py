"""The metrics of one run that claims, rankings and tables can name."""

import math
import re
from collections.abc import Sequence

from cifar_lab.analysis.statistics import Interval
from cifar_lab.errors import UsageError, did_you_mean
from cifar_lab.runs.metrics import BY_CLASS, EpochMetrics
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.summary import RunSummary

_OF_SUMMARY = (
    *("best_val_accuracy", "best_val_loss", *(f"best_{name}" for name in BY_CLASS), "best_epoch"),
    *("epochs", "test_accuracy", "test_accuracy_last", "test_loss", "parameters"),
    "expected_calibration_error",
)
_OF_EPOCHS = (
    *(f"{split}_{what}" for split in ("train", "val", "test") for what in ("loss", "accuracy")),
    *BY_CLASS,
)
_NAMES = (
    *_OF_SUMMARY,
    *(f"{moment}_{column}" for moment in ("first", "final") for column in _OF_EPOCHS),
    *("macro_precision", "macro_recall", "macro_f1", "feature_knn_accuracy", "feature_silhouette"),
    *("best_val_loss_epoch", "fall_train_loss", "fall_val_loss", "rise_train_accuracy"),
    *("final_accuracy_gap", "seconds_per_epoch"),
)
"""`best_val_`: of the epoch that `training.monitor` chose. `first_`, `final_`: of the first and the
last epoch; `test_` ones of an epoch exist where the study watched the test set, and those of
balanced accuracy and macro F1 where the run monitors one of them. `macro_`: mean over the classes,
of the test predictions. `feature_`: how well the features keep the classes apart.
`fall_`, `rise_`: from the first epoch to the last. `final_accuracy_gap`: the last epoch's accuracy
on the training images minus that on the test images."""

_NUMBERS = {
    **dict.fromkeys(("class_precision", "class_recall", "class_f1"), 1),
    **dict.fromkeys(("lowest_recall", "highest_recall", "recall_gap"), 2),
    **dict.fromkeys(("val_accuracy_from", "reduction_to"), 1),
}
"""Metrics that are named with one or two numbers: `class_recall:3`, `recall_gap:3:5`. Those of
recall are of classes: the lower and the higher of two, and how far both are below all others.
`val_accuracy_from:13` is the mean from that epoch on, `reduction_to:0.0001` the last epoch before
the learning rate is so low."""


def check(name: str) -> None:
    """UsageError unless `name` is a metric."""
    kind, *numbers = name.split(":")
    form = r"\d*\.?\d+(e-\d+)?" if kind == "reduction_to" else r"\d+"
    whole = all(re.fullmatch(form, number) for number in numbers)
    if name in _NAMES or (numbers and whole and len(numbers) == _NUMBERS.get(kind)):
        return
    known = [*_NAMES, *(kind + ":<number>" * count for kind, count in _NUMBERS.items())]
    raise UsageError(
        f"there is no metric {name[:80]}{did_you_mean(name, known)}; there are {', '.join(known)}"
    )


def of_run(
    name: str, run: RunDir, summary: RunSummary, history: Sequence[EpochMetrics]
) -> float | None:
    """Return a metric of a run; None where the run has no such number (yet).

    UsageError for an unknown name, RunFailed for a damaged report.
    """
    check(name)
    kind, *numbers = name.split(":")
    value: float | None = None
    if kind in _OF_SUMMARY:
        value = getattr(summary, kind)
    elif kind == "best_val_loss_epoch":
        value = summary.diagnosis.get(kind)
    elif kind.startswith("feature_"):
        value = summary.separation.get(kind.removeprefix("feature_"))
    elif kind.startswith(("macro_", "class_")) or "recall" in kind:
        value = _of_classes(kind, [int(n) for n in numbers], run)
    elif history:
        value = _of_history(kind, [float(n) for n in numbers], history)
    return None if value is None or not math.isfinite(value) else float(value)


def _of_history(
    kind: str, numbers: Sequence[float], history: Sequence[EpochMetrics]
) -> float | None:
    first, last = history[0], history[-1]
    if kind == "seconds_per_epoch":
        return sum(row.seconds for row in history) / len(history)
    if kind == "final_accuracy_gap":
        return None if last.test_accuracy is None else last.train_accuracy - last.test_accuracy
    if kind == "val_accuracy_from":
        late = history[int(numbers[0]) - 1 :]
        known = [row.val_accuracy for row in late if row.val_accuracy is not None]
        return sum(known) / len(known) if known else None
    if kind == "reduction_to":
        limit = numbers[0] * (1 + 1e-9)
        return next((row.epoch - 1 for row in history if row.learning_rate <= limit), None)
    moment, _, column = kind.partition("_")
    start: float | None = getattr(first, column)
    end: float | None = getattr(last, column)
    if moment in ("first", "final"):
        return start if moment == "first" else end
    if start is None or end is None:
        return None
    return end - start if moment == "rise" else start - end


def _of_classes(kind: str, classes: Sequence[int], run: RunDir) -> float | None:
    """Return a score of the test predictions by class; it is 0 where it is undefined."""
    score = kind.rpartition("_")[2] if kind.startswith(("macro_", "class_")) else "recall"
    values = [float(row["f1-score" if score == "f1" else score]) for row in run.read_report()]
    if not values or max(classes, default=0) >= len(values):
        return None
    if kind.startswith("macro_"):
        return sum(values) / len(values)
    chosen = [values[number] for number in classes]
    others = [value for number, value in enumerate(values) if number not in classes]
    if kind == "recall_gap":
        return min(others) - max(chosen) if others else None
    return max(chosen) if kind == "highest_recall" else min(chosen)


COUNTS_IMAGES = ("best_val_accuracy", "test_accuracy", "test_accuracy_last")
"""Metrics that are the share of images which the stored predictions get right."""


def higher_is_better(name: str) -> bool:
    """Whether more of it is better: accuracies and their kin, not losses, gaps, times or sizes."""
    is_worse = "gap" in name or name == "expected_calibration_error"
    return name.startswith(("fall_", "feature_")) or (is_fraction(name) and not is_worse)


def measured_on(name: str) -> tuple[str, str] | None:
    """Return the images and the weights whose stored predictions the metric belongs to, if any."""
    if is_test(name):
        return "test", "last" if name == "test_accuracy_last" else "scored"
    return ("validation", "scored") if "val_" in name else None


def is_fraction(name: str) -> bool:
    """Whether the metric is a share, or a difference of two, and is written in per cent."""
    words = ("accuracy", "precision", "recall", "f1", "calibration_error")
    return any(word in name for word in words)


def factor(name: str) -> float:
    """Return by what a value is multiplied to be shown: 100 for one in per cent."""
    return 100.0 if is_fraction(name) else 1.0


def is_test(name: str) -> bool:
    """Whether the metric looks at the test images."""
    kinds = ("test", "recall", "gap", "macro_", "class_", "expected_", "feature_")
    return any(kind in name for kind in kinds) and "val_" not in name


def bounds(name: str) -> tuple[float, float]:
    """Return the smallest and largest value that the metric can have."""
    if name.startswith(("fall_", "rise_", "recall_gap", "final_accuracy_gap")):
        return -math.inf, math.inf
    if is_fraction(name):
        return 0.0, 1.0
    return (-1.0 if name == "feature_silhouette" else 0.0), math.inf


_WORDS = {"val": "validation", "train": "training", "knn": "nearest-neighbour"}


def in_words(name: str) -> str:
    """Return a metric's name in words: `validation accuracy`, `final training loss`."""
    of_best_epoch = name.startswith("best_val_") and not name.endswith("_epoch")
    plain = name.removeprefix("best_") if of_best_epoch else name
    plain = plain.replace("accuracy_last", "accuracy_of_the_last_weights")
    return " ".join(_WORDS.get(word, word) for word in plain.replace(":", " ").split("_"))


def show(name: str, value: float | None) -> str:
    """Return a metric's value as text: `87.31 %`, `0.4123`, `–`."""
    return "–" if value is None else _in_unit(name, "{}", value)


def show_interval(name: str, found: Interval | None) -> str:
    """Return a mean with its 95 % interval: `87.31 ± 0.42 %`, `98.90 % (97.31 to 100.00)`.

    Of two values both are shown instead, as in `87.10 and 87.52 %`; of an epoch, and of equal
    values, the mean alone.
    """
    if found is None:
        return "–"
    if "epoch" in name or not found.std:
        return show(name, found.mean)
    if found.low is None or found.high is None:
        return _in_unit(name, "{} and {}", found.smallest, found.largest)
    below, above = found.mean - found.low, found.high - found.mean
    if math.isclose(below, above, rel_tol=1e-6, abs_tol=1e-12):
        return _in_unit(name, "{} ± {}", found.mean, below)
    ends = _in_unit(name, "{} to {}", found.low, found.high).removesuffix(" %")
    return f"{show(name, found.mean)} ({ends})"


def _in_unit(name: str, form: str, *values: float) -> str:
    """Return numbers in the metric's unit, which is named once, at the end."""
    digits, unit = (".2f", " %") if is_fraction(name) else (".4f", "")
    if max(map(abs, values)) >= 1e6:  # the loss of a run that diverges
        digits = ".4g"
    if name == "seconds_per_epoch":
        digits, unit = ".1f", " s"
    elif (
        name in ("epochs", "parameters") or name.endswith("_epoch") or name.startswith("reduction")
    ):
        digits = ",.0f" if all(float(value).is_integer() for value in values) else ",.1f"
    return form.format(*(f"{factor(name) * value:{digits}}" for value in values)) + unit


def show_width(name: str, value: float) -> str:
    """Return how far apart two values are: `1.84 points` of per cent, `0.0123`, `2`."""
    return show(name, value).replace(" %", " points")


def show_difference(name: str, value: float | None) -> str:
    """Return a difference with its sign: `-1.84 points`, `+0.0123`, `+2`, `–`."""
    if value is None:
        return "–"
    shown = show_width(name, abs(value))
    return ("-" if value < 0 else "+") + shown if re.search("[1-9]", shown) else shown
