"""Settings of what an experiment reproduces: a report, its claims and what had to be guessed."""

from dataclasses import dataclass
from typing import Any

from cifar_lab.config.schema import setting
from cifar_lab.errors import UsageError


@dataclass(frozen=True)
class ClaimConfig:
    """What a report says about a metric, where it says so, and about which runs (`where`).

    One of `value` (a number that it prints), `at_least`, `at_most`, and `above` (it says in words
    that the runs of `where` have more of it than those whose settings differ by `above`; with a
    `name` in it, than those of another experiment). `says` is the report's wording, `suspected` the
    reason to give where the measurement differs.
    """

    metric: str
    source: str
    value: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    above: dict[str, Any] = setting(factory=dict)
    where: dict[str, Any] = setting(factory=dict)
    id: str | None = None
    says: str | None = None
    tolerance: float | None = setting(None, gt=0)
    note: str | None = None
    suspected: str | None = None

    def check(self, path: str) -> None:
        """Refuse a claim without a value, or with two."""
        given = [self.value, self.at_least, self.at_most, self.above or None]
        if sum(one is not None for one in given) != 1:
            raise UsageError(
                f"study.claims: {self.id or self.metric} needs one of value, at_least, at_most "
                "and above"
            )


@dataclass(frozen=True)
class StudyConfig:
    """What an experiment reproduces: the report's tag, its claims, and what had to be guessed.

    `hinges_on` names the guesses that decide its numbers, which then cannot be judged.
    """

    report: str | None = None
    title: str | None = None
    claims: list[ClaimConfig] = setting(factory=list)
    guessed: list[str] = setting(factory=list)
    hinges_on: str | None = None
    target_accuracy: float | None = setting(None, gt=0, le=1)
