"""Where cells run: what the loop of a sweep asks of a back end."""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from cifar_lab.config.launch import MAX_RUNS, LaunchOptions
from cifar_lab.config.run_config import RunConfig
from cifar_lab.sweeps.cell import Cell
from cifar_lab.sweeps.outcome import Outcome
from cifar_lab.training import device
from cifar_lab.training.signals import Stop

_BYTES_PER_JOB = 1_500_000_000  # what a process with torch and CIFAR-10 needs, with room


class Job(ABC):
    """A cell that was started. `id` is its name in a cluster's queue, "" without a queue."""

    id = ""
    before = "new"

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.was_asked = False
        self._started = time.monotonic()

    def ask_to_stop(self) -> None:
        """Let the run save and end; asking again changes nothing."""
        if not self.was_asked:
            self.was_asked = True
            self.stop()

    def outcome(self) -> Outcome:
        """Return what became of an ended job."""
        code, error = self.result()
        after = self.cell.state()
        if after == "finished" and code in (130, 143):  # the signal came too late
            code, error = 0, None
        seconds = time.monotonic() - self._started
        return Outcome(self.cell, self.before, after, seconds, code, error)

    @abstractmethod
    def stop(self) -> None:
        """Send the signal after which the run saves and ends."""

    @abstractmethod
    def has_ended(self) -> bool:
        """Return whether nothing of the job runs any more."""

    @abstractmethod
    def result(self) -> tuple[int, str | None]:
        """Return the exit code of an ended job and a message, None if all went well."""


class Launcher(ABC):
    """Starts cells, `most_at_once` with one call.

    The jobs of a launcher that `is_detached` go on when this process ends.
    """

    is_detached = False
    most_at_once = MAX_RUNS

    def __init__(self, options: LaunchOptions) -> None:
        self.options = options
        self.free_gpus: list[str] = []

    def prepare(self, configs: Sequence[RunConfig]) -> int:
        """Return how many of these runs go at a time; called once, before the first start."""
        count, gpus = fitting_jobs(configs, self.options.jobs, self.options.jobs_per_gpu)
        self.free_gpus = list(reversed(gpus))
        return count

    def is_free(self, cell: Cell) -> bool:
        """Return whether the cell's folder can be worked in now."""
        return not cell.run.is_locked()

    @abstractmethod
    def start(self, cells: Sequence[Cell], folder: Path) -> Sequence[Job]:
        """Start cells; `folder` is for the launcher's own files."""

    @abstractmethod
    def wait(self, jobs: Sequence[Any], stop: Stop) -> None:
        """Return when a job has ended or a signal came, and after a while in any case."""

    @abstractmethod
    def abandon(self, jobs: Sequence[Any]) -> None:
        """Leave jobs that have not ended: end them, or let them go on where `is_detached`."""


def fitting_jobs(
    configs: Sequence[RunConfig], jobs: int | Literal["auto"], jobs_per_gpu: int = 1
) -> tuple[int, list[str]]:
    """Return how many cells run at a time, and the GPU of each such slot ("" where none is given).

    auto fills the GPUs that are visible, or else the cores, as far as the memory goes.
    """
    wanted: int | None = None if jobs == "auto" else jobs
    if any(config.device == "cuda" for config in configs):
        gpus = device.visible_gpus()
        fitting = len(gpus) * jobs_per_gpu
        count = max(1, min(wanted or fitting, fitting, len(configs)))
        return count, [gpus[slot % len(gpus)] for slot in range(count)]
    if wanted is None:
        threads = max((config.threads or 1 for config in configs), default=1)
        on_mps = any(config.device == "mps" for config in configs)
        wanted = 1 if on_mps else min(_cores() // threads, _free_memory() // _BYTES_PER_JOB)
    count = max(1, min(wanted, len(configs)))
    return count, [""] * count


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _free_memory() -> int:
    """Return the bytes that new processes may take; a lot where the system does not say."""
    source = Path("/proc/meminfo")
    lines = source.read_text(encoding="ascii").splitlines() if source.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else 1 << 60
