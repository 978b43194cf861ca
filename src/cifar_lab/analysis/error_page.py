"""Which test images runs get wrong most confidently, which labels are probably wrong, as a page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cifar_lab.analysis.ensembles import Probabilities
from cifar_lab.analysis.statistics import in_order
from cifar_lab.analysis.summary import PAGES
from cifar_lab.errors import shorten
from cifar_lab.figures.image_grid import Pixels, thumbnail
from cifar_lab.runs.metrics import Integers, Predictions
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.text import render

_LONGEST = 112  # pixels of a picture's longer side, on the page


def error_page(
    runs: Sequence[RunDir],
    image_of: Callable[[int], Pixels],
    count: int,
    files: Sequence[str] = (),
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

    def picture_of(mistake: Mistake) -> dict[str, Any]:
        return thumbnail(image_of(mistake.index), _LONGEST)

    def name_of(mistake: Mistake) -> str:
        return shorten(files[mistake.index], 60) if files else f"test image {mistake.index:,}"

    titles = [shorten(run.path.name, 120) for run in runs]
    mistakes = [confident_mistakes(stored, count) for stored in predictions]
    return render(
        PAGES / "errors.html",
        runs=list(zip(titles, predictions, mistakes, strict=True)),
        suspects=label_errors(predictions) if is_asked else None,
        right=right,
        count=count,
        names=[shorten(name, 40) for name in names],
        picture_of=picture_of,
        name_of=name_of,
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
    which have not trained on these images: an image is suspected if one of the classes that are at
    least as probable as they are on average for their own images is not its label; here most of
    the runs have to predict that class, too. Suspects are ordered by its probability minus that of
    the label.
    """
    runs = [in_order(predictions) for predictions in each]
    labels = runs[0].labels
    mean: Probabilities = np.mean([run.class_probabilities for run in runs], axis=0)
    guesses = np.stack([run.predicted for run in runs])
    suspected = _confident_class(mean, labels)
    votes = (guesses == suspected).sum(axis=0)
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


def _confident_class(probabilities: Probabilities, labels: Integers) -> Integers:
    """Return the class to which confident learning counts each image; its label if to none.

    A class counts if its probability is at least the mean of those that the images labelled so
    have for it; of several such classes, the most probable one.
    """
    classes = probabilities.shape[1]
    thresholds = np.full(classes, np.inf)
    for label in np.unique(labels):
        thresholds[label] = probabilities[labels == label, label].mean()
    above = np.where(probabilities >= thresholds, probabilities, -np.inf)
    return np.where(np.isfinite(above).any(axis=1), above.argmax(axis=1), labels)
