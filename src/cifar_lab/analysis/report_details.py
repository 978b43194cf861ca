"""What report.html shows of one setting: differences, confusion matrix, calibration, mistakes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cifar_lab.analysis import run_metrics
from cifar_lab.analysis.load_runs import FoundRun
from cifar_lab.analysis.pictures import data_address, side_by_side, thumbnail
from cifar_lab.analysis.run_differences import config_differences
from cifar_lab.analysis.seed_groups import SeedGroup
from cifar_lab.analysis.statistics import interval
from cifar_lab.errors import RunFailed, UsageError, shorten
from cifar_lab.runs.calibration import calibration, pooled
from cifar_lab.runs.metrics import Predictions

MOST_CLASSES = 25
"""A confusion matrix of more classes is shown by its largest errors alone."""

MOST_MISTAKES = 8
LARGEST_THUMBNAIL = 64
"""Pixels of a thumbnail's longer side at most."""


def rounded(value: float | None) -> float | None:
    """Return a number with six digits: enough to draw, and short."""
    return None if value is None else float(f"{value:.6g}")


def difference(setting: SeedGroup, best: SeedGroup) -> list[list[str]]:
    """Return what differs between a setting and the best one: key, its value, the best one's.

    The target of a config group follows from the option, and is left out where that differs.
    """
    here, there = setting.runs[0], best.runs[0]
    options = {g for g in here.choices if here.choices[g] != there.choices.get(g)}
    return [
        [shorten(key, 80), *values]
        for key, *values in config_differences(here, there)
        if not (key.endswith("._target_") and key.removesuffix("._target_") in options)
    ]


def confusion(setting: SeedGroup, *, test: bool) -> dict[str, Any] | None:
    """Return the counts of a setting's runs, of test images if `test`, else of validation images.

    A matrix of test images tells the test score.
    """
    split = "test" if test else "validation"
    read = (run.confusion(split) for run in setting.finished)
    found = [counts for counts in read if counts is not None]
    if not found or len({len(counts) for counts in found}) != 1:
        return None
    counts = np.sum(found, axis=0)
    names = _class_names(setting.finished[0], len(counts))
    return {
        "split": split,
        "images": int(counts.sum()),
        "classes": names if len(names) <= MOST_CLASSES else None,
        "counts": counts.tolist() if len(names) <= MOST_CLASSES else None,
        "most": _most_confused(counts, names),
    }


def reliability(setting: SeedGroup, *, test: bool) -> dict[str, Any] | None:
    """Return how the predictions of a setting's runs are calibrated, of the images of `confusion`.

    The error is that of each run, as a mean with its interval; the bins are those of all runs.
    """
    split = "test" if test else "validation"
    predictions = (run.predictions(split) for run in setting.finished)
    found = [c for p in predictions if p is not None and (c := calibration(p)) is not None]
    if not found:
        return None
    whole = pooled(found)
    error = interval([one.error for one in found], (0.0, 1.0))
    bins = zip(whole.counts, whole.confidence, whole.right, strict=True)
    return {
        "split": split,
        "error": run_metrics.show_interval("expected_calibration_error", error),
        "over": rounded(whole.overconfidence),
        "bins": [
            [int(count), rounded(float(sure / count)), rounded(float(right / count))]
            if count
            else [0, None, None]
            for count, sure, right in bins
        ],
    }


def _most_confused(counts: np.ndarray[Any, Any], names: Sequence[str]) -> list[list[Any]]:
    errors = counts.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:5]
    pairs = [divmod(int(i), len(counts)) for i in order]
    return [[names[a], names[b], int(errors[a, b])] for a, b in pairs if errors[a, b]]


def _class_names(run: FoundRun, count: int) -> list[str]:
    return [shorten(name, 40) for name in run.run.class_names(count)]


def mistakes(setting: SeedGroup, *, lossless: bool) -> dict[str, Any] | None:
    """Return the most confident mistakes of the first run that kept them, as one strip of images.

    Damaged samples become a problem of their run.
    """
    for run in setting.finished:
        path = run.run.samples_file
        if not path.exists():
            continue
        try:
            shown = _worst(run, lossless=lossless)
        except (UsageError, RunFailed) as error:
            run.note(str(error))
        except (KeyError, IndexError, ValueError, TypeError) as error:
            run.note(f"{path} is damaged: {type(error).__name__}: {error}")
        else:
            if shown is not None:
                return shown
    return None


def _worst(run: FoundRun, *, lossless: bool) -> dict[str, Any] | None:
    """Return the worst mistakes of a run: one picture of them, and what each was taken for."""
    path = run.run.samples_file
    arrays = run.run.read_arrays(path)
    chosen = np.flatnonzero(arrays["kind"] == "worst")[:MOST_MISTAKES]
    images, labels, logits = (arrays[name][chosen] for name in ("images", "labels", "logits"))
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise RunFailed(f"{path} is damaged: its images are {images.dtype}{images.shape}")
    if not len(chosen):
        return None
    guessed = Predictions(logits.astype(np.float32), labels, labels)
    names = _class_names(run, logits.shape[1])
    strip = side_by_side([thumbnail(image, LARGEST_THUMBNAIL) for image in images])
    width, height = strip.width // len(images), strip.height
    sure = guessed.probabilities.max(axis=1)
    return {
        "items": [
            {"label": names[int(label)], "guess": names[int(guess)], "p": rounded(float(p))}
            for label, guess, p in zip(labels, guessed.predicted, sure, strict=True)
        ],
        "run": run.replicate_text,
        "strip": data_address(strip, lossless=lossless),
        "width": width,
        "height": height,
    }
