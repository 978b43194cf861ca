"""How long a report trained that does not say so, told from runs of several lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from statistics import fmean

from cifar_lab.analysis import run_metrics
from cifar_lab.analysis.claims import JudgedClaim
from cifar_lab.analysis.load_runs import FoundRun
from cifar_lab.analysis.verdicts import reproduced_at, spans


@dataclass(frozen=True)
class EpochStudy:
    """The accuracy that a report gives and its figures of the classes, beside runs of each length.

    `reported` is the accuracy in the report, `accuracies` the measured ones for each number of
    epochs, one per seed, and `fitting` where it is reproduced; `classes` are claims with
    `by_epochs`, all of the same runs.
    """

    reported: float
    accuracies: dict[int, list[float]]
    fitting: list[int]
    classes: tuple[JudgedClaim, ...]

    @cached_property
    def distances(self) -> dict[int, list[float]]:
        """The mean absolute difference of the classes' figures from the report's, one per seed."""
        return {
            epochs: [fmean(_distances(self.classes, epochs, run)) for run in runs]
            for epochs, runs in self.classes[0].by_epochs.items()
        }

    @cached_property
    def between_seeds(self) -> float:
        """The same difference between two runs that differ in their seed, on average."""
        return fmean(
            abs(a - b)
            for judged in self.classes
            for values in judged.by_epochs.values()
            for a, b in combinations(values.values(), 2)
        )

    @property
    def nearest(self) -> int:
        """The number of epochs at which the classes' figures are nearest to the report's."""
        return min(self.distances, key=lambda epochs: fmean(self.distances[epochs]))

    def __str__(self) -> str:
        """Say between which epochs the report's run lies."""
        lengths = list(self.accuracies)
        n = min(map(len, self.accuracies.values()))
        shown = run_metrics.show("test_accuracy", self.reported)
        where = f"differs at every length from {lengths[0]} to {lengths[-1]} epochs"
        if self.fitting:
            where = f"is reproduced at {spans(self.fitting, lengths)} epochs"
        off = 100 * fmean(self.distances[self.nearest])
        return (
            f"The report does not say how many epochs it trained. By runs of {lengths[0]} to "
            f"{lengths[-1]} epochs (n = {n} each, evaluated as in the report and scored by their "
            f"last weights), its accuracy of {shown} {where}. Its {len(self.classes)} figures of "
            f"the classes are nearest to ours at {self.nearest} epochs, where they are off by "
            f"{off:.1f} points on average; two of our own seeds differ by "
            f"{100 * self.between_seeds:.1f}."
        )


def _distances(classes: Sequence[JudgedClaim], epochs: int, run: FoundRun) -> list[float]:
    return [
        abs(judged.by_epochs[epochs][run] - judged.claim.value)
        for judged in classes
        if judged.claim.value is not None
    ]


def find(claims: Sequence[JudgedClaim]) -> EpochStudy | None:
    """Return the study among judged claims of one experiment, None if there is none."""
    chosen = [judged for judged in claims if judged.by_epochs and judged.claim.value is not None]
    accuracy = next((j for j in chosen if j.metric.startswith("test_accuracy")), None)
    if accuracy is None or accuracy.claim.value is None:
        return None
    runs = [values.keys() for values in accuracy.by_epochs.values()]
    classes = tuple(
        judged
        for judged in chosen
        if judged.metric.startswith("class_")
        and [values.keys() for values in judged.by_epochs.values()] == runs
    )
    accuracies = accuracy.values_by_epochs
    fitting = reproduced_at(accuracy.claim, accuracies)
    return EpochStudy(accuracy.claim.value, accuracies, fitting, classes) if classes else None
