"""How long a report trained that does not say so, told from runs of several lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from statistics import fmean

from cifar_lab.analysis import run_metrics
from cifar_lab.analysis.claims import JudgedClaim
from cifar_lab.analysis.verdicts import reproduced_at, spans


@dataclass(frozen=True)
class EpochStudy:
    """The accuracy that a report gives and its figures of the classes, beside runs of each length.

    `accuracy` and `classes` are claims with `by_epochs`, all of the same runs.
    """

    accuracy: JudgedClaim
    classes: tuple[JudgedClaim, ...]

    @property
    def reported(self) -> float:
        """The accuracy in the report."""
        assert self.accuracy.claim.value is not None
        return self.accuracy.claim.value

    @property
    def accuracies(self) -> dict[int, list[float]]:
        """The measured accuracies for each number of epochs, one per seed."""
        return self.accuracy.values_by_epochs

    @property
    def fitting(self) -> list[int]:
        """The numbers of epochs at which the accuracy is reproduced."""
        return reproduced_at(self.accuracy.claim, self.accuracies)

    @cached_property
    def distances(self) -> dict[int, list[float]]:
        """The mean absolute difference of the classes' figures from the report's, one per seed."""
        return {
            epochs: [
                fmean(
                    abs(one.by_epochs[epochs][run] - one.claim.value)
                    for one in self.classes
                    if one.claim.value is not None
                )
                for run in runs
            ]
            for epochs, runs in self.accuracy.by_epochs.items()
        }

    @cached_property
    def between_seeds(self) -> float:
        """The same difference between two runs that differ in their seed, on average."""
        return fmean(
            abs(a - b)
            for one in self.classes
            for found in one.by_epochs.values()
            for a, b in combinations(found.values(), 2)
        )

    @property
    def nearest(self) -> int:
        """The number of epochs at which the classes' figures are nearest to the report's."""
        return min(self.distances, key=lambda epochs: fmean(self.distances[epochs]))

    def __str__(self) -> str:
        """Say between which epochs the report's run lies."""
        lengths = list(self.accuracies)
        n = min(map(len, self.accuracies.values()))
        shown = run_metrics.show(self.accuracy.metric, self.reported)
        if self.fitting:
            where = f"is reproduced at {spans(self.fitting, lengths)} epochs"
        else:
            where = f"differs at every length from {lengths[0]} to {lengths[-1]} epochs"
        off = 100 * fmean(self.distances[self.nearest])
        return (
            f"The report does not say how many epochs it trained. By runs of {lengths[0]} to "
            f"{lengths[-1]} epochs (n = {n} each, evaluated as in the report and scored by their "
            f"last weights), its accuracy of {shown} {where}. Its {len(self.classes)} figures of "
            f"the classes are nearest to ours at {self.nearest} epochs, where they are off by "
            f"{off:.1f} points on average; two of our own seeds differ by "
            f"{100 * self.between_seeds:.1f}."
        )


def find(judged: Sequence[JudgedClaim]) -> EpochStudy | None:
    """Return the study among judged claims of one experiment, None if there is none."""
    chosen = [one for one in judged if one.by_epochs and one.claim.value is not None]
    accuracy = next((one for one in chosen if one.metric.startswith("test_accuracy")), None)
    if accuracy is None:
        return None
    runs = {run for found in accuracy.by_epochs.values() for run in found}
    classes = tuple(
        one
        for one in chosen
        if one.metric.startswith("class_")
        and {r for f in one.by_epochs.values() for r in f} == runs
    )
    return EpochStudy(accuracy, classes) if classes else None
