"""Many runs at once: the loop that fills slots with cells, wherever they run.

A cell that fails, diverges or is killed is one failed cell; the others go on. Where cells run is a
launcher (processes of this machine, SLURM, Ray), which cell comes next a source (a grid, a search).
"""

import dataclasses
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from cifar_lab.config import targets
from cifar_lab.config.launch import MAX_RUNS, LaunchOptions
from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import RunFailed, Unavailable, UsageError, log
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.sweeps.cell import STOPPED, Cell, note
from cifar_lab.sweeps.outcome import LiveLine, Outcome, Pace
from cifar_lab.sweeps.server import LOST
from cifar_lab.training.loop import Stop

PATIENCE_SECONDS = 15.0
"""How long a sweep waits for a folder whose process is just ending."""

_OWN_CODES = (2, 3, *STOPPED)  # with which a cell ends that says why


class Job:
    """A cell that was started.

    Its process is a subprocess.Popen, or what takes its place: `poll` returns the exit code, LOST
    where nobody can know it, and `terminate` lets the run save and end. `loss` says why it ended
    where nothing else does.
    """

    def __init__(
        self, cell: Cell, process: Any, loss: str = "its process ended; see its train.log"
    ) -> None:
        self.cell, self.process, self.loss = cell, process, loss
        self.was_asked = False
        self._code: int | None = None
        self._started = time.monotonic()

    def poll(self) -> int | None:
        """Return the exit code of a job that has ended, None while it runs."""
        if self._code is None:
            code: int | None = self.process.poll()
            outlives = code == LOST and self.cell.run.is_locked()  # the server that started it
            self._code = None if outlives else code
        return self._code

    def ask_to_stop(self) -> None:
        """Let the run save and end; asking again changes nothing."""
        if not self.was_asked:
            self.was_asked = True
            self.process.terminate()

    def outcome(self) -> Outcome:
        """Return how a job ended, by its exit code and what is in its folder."""
        code, after = self.poll() or 0, self.cell.state()
        if after == "finished":
            code = 0  # the signal came too late
        elif self.was_asked and code in (LOST, -signal.SIGTERM):  # it did not handle signals yet
            code = 143
        if code not in (0, *_OWN_CODES) and after not in ("failed", "damaged"):
            why = self.loss
            if -code in list(signal.Signals):
                name = signal.Signals(-code).name
                why = f"killed by {name}{' (out of memory?)' * (name == 'SIGKILL')}"
            note(self.cell.run, why, "failed")
            code, after = 1, self.cell.state()
        seconds = time.monotonic() - self._started
        return Outcome(self.cell, "", after, seconds, code, self.cell.why(code))


class Launcher(ABC):
    """Starts cells, `most_at_once` with one call.

    The jobs of a launcher that `is_detached` go on when this process ends.
    """

    is_detached = False
    most_at_once = MAX_RUNS

    def __init__(self, options: LaunchOptions) -> None:
        self.options = options

    def prepare(self, configs: Sequence[RunConfig]) -> int:
        """Return how many of these runs go at a time; called once, before the first start."""
        return len(configs)

    def is_sent(self, cell: Cell) -> bool:
        """Return whether an earlier command has started this cell, which `start` then takes up."""
        return False

    def is_free(self, cell: Cell) -> bool:
        """Return whether a cell can be started now, or taken up."""
        return self.is_sent(cell) or not cell.run.is_locked()

    def arguments(self, cell: Cell) -> list[str]:
        """Return what follows `python -m cifar_lab.sweeps.cell`."""
        flags = ["--accept-code"] * self.options.accept_code
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
    def abandon(self, jobs: Sequence[Job]) -> None:
        """Leave jobs that have not ended: end them, or let them go on where `is_detached`."""


class Source:
    """Which cells run, in which order: those of a list; one that is in use comes after the others.

    `total` counts them, those that are done included.
    """

    def __init__(self, cells: Sequence[Cell], total: int) -> None:
        self.total, self._cells = total, list(cells)

    def waiting(self) -> Sequence[Cell]:
        """Return cells that are still to come, for the time left."""
        return self._cells

    def take(self, is_free: Callable[[Cell], bool], *, idle: bool) -> Cell | None:
        """Return the next cell or None; one whose folder is in use only when all is idle."""
        free = (cell for cell in self._cells if is_free(cell))
        cell = next(free, self._cells[0] if idle and self._cells else None)
        if cell is not None:
            self._cells.remove(cell)
        return cell

    def is_behind(self, job: Job) -> bool:
        """Return whether a run that is going on is to stop early."""
        return False

    def ended(self, outcome: Outcome) -> Outcome:
        """Note how a run ended; return the outcome as the tables show it."""
        return outcome


def run_all(cells: Sequence[Cell], launcher: Launcher, *, stop: Stop) -> list[Outcome]:
    """Run the cells that are not finished, each in its own process; return all outcomes in order.

    All folders are made first, queued, so that nothing that is edited later changes a cell.

    The first signal that `stop` receives lets the running cells save and leaves the rest queued
    (the caller looks at `stop.signal`); a second one kills them and raises Stopped.
    """
    options = launcher.options
    before = {cell.run.path: cell.state() for cell in cells}
    outcomes: list[Outcome] = []
    waiting: list[Cell] = []
    for cell in cells:
        if (state := before[cell.run.path]) == "new":
            RunDir.create(cell.config)
        outcome = None if options.rerun else _without_running(cell, state, options.accept_code)
        if outcome is None:
            waiting.append(cell)
        else:
            outcomes.append(outcome)
    if waiting:
        slots = launcher.prepare([cell.config for cell in waiting])
        if not launcher.is_detached:
            log.info(
                f"{len(cells)} cell{'s' * (len(cells) != 1)}: {len(waiting)} to run, {slots} at a "
                f"time, {sum(o.after == 'finished' for o in outcomes)} finished before"
            )
        pace = Pace()
        for cell in cells:
            pace.learn(cell)
        source = Source(waiting, len(cells))
        outcomes += fill_slots(source, launcher, slots, stop=stop, pace=pace)
        outcomes += [Outcome(cell, "", cell.state()) for cell in source.waiting()]
    by_folder = {outcome.cell.run.path: outcome for outcome in outcomes}
    return [dataclasses.replace(by_folder[path], before=state) for path, state in before.items()]


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
                    _make_ready(cell, rerun=launcher.options.rerun)
                cells.append(cell)
            except (UsageError, Unavailable, RunFailed) as error:
                after = "in use" if isinstance(error, Unavailable) else cell.state()
                close(Outcome(cell, "", after, 0.0, error.exit_code, str(error)))
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
    left = [Outcome(job.cell, "", job.cell.state()) for job in running]
    return outcomes + [source.ended(outcome) for outcome in left]


def _make_ready(cell: Cell, *, rerun: bool) -> None:
    """Make a cell's folder, or wait for its process to leave it; discard results if asked to.

    They are discarded here, once: a cell that is tried again goes on from its own checkpoint, with
    the settings of now beside its address. Raises Unavailable if the folder stays in use.
    """
    if rerun or cell.run.is_locked():
        with cell.run.lock(patience=PATIENCE_SECONDS):
            if rerun:
                cell.run.own_config()
                cell.run.discard_results()
    threads = cell.asked_threads if cell.run.last.exists() else cell.config.threads
    RunDir.create(dataclasses.replace(cell.config, threads=threads))


def _without_running(cell: Cell, state: str, accept_code: bool) -> Outcome | None:
    """Return the outcome of a cell that needs no process, or None."""
    if state == "damaged":
        return Outcome(cell, state, state, 0.0, 1, cell.why(1))
    if state == "other code" and not accept_code:
        error = "made by other code: rerun=true runs it again, accept_code=true takes it as it is"
        return Outcome(cell, state, state, 0.0, 3, error)
    if cell.run.status != "finished":
        return None
    problem = cell.data_problem()
    if problem is not None:
        return Outcome(cell, state, "other data", 0.0, 3, problem)
    return Outcome(cell, state, "finished")
