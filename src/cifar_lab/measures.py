"""The closed table of measures that claims, rankings and tables name: numbers of one run."""

import math
from collections.abc import Callable, Sequence

from cifar_lab.errors import RequestError, did_you_mean
from cifar_lab.metrics import EpochMetrics
from cifar_lab.run_dir import RunDir, RunSummary

Measure = Callable[[RunDir, RunSummary, Sequence[EpochMetrics]], float | None]

PER_CLASS = ("class_precision", "class_recall", "class_f1")
"""Measures of one class, named with its number: `class_recall:3`."""


def _of_summary(field: str) -> Measure:
    return lambda run, summary, history: getattr(summary, field)


def _of_epoch(column: str, index: int) -> Measure:
    return lambda run, summary, history: getattr(history[index], column) if history else None


def _macro(kind: str) -> Measure:
    def mean(run: RunDir, summary: RunSummary, history: Sequence[EpochMetrics]) -> float | None:
        values = class_scores(run)[kind]
        return sum(values) / len(values)

    return mean


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
    "seconds_per_epoch": _seconds,
}
"""`first_`, `final_`: of the first and the last epoch; `test_` ones of an epoch exist where the
study watched the test set. `macro_`: mean over the classes, of the test predictions."""


def check(name: str) -> None:
    """RequestError unless `name` is a measure."""
    kind, colon, number = name.partition(":")
    if name in MEASURES or (colon and kind in PER_CLASS and number.isdecimal()):
        return
    known = [*MEASURES, *(f"{kind}:<class>" for kind in PER_CLASS)]
    raise RequestError(
        f"there is no measure {name[:80]}{did_you_mean(name, known)}; there are {', '.join(known)}"
    )


def measure(
    name: str, run: RunDir, summary: RunSummary, history: Sequence[EpochMetrics]
) -> float | None:
    """Return a measure of a run; None where the run has no such number (yet).

    RequestError for an unknown name or missing predictions, RunFailed for damaged ones.
    """
    check(name)
    kind, _, number = name.partition(":")
    if number:
        values = class_scores(run)[kind.removeprefix("class_")]
        value: float | None = values[int(number)] if int(number) < len(values) else None
    else:
        value = MEASURES[name](run, summary, history)
    return None if value is None or not math.isfinite(value) else float(value)


def class_scores(run: RunDir) -> dict[str, list[float]]:
    """Return precision, recall and f1 of each class on the test images; 0 where undefined."""
    counts = run.read_predictions().confusion_matrix
    scores: dict[str, list[float]] = {"precision": [], "recall": [], "f1": []}
    for index in range(len(counts)):
        right = int(counts[index, index])
        guessed, actual = int(counts[:, index].sum()), int(counts[index].sum())
        scores["precision"].append(right / guessed if guessed else 0.0)
        scores["recall"].append(right / actual if actual else 0.0)
        scores["f1"].append(2 * right / (guessed + actual) if guessed + actual else 0.0)
    return scores


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
        form = ".1f"
    if name in ("best_epoch", "epochs", "parameters"):
        form = ",.0f" if float(value).is_integer() else ",.1f"
    beside = "" if spread is None else f" ± {scale * spread:{form}}"
    return f"{scale * value:{form}}{beside}{unit}"
