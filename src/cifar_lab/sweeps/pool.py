"""Many runs at once: the loop that fills slots with cells, wherever they run.

A cell that fails, diverges or is killed is one failed cell; the others go on. Where cells run is a
launcher (processes of this machine, SLURM), which cell comes next a source (a grid, a search).
"""

import dataclasses
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cifar_lab.config.launch import LaunchOptions
from cifar_lab.errors import RunFailed, Unavailable, UsageError
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.sweeps import local
from cifar_lab.sweeps.cell import Cell
from cifar_lab.sweeps.launcher import Job, Launcher
from cifar_lab.sweeps.outcome import LiveLine, Outcome, Pace
from cifar_lab.training.loop import Stop

log = logging.getLogger("cifar_lab")

PATIENCE_SECONDS = 15.0
"""How long a sweep waits for a folder whose process is just ending."""


class Source(ABC):
    """Which cells run, in which order. `total` counts them, those that are done included."""

    total: int

    @abstractmethod
    def waiting(self) -> Sequence[Cell]:
        """Return cells that are still to come, for the time left."""

    @abstractmethod
    def take(self, is_free: Callable[[Cell], bool], *, idle: bool) -> Cell | None:
        """Return the next cell or None; one whose folder is in use only when all is idle."""

    def is_behind(self, job: Job) -> bool:
        """Return whether a run that is going on is to stop early."""
        return False

    def ended(self, outcome: Outcome) -> Outcome:
        """Note how a run ended; return the outcome as the tables show it."""
        return outcome


def make_launcher(settings: Mapping[str, Any], options: LaunchOptions) -> Launcher:
    """Return the launcher that `hydra/launcher` names; UsageError where it cannot work."""
    if settings.get("cluster") == "ray":
        from cifar_lab.sweeps import ray

        return ray.launcher(settings, options)
    if settings.get("cluster") == "slurm":
        from cifar_lab.sweeps import slurm

        return slurm.launcher(settings, options)
    return local.LocalProcesses(options)


def run_all(
    cells: Sequence[Cell],
    options: LaunchOptions,
    *,
    stop: Stop,
    launcher: Mapping[str, Any] | None = None,
) -> list[Outcome]:
    """Run the cells that are not finished, each in its own process; return all outcomes in order.

    All folders are made first, queued, so that nothing that is edited later changes a cell.
    `launcher` holds the settings of `hydra/launcher`.

    The first signal that `stop` receives lets the running cells save and leaves the rest queued
    (the caller looks at `stop.signal`); a second one kills them and raises Stopped.
    """
    where = make_launcher(launcher or {}, options)
    grid = _Grid(cells, options)
    outcomes = grid.settled
    if waiting := list(grid.waiting()):
        slots = where.prepare([cell.config for cell in waiting])
        if not where.is_detached:
            log.info(
                f"{len(cells)} cell{'s' * (len(cells) != 1)}: {len(waiting)} to run, {slots} at a "
                f"time, {sum(o.after == 'finished' for o in outcomes)} finished before"
            )
        pace = Pace()
        for cell in cells:
            pace.learn(cell)
        outcomes += fill_slots(grid, where, slots, stop=stop, pace=pace)
        outcomes += [grid.ended(Outcome(cell, "", cell.state())) for cell in grid.waiting()]
    by_folder = {outcome.cell.run.path: outcome for outcome in outcomes}
    return [by_folder[cell.run.path] for cell in cells]


def fill_slots(
    source: Source, launcher: Launcher, slots: int, *, stop: Stop, pace: Pace
) -> list[Outcome]:
    """Keep `slots` cells running until the source has no more; return outcomes as they came.

    After a signal no cell is started, and running ones are asked to save and end; the jobs of a
    detached launcher go on, and their cells keep the state that they have. With detach=true, such a
    launcher's jobs are not waited for.
    """
    running: list[Job] = []
    outcomes: list[Outcome] = []
    line = LiveLine(source.total, pace)

    def close(outcome: Outcome) -> None:
        outcomes.append(source.ended(outcome))
        line.ended(outcomes[-1], len(running) + len(source.waiting()))

    def start_more() -> Sequence[Job]:
        """Start cells, up to as many as there are slots; close those whose folder is in use."""
        cells: list[Cell] = []
        while len(running) + len(cells) < slots and len(cells) < launcher.most_at_once:
            cell = source.take(launcher.is_free, idle=not running and not cells)
            if cell is None:
                break
            try:
                if not launcher.is_sent(cell):
                    _make_ready(cell, launcher.options.rerun, stop)
                cells.append(cell)
            except (UsageError, Unavailable, RunFailed) as error:
                after = "in use" if isinstance(error, Unavailable) else cell.state()
                close(Outcome(cell, cell.state(), after, 0.0, error.exit_code, str(error)))
        return launcher.start(cells) if cells else []

    with stop.graceful():
        try:
            while running or (source.waiting() and stop.signal is None):
                while stop.signal is None and (jobs := start_more()):
                    running += jobs
                if launcher.is_detached and launcher.options.detach and not source.waiting():
                    break
                if stop.signal is not None:  # it may have come while cells were starting
                    if launcher.is_detached:
                        break
                    for job in running:
                        job.ask_to_stop()
                launcher.wait(running, stop)
                for job in running:
                    if source.is_behind(job):
                        job.ask_to_stop()
                for job in [job for job in running if job.poll() is not None]:
                    running.remove(job)
                    close(job.outcome())
                line.show([job.cell for job in running], source.waiting(), slots)
        finally:  # nothing is running here but after a signal or an error of ours
            line.close()
            launcher.abandon(running)
    left = [Outcome(job.cell, job.before, job.cell.state()) for job in running]
    return outcomes + [source.ended(outcome) for outcome in left]


def _make_ready(cell: Cell, rerun: bool, stop: Stop) -> None:
    """Wait for a process that is about to leave the folder; discard results if asked to.

    They are discarded here, once: a cell that is tried again goes on from its own checkpoint.
    Raises Unavailable if the folder stays in use.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while cell.run.is_locked() and stop.signal is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if cell.run.is_locked():
        raise Unavailable(f"{cell.run.path} is in use by another process; wait for it or stop it")
    if rerun:
        with cell.run.lock():
            cell.run.own_config()
            cell.run.discard_results()


class _Grid(Source):
    """The cells of a sweep, in their order; one whose folder is in use comes after the others."""

    def __init__(self, cells: Sequence[Cell], options: LaunchOptions) -> None:
        """Make the folders that are not there, queued; `settled` has what needs no process."""
        self.total = len(cells)
        self.settled: list[Outcome] = []
        self._before = {cell.run.path: cell.state() for cell in cells}
        self._waiting: list[Cell] = []
        for cell in cells:
            state = self._before[cell.run.path]
            if state in ("new", "queued"):
                RunDir.create(cell.config)
            outcome = None if options.rerun else _without_running(cell, state, options.accept_code)
            if outcome is None:
                self._waiting.append(cell)
            else:
                self.settled.append(outcome)

    def waiting(self) -> Sequence[Cell]:
        return self._waiting

    def take(self, is_free: Callable[[Cell], bool], *, idle: bool) -> Cell | None:
        free = (cell for cell in self._waiting if is_free(cell))
        cell = next(free, self._waiting[0] if idle and self._waiting else None)
        if cell is not None:
            self._waiting.remove(cell)
        return cell

    def ended(self, outcome: Outcome) -> Outcome:
        """Return the outcome with the state in which the sweep found the cell."""
        return dataclasses.replace(outcome, before=self._before[outcome.cell.run.path])


def _without_running(cell: Cell, state: str, accept_code: bool) -> Outcome | None:
    """Return the outcome of a cell that needs no process, or None."""
    if state == "damaged":
        return Outcome(cell, state, state, 0.0, 1, cell.why(1))
    if state == "other code" and not accept_code:
        error = "made by other code: rerun=true runs it again, accept_code=true takes it as it is"
        return Outcome(cell, state, state, 0.0, 3, error)
    summary = cell.summary()
    if summary is None or summary.status != "finished":
        return None
    problem = cell.data_problem()
    if problem is not None:
        return Outcome(cell, state, "other data", 0.0, 3, problem)
    return Outcome(cell, state, "finished")
