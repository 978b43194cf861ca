"""How long a report trained that does not say so, told from runs of several lengths."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from cifar_lab.analysis.run_metrics import show
from cifar_lab.analysis.statistics import LEVEL
from cifar_lab.analysis.verdicts import Estimate, Verdict, pooled_spread
from cifar_lab.config.reports import Claim


@dataclass(frozen=True)
class EpochStudy:
    """The accuracy that a report gives, beside runs of each length.

    `values`: for each number of epochs, the accuracy by seed. A longer run may continue a shorter
    one of its seed, so that a seed deviates alike at all lengths: it counts once.
    """

    claim: Claim
    values: Mapping[int, Mapping[int, float]]

    @property
    def reported(self) -> float:
        """The accuracy in the report."""
        assert self.claim.value is not None
        return self.claim.value

    @cached_property
    def means(self) -> dict[int, float]:
        """The measured mean at each number of epochs."""
        return {epochs: fmean(values.values()) for epochs, values in self.values.items()}

    @cached_property
    def degrees(self) -> float:
        """The degrees of freedom of the deviation of single runs; 0 where nothing is known."""
        spread = pooled_spread(list(self.values.values()))
        return spread.degrees if spread else 0.0

    @cached_property
    def halves(self) -> dict[int, float]:
        """Half the width of the 95 % interval for one more run at each number of epochs."""
        spread = pooled_spread(list(self.values.values()))
        if spread is None:
            return dict.fromkeys(self.values, 0.0)
        variance = spread.std**2
        return {
            epochs: Estimate(0, variance / n, variance, spread.degrees, n).half(LEVEL, variance)
            for epochs, n in ((epochs, len(values)) for epochs, values in self.values.items())
        }

    @property
    def fitting(self) -> list[int]:
        """The lengths at which one more run could have given the number in the report."""
        return [
            epochs
            for epochs, mean in self.means.items()
            if abs(mean - self.reported) <= self.halves[epochs] + self.claim.rounding
        ]

    @property
    def nearest(self) -> int:
        """The number of epochs at which the mean is nearest to the report's."""
        return min(self.means, key=lambda epochs: abs(self.means[epochs] - self.reported))

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
            f"{show(self.claim.metric, self.reported)} {self.fit}: the interval for one more run "
            f"there contains it (n = {n} seeds at least, scored by their last weights; the "
            f"variance pooled over the lengths has {self.degrees:.3g} degrees of freedom, since "
            "longer runs continue shorter ones). Our mean is nearest at "
            f"{self.nearest} epochs; the other figures are those of that length."
        )
