"""Several runs as one classifier: the mean of their probabilities."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cifar_lab.analysis.load_runs import identity_without
from cifar_lab.analysis.statistics import in_order
from cifar_lab.datasets.pictures import Pictures
from cifar_lab.errors import UsageError, shorten_path
from cifar_lab.runs.metrics import Predictions
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.scoring import probabilities

Probabilities = npt.NDArray[np.float64]


def check_members(runs: Sequence[RunDir], *, same_test_set: bool = False) -> None:
    """Refuse runs that cannot be averaged: of other classes, or given twice; nothing is written.

    `same_test_set`: those that are tested on other images, too.
    """
    if len(runs) < 2:
        raise UsageError("an ensemble needs two runs or more")
    first, paths = runs[0], [run.path.resolve() for run in runs]
    for run, path in zip(runs, paths, strict=True):
        name, other = shorten_path(run.path), shorten_path(first.path)
        if paths.count(path) > 1:
            raise UsageError(f"{name} is given twice")
        if run.class_names() != first.class_names():
            raise UsageError(
                f"{name} has other classes than {other}; an ensemble needs runs of the same classes"
            )
        if same_test_set and _test_set(run) != _test_set(first):
            raise UsageError(
                f"{name} is tested on other images than {other}; an ensemble needs runs of the "
                "same test set"
            )


def mean_predictions(runs: Sequence[RunDir]) -> Predictions:
    """Return the ensemble's predictions of the test images, from those that the runs stored.

    The logits are the logarithms of the mean probabilities, (N, C).
    """
    members = [in_order(run.read_predictions()) for run in runs]
    mean = np.mean([member.class_probabilities for member in members], axis=0)
    with np.errstate(divide="ignore"):
        logits = np.log(mean)
    smallest = np.finfo(np.float32).min / 2  # where all members say 0
    return dataclasses.replace(members[0], logits=np.maximum(logits, smallest).astype(np.float32))


def mean_probabilities(runs: Sequence[RunDir], pictures: Pictures, **options: Any) -> Probabilities:
    """Return the probability of each class for each picture, (N, C): the mean over the runs.

    `options` are those of `scoring.probabilities`.
    """
    if len(runs) != 1:
        check_members(runs)
    mean: Probabilities = np.mean([probabilities(r, pictures, **options) for r in runs], axis=0)
    return mean


def _test_set(run: RunDir) -> dict[str, Any]:
    """Return what decides which images test a run."""
    config = run.read_config()
    divided = config.split.source == "test" and config.evaluation.test == "split"
    parts = ("dataset.name", "dataset.source.", *(["split."] if divided else []))
    values = {k: v for k, v in identity_without(config).items() if k.startswith(parts)}
    return values | {"test_labels": run.read_summary().dataset.get("test_labels")}
