"""What reports say of their experiments: a file of conf/report each, or one's own in --config-dir.

A run names its report by `study.report` and its experiment by its choice; what the report says of
it is no part of the run, so that it can be corrected when the run is long over.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cifar_lab.config.command_line import find_files
from cifar_lab.config.schema import parse_as, setting
from cifar_lab.errors import UsageError, first_line, shorten_path


@dataclass(frozen=True)
class Margin:
    """What difference from a printed number would count as the same, and why that much."""

    reason: str
    size: float = setting(gt=0)

    def check(self, path: str) -> None:
        """Refuse a margin that nobody gave a reason for."""
        if not self.reason.strip():
            raise UsageError(f"{path}.reason is empty: say why so much would count as the same")


@dataclass(frozen=True)
class Claim:
    """What a report says about a metric, where it says so, and about which runs (`where`).

    One of `value` (a number that it prints), `at_least`, `at_most`, and `above` (it says in words
    that the runs of `where` have more of it than those whose settings differ by `above`; with a
    `name` in it, than those of another experiment). With `value` and `above`, the number is that
    difference. `says` is the report's wording, `suspected` the reason to give where the measurement
    differs.

    A number needs a `margin`, and may have been rounded: `rounding` is half a unit of its last
    digit, or what "about" means. `not_judged` is why it is only shown: it follows from others, was
    fitted to the report, or depends on the machine.
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
    margin: Margin | None = None
    rounding: float = setting(0.0, ge=0)
    not_judged: str | None = None
    note: str | None = None
    suspected: str | None = None

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.id or self.metric

    def check(self, path: str) -> None:
        """Refuse a claim without a value, or with two, and a number without a margin."""
        words = None if self.value is not None else self.above or None
        given = [self.value, self.at_least, self.at_most, words]
        if sum(value is not None for value in given) != 1:
            raise UsageError(
                f"{self.name} needs one of value, at_least, at_most and above, or value with above"
            )
        if self.value is not None and self.margin is None and not self.not_judged:
            raise UsageError(
                f"{self.name} needs a margin: its size, and the reason why so much would count as "
                "the same"
            )


@dataclass(frozen=True)
class ReportedExperiment:
    """The claims of a report about the runs of an experiment, and what it leaves open.

    `guessed` is what had to be guessed to train them. `pool` is the reason why all configurations
    of the experiment may be taken to scatter alike; without one, each has a deviation of its own.
    `epochs_fitted_to` names the claim, an accuracy, by which the number of epochs is chosen that
    the report does not give.
    """

    claims: list[Claim] = setting(factory=list)
    guessed: list[str] = setting(factory=list)
    pool: str | None = None
    epochs_fitted_to: str | None = None


@dataclass(frozen=True)
class Report:
    """A report: what it is about, in words that need no other document, and its experiments.

    `facts` are statements that need no training: they follow from the data or the report itself.
    """

    about: str = ""
    facts: list[str] = setting(factory=list)
    experiments: dict[str, ReportedExperiment] = setting(factory=dict)


@functools.cache  # hundreds of runs name the same one
def read_report(tag: str, config_dir: str | Path | None = None) -> Report:
    """Return a report by its tag, from `config_dir` if it is there, else as shipped.

    An empty one where there is no such file.
    """
    path = find_files(config_dir)["report"].get(tag)
    if path is None:
        return Report()
    try:
        return parse_as(Report, yaml.safe_load(path.read_text(encoding="utf-8")), tag)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {first_line(error)}") from None
    except UsageError as error:
        raise UsageError(f"{shorten_path(path)}: {error}") from None
