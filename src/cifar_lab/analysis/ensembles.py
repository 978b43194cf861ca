"""Several runs as one classifier: the mean of their probabilities, and what they doubt.

A page shows which test images runs get wrong most confidently, and which labels several runs
contradict.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cifar_lab.analysis.load_runs import identity_without
from cifar_lab.analysis.statistics import sort_by_index
from cifar_lab.datasets.pictures import Pictures
from cifar_lab.errors import UsageError, shorten, shorten_path
from cifar_lab.figures.image_grid import Pixels, thumbnail
from cifar_lab.runs.metrics import Integers, Predictions, Probabilities
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.text import render
from cifar_lab.training.scoring import probabilities

_LONGEST = 112  # pixels of a picture's longer side, on the page


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
    members = [sort_by_index(run.read_predictions()) for run in runs]
    mean = np.mean([member.class_probabilities for member in members], axis=0)
    with np.errstate(divide="ignore"):
        logits = np.log(mean)
    smallest = np.finfo(np.float32).min / 2  # where all members say 0
    return replace(members[0], logits=np.maximum(logits, smallest).astype(np.float32))


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


def error_page(
    runs: Sequence[RunDir], image_of: Callable[[int], Pixels], count: int, files: Sequence[str] = ()
) -> str:
    """Return the page: `count` mistakes of each run, and of several runs the likely label errors.

    `image_of` returns the image (C, H, W) uint8 with an index of the runs' test set. `files` are
    the names of the files of that set, if its images came from files.
    """
    predictions = [run.read_predictions() for run in runs]
    names = runs[0].class_names(predictions[0].logits.shape[1])
    right = float(np.mean([stored.accuracy for stored in predictions]))
    chance = np.bincount(predictions[0].labels).max() / len(predictions[0])
    is_asked = len(runs) > 1 and right >= (1 + chance) / 2  # nearer to chance, they doubt no label
    titles = [shorten(run.path.name, 120) for run in runs]
    mistakes = [confident_mistakes(stored, count) for stored in predictions]
    return render(
        Path(__file__).parent / "pages" / "errors.html",
        runs=list(zip(titles, predictions, mistakes, strict=True)),
        suspects=label_errors(predictions) if is_asked else None,
        right=right,
        count=count,
        names=[shorten(name, 40) for name in names],
        files=[shorten(name, 60) for name in files],
        picture_of=lambda index: thumbnail(image_of(index), _LONGEST),
    )


@dataclass(frozen=True)
class Mistake:
    """A test image that is taken for another class than its label.

    `index` is its place in the dataset, `p_guess` and `p_label` are the probabilities of the two
    classes, `runs` how many runs make this mistake.
    """

    index: int
    label: int
    guess: int
    p_guess: float
    p_label: float
    runs: int = 1


def confident_mistakes(predictions: Predictions, count: int) -> list[Mistake]:
    """Return at most `count` mistakes of a run, the most confident first."""
    p = predictions.class_probabilities
    guesses, labels = predictions.predicted, predictions.labels
    wrong = np.flatnonzero(guesses != labels)
    places = wrong[np.argsort(-p[wrong].max(axis=1), kind="stable")[:count]]
    return _mistakes(predictions, places, guesses, p, np.ones(len(p), int))


def label_errors(each: Sequence[Predictions]) -> list[Mistake]:
    """Return the images of a test set whose labels are probably wrong, the most probable first.

    Confident learning (Northcutt, Jiang and Chuang 2021) on the mean probabilities of the runs,
    which have not trained on these images: an image is suspected if the most probable one of the
    classes that are at least as probable as they are on average for their own images is not its
    label; here most of the runs have to predict that class, too. Suspects are ordered by its
    probability minus that of the label.
    """
    runs = [sort_by_index(predictions) for predictions in each]
    labels, votes_for = runs[0].labels, np.stack([run.predicted for run in runs])
    mean: Probabilities = np.mean([run.class_probabilities for run in runs], axis=0)
    classes = [labels == number for number in range(mean.shape[1])]
    on_average = [mean[of, c].mean() if of.any() else np.inf for c, of in enumerate(classes)]
    above = np.where(mean >= on_average, mean, -np.inf)
    suspected = np.where(np.isfinite(above).any(axis=1), above.argmax(axis=1), labels)
    votes = (votes_for == suspected).sum(axis=0)
    rows = np.arange(len(labels))
    margin = mean[rows, suspected] - mean[rows, labels]
    chosen = np.flatnonzero((suspected != labels) & (2 * votes > len(runs)))
    places = chosen[np.argsort(-margin[chosen], kind="stable")]
    return _mistakes(runs[0], places, suspected, mean, votes)


def _mistakes(
    of: Predictions, places: Integers, guesses: Integers, p: Probabilities, runs: Integers
) -> list[Mistake]:
    labels, taken = of.labels[places], guesses[places]
    columns = (of.indices[places], labels, taken, p[places, taken], p[places, labels], runs[places])
    return [Mistake(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
