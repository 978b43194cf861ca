"""Which test images runs get wrong most confidently, and which labels are probably wrong."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cifar_lab.analysis.ensembles import Probabilities
from cifar_lab.analysis.statistics import in_order
from cifar_lab.runs.calibration import class_probabilities
from cifar_lab.runs.metrics import Integers, Predictions


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
    p, guesses, labels = class_probabilities(predictions), predictions.predicted, predictions.labels
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
    mean: Probabilities = np.mean([class_probabilities(run) for run in runs], axis=0)
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
    return [
        Mistake(
            int(of.indices[i]),
            int(of.labels[i]),
            int(guesses[i]),
            float(p[i, guesses[i]]),
            float(p[i, of.labels[i]]),
            int(runs[i]),
        )
        for i in places
    ]


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
