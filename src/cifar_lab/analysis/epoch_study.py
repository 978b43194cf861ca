"""How long a report trained that does not say so, told from runs of several lengths."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from cifar_lab.analysis.contrasts import Deviation
from cifar_lab.analysis.run_metrics import show
from cifar_lab.analysis.statistics import LEVEL
from cifar_lab.analysis.verdicts import Estimate, Verdict, pooled_deviation
from cifar_lab.config.reports import Claim


@dataclass(frozen=True)
class EpochStudy:
    """The accuracy that a report gives, beside runs of each length.

    `values`: for each number of epochs, the accuracy by seed. A longer run may continue a shorter
    one of its seed, so that a seed deviates alike at all lengths: it counts once.
    """

    claim: Claim
    values: Mapping[int, Mapping[int, float]]

    @cached_property
    def estimates(self) -> dict[int, Estimate]:
        """How far the mean is off the report's, and the variance of a run, at each length."""
        assert self.claim.value is not None
        deviation = pooled_deviation(list(self.values.values())) or Deviation(0.0, 1.0)
        estimates = {}
        for epochs, values in self.values.items():
            off, n = fmean(values.values()) - self.claim.value, len(values)
            variance = deviation.std**2
            estimates[epochs] = Estimate(off, variance / n, variance, deviation.degrees, n)
        return estimates

    @property
    def halves(self) -> dict[int, float]:
        """Half the width of the 95 % interval for one more run at each number of epochs."""
        return {epochs: e.half(LEVEL, e.single) for epochs, e in self.estimates.items()}

    @property
    def fitting(self) -> list[int]:
        """The lengths at which one more run could have given the number in the report."""
        room = {epochs: half + self.claim.rounding for epochs, half in self.halves.items()}
        return [epochs for epochs, e in self.estimates.items() if abs(e.off) <= room[epochs]]

    @property
    def nearest(self) -> int:
        """The number of epochs at which the mean is nearest to the report's."""
        return min(self.estimates, key=lambda epochs: abs(self.estimates[epochs].off))

    @property
    def fit(self) -> str:
        """Say at which lengths the accuracy fits."""
        lengths, fitting = list(self.values), self.fitting
        if not fitting:
            return f"fits at no length tried, {lengths[0]} to {lengths[-1]} epochs"
        if fitting == lengths:
            return f"fits at every length tried, {lengths[0]} to {lengths[-1]} epochs"
        return f"fits from {fitting[0]} to {fitting[-1]} of {lengths[0]} to {lengths[-1]} epochs"

    @property
    def verdict(self) -> Verdict:
        """The length was chosen by this figure, which can therefore only differ at all lengths."""
        if not self.fitting:
            return Verdict("differs", self.fit)
        return Verdict("not judged", f"fitted to the report: {self.fit}")

    def __str__(self) -> str:
        """Say between which epochs the report's run lies."""
        n = min(map(len, self.values.values()))
        return (
            "The report does not say how many epochs it trained. Its accuracy of "
            f"{show(self.claim.metric, self.claim.value)} {self.fit}: the interval for one more "
            f"run there contains it (n = {n} seeds at least, scored by their last weights; the "
            f"variance pooled over the lengths has {self.estimates[self.nearest].degrees:.3g} "
            "degrees of freedom, since longer runs continue shorter ones). Our mean is nearest at "
            f"{self.nearest} epochs; the other figures are those of that length."
        )
