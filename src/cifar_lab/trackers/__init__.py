"""Trackers: programs that collect runs, such as MLflow; one file per tracker.

A tracker gets what a run's folder holds, and nothing else, so that a run that trains and a run of
last year are sent in the same way (`sending`). A run that trains never waits for its tracker: a
process of its own does the sending.
"""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from cifar_lab.config import targets
from cifar_lab.config.schema import TargetConfig, wrong
from cifar_lab.errors import UsageError, missing_extra, redact_addresses
from cifar_lab.runs.metrics import EpochMetrics
from cifar_lab.runs.summary import Status

# By the setting that takes an address: what the clients read passwords from.
_SECRETS = {
    "uri": "MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_URI",
    "server": "TRACKIO_WRITE_TOKEN, or TRACKIO_SERVER_URL",
}


@dataclass(frozen=True)
class TrackedRun:
    """A run, as a tracker is told about it.

    `key` is made once for a folder and a tracker, and names the same run there whenever it goes on.
    `project` is the config's `name`, `group` what runs that differ in the seed alone share,
    `settings` the config with dotted keys, `about` the folder's path and where the result is from.
    `epochs` is the number that was sent before; `live` says that the run is training.
    """

    key: str
    name: str
    folder: Path
    project: str
    group: str
    settings: Mapping[str, Any]
    about: Mapping[str, str]
    epochs: int
    live: bool


class Session(ABC):
    """A run that is open at a tracker.

    `epochs` says how many of its epochs the tracker has; `link` is the address of its page, if any.
    """

    epochs: int
    link: str | None = None

    @abstractmethod
    def log_epochs(self, rows: Sequence[EpochMetrics]) -> None:
        """Send epochs that the tracker does not have."""

    @abstractmethod
    def log_result(self, scores: Mapping[str, float], figures: Mapping[str, Path]) -> None:
        """Send the final scores and the pictures of a finished run, by name."""

    @abstractmethod
    def close(self, status: Status) -> None:
        """Send what is buffered and note how the run ended; it can be opened again."""


@dataclass(frozen=True, kw_only=True)
class Tracker(ABC):
    """The settings of a tracker. Making one checks them and contacts nobody.

    `wait_seconds`: how long a run that has ended waits for its tracker. Raises UsageError for
    settings that are wrong and for a package that is not installed.
    """

    wait_seconds: float = 30.0

    title: ClassVar[str]
    package: ClassVar[str]  # what is imported, and the name of the extra

    def __post_init__(self) -> None:
        if not 0 < self.wait_seconds <= 3600:
            raise wrong("tracker.wait_seconds", self.wait_seconds, "more than 0 and at most 3600")
        spec = importlib.util.find_spec(self.package)
        if spec is None or spec.origin is None:  # W&B's folder ./wandb looks like a package, too
            raise missing_extra(f"tracker={self.package}", self.title, self.package)

    @abstractmethod
    def destination(self, project: str) -> str:
        """Return where runs with this `name` go. Another destination gets runs of its own."""

    @abstractmethod
    def open(self, run: TrackedRun) -> Session:
        """Start the run at the tracker, or continue the one that has its key."""


def build_tracker(target_config: TargetConfig) -> Tracker:
    """Return the tracker that a config names; UsageError if its settings or its package are not.

    An address with a password is refused: it would stand in config.yaml.
    """
    for key, value in target_config.items():
        if isinstance(value, str) and redact_addresses(value) != value:
            raise UsageError(
                f"tracker.{key} contains a user, a password or a query, which would be written "
                f"into config.yaml: set {_SECRETS.get(key, 'an environment variable')} instead"
            )
    tracker: Tracker = targets.build(target_config, "tracker")
    return tracker


def values_of(row: EpochMetrics) -> dict[str, float]:
    """Return the values of an epoch by the names of metrics.csv, without those that are missing."""
    values = asdict(row)
    return {name: n for name, n in values.items() if n is not None and name != "epoch"}
