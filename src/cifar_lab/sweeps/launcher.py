"""Where cells run: what the loop of a sweep asks of a back end."""

import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from cifar_lab.config import targets
from cifar_lab.config.launch import MAX_RUNS, LaunchOptions
from cifar_lab.config.run_config import RunConfig
from cifar_lab.sweeps.cell import STOPPED, Cell, note
from cifar_lab.sweeps.outcome import Outcome
from cifar_lab.sweeps.server import LOST
from cifar_lab.training import device
from cifar_lab.training.loop import Stop

_BYTES_PER_JOB = 1_500_000_000  # what a process with torch and CIFAR-10 needs, with room
_OWN_CODES = (2, 3, *STOPPED)  # with which a cell ends that says why


class Job(ABC):
    """A cell that was started. `loss` says why it ended where nothing else does."""

    loss = "its process ended without a result; see its train.log"

    def __init__(self, cell: Cell) -> None:
        self.cell, self.before = cell, cell.state()
        self.was_asked = False
        self._started = time.monotonic()

    def ask_to_stop(self) -> None:
        """Let the run save and end; asking again changes nothing."""
        if not self.was_asked:
            self.was_asked = True
            self.stop()

    def outcome(self) -> Outcome:
        """Return how a job ended, by its exit code and what is in its folder."""
        code, after = self.poll() or 0, self.cell.state()
        if after == "finished":
            code = 0  # the signal came too late
        elif self.was_asked and code in (LOST, -signal.SIGTERM):  # it did not handle signals yet
            code = 143
        if code not in (0, *_OWN_CODES) and after not in ("failed", "damaged"):
            note(self.cell.run, self._how_it_ended(code), "failed")
            code, after = 1, self.cell.state()
        seconds = time.monotonic() - self._started
        return Outcome(self.cell, self.before, after, seconds, code, self.cell.why(code))

    def _how_it_ended(self, code: int) -> str:
        """Return why a process ended that did not say so itself."""
        if -code not in list(signal.Signals):
            return self.loss
        name = signal.Signals(-code).name
        return f"killed by {name}{' (out of memory?)' * (name == 'SIGKILL')}"

    @abstractmethod
    def stop(self) -> None:
        """Let the run save and end."""

    @abstractmethod
    def poll(self) -> int | None:
        """Return the exit code of a job that has ended, None while it runs."""


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

    def is_sent(self, cell: Cell) -> bool:
        """Return whether an earlier command has started this cell, which `start` then takes up."""
        return False

    def is_free(self, cell: Cell) -> bool:
        """Return whether a cell can be started now, or taken up."""
        return self.is_sent(cell) or not cell.run.is_locked()

    def arguments(self, cell: Cell) -> list[str]:
        """Return what follows `python -m cifar_lab.sweeps.cell`."""
        flags = ["--accept-code"] * self.options.accept_code
        flags += ["--attached"] * (not self.is_detached)
        trusted = [word for module in targets.trusted() for word in ("--trust", module)]
        return [str(cell.run.path.absolute()), "--code", cell.code, *flags, *trusted]

    @abstractmethod
    def start(self, cells: Sequence[Cell]) -> Sequence[Job]:
        """Start cells."""

    def wait(self, jobs: Sequence[Any], stop: Stop) -> None:
        """Return when a job has ended or a signal came, and after a while in any case."""
        deadline, signal_before = time.monotonic() + 0.25, stop.signal
        while stop.signal == signal_before and time.monotonic() < deadline:
            if any(job.poll() is not None for job in jobs):
                return
            time.sleep(0.02)

    @abstractmethod
    def abandon(self, jobs: Sequence[Any]) -> None:
        """Leave jobs that have not ended: end them, or let them go on where `is_detached`."""


def fitting_jobs(
    configs: Sequence[RunConfig], jobs: int | Literal["auto"], jobs_per_gpu: int = 1
) -> tuple[int, list[str]]:
    """Return how many cells run at a time, and the GPU of each such slot ("" where none is given).

    auto fills the GPUs that are visible, or else the cores, as far as the memory goes. Where cells
    name their GPU (`cuda:1`), they see all of them and choose it themselves.
    """
    devices = {config.device for config in configs}
    gpus = [""] * len(devices) if any(":" in name for name in devices) else []
    if "cuda" in devices:
        gpus = gpus or device.visible_gpus() or [""]
    wanted: int | None = None if jobs == "auto" else jobs
    if gpus:
        fitting = len(gpus) * jobs_per_gpu
        count = max(1, min(wanted or fitting, fitting, len(configs)))
        return count, [gpus[slot % len(gpus)] for slot in range(count)]
    if wanted is None:
        threads = max((config.threads or 1 for config in configs), default=1)
        fitting = min(_cores() // threads, _free_memory() // _BYTES_PER_JOB)
        wanted = 1 if "mps" in devices else fitting
    count = max(1, min(wanted, len(configs)))
    return count, [""] * count


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _free_memory() -> int:
    """Return the bytes that new processes may take; a lot where the system does not say."""
    source = Path("/proc/meminfo")
    lines = source.read_text(encoding="ascii").splitlines() if source.exists() else []
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kilobytes[0]) * 1024 if kilobytes else 1 << 60
