"""Cells as jobs of SLURM, sent by submitit.

A job runs the cell in a folder, as every launcher does. When SLURM takes its place away (a
preemption or the end of its time, announced by SIGUSR2) the cell saves, the job is queued again,
and goes on from there, in another process and perhaps on another machine.
"""

import contextlib
import itertools
import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from cifar_lab.config.identity import address
from cifar_lab.config.launch import LaunchOptions
from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import Stopped, Unavailable, UsageError, missing_extra, shorten
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.sweeps import cell as cell_module
from cifar_lab.sweeps.cell import Cell, note
from cifar_lab.sweeps.launcher import Job, Launcher
from cifar_lab.sweeps.server import LOST
from cifar_lab.training.signals import Stop

log = logging.getLogger("cifar_lab")

_OURS = ("cluster", "poll_seconds", "max_num_timeout")  # settings that are no parameter of a job
_ENDED = {"finished": 0, "failed": 1, "damaged": 1, "interrupted": 143}  # exit codes by states


class CellJob:
    """What submitit pickles and calls: the arguments of one cell."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = arguments

    def __call__(self) -> None:
        """Run the cell; a job that SLURM has started before goes on from its checkpoint."""
        from submitit.core.utils import UncompletedJobError

        queue_again = signal.getsignal(signal.SIGUSR2)  # submitit's own handler
        notice = _Notice()
        if cell_module.main(self.arguments, notice) < 128:
            return
        if notice.signal == signal.SIGUSR2 and callable(queue_again):
            try:
                queue_again(signal.SIGUSR2, None)  # does not come back
            except UncompletedJobError as error:  # it ran into its time too often
                note(RunDir(self.arguments[0]), str(error), "failed")
                raise
        time.sleep(1)  # SLURM may send SIGTERM just before SIGUSR2, which submitit handles again

    def checkpoint(self) -> Any:
        """Return what submitit queues again: the same cell."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class _Notice(Stop):
    """The signals of a cluster: never impatient, and SIGUSR2 (queue again) outranks SIGTERM."""

    def __init__(self) -> None:
        super().__init__()
        self._raised = False

    @contextlib.contextmanager
    def installed(self) -> Iterator["_Notice"]:
        """Handle SIGUSR2 too."""
        with super().installed():
            before = signal.signal(signal.SIGUSR2, self._receive)
            try:
                yield self
            finally:
                signal.signal(signal.SIGUSR2, before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal != signal.SIGUSR2:
            self.signal = number
        if not self._graceful and not self._raised:
            self._raised = True
            raise Stopped(number)


def launcher(settings: Mapping[str, Any], options: LaunchOptions) -> Launcher:
    """Return the launcher of these settings; UsageError where submitit or SLURM is missing."""
    try:
        import submitit
    except ImportError:
        raise missing_extra("hydra/launcher=submitit_slurm", "submitit", "slurm") from None
    if submitit.SlurmExecutor.affinity() <= 0:
        raise UsageError("hydra/launcher=submitit_slurm: there is no SLURM here (no srun)")
    return _Slurm(settings, options)


class _Slurm(Launcher):
    """The launcher whose jobs SLURM runs, as arrays."""

    is_detached = True

    def __init__(self, settings: Mapping[str, Any], options: LaunchOptions) -> None:
        super().__init__(options)
        self._settings = settings
        self._queue = _in_queue()
        self._missing: set[str] = set()
        self._sent: dict[str, Any] = {}
        self.most_at_once = _longest_array()

    def prepare(self, configs: Sequence[RunConfig]) -> int:
        """Find the jobs that earlier commands sent; SLURM has a queue of its own for all."""
        for parent in {address(config).parent for config in configs}:
            self._sent |= sent_jobs(parent, self._queue)
        return len(configs)

    def is_sent(self, cell: Cell) -> bool:
        return os.path.normpath(cell.run.path) in self._sent

    def start(self, cells: Sequence[Cell], folder: Path) -> list["_SlurmJob"]:
        """Send the cells as one array, but for those that an earlier command sent."""
        to_send = [cell for cell in cells if not self.is_sent(cell)]
        if to_send:
            sent = self._send(to_send, folder.absolute() / "jobs")
            self._sent |= {
                os.path.normpath(cell.run.path): job
                for cell, job in zip(to_send, sent, strict=True)
            }
        jobs = [_SlurmJob(c, self._sent.pop(os.path.normpath(c.run.path)), self) for c in cells]
        log.info("%d jobs in SLURM's queue: %s", len(jobs), job_list(job.id for job in jobs))
        return jobs

    def _send(self, cells: Sequence[Cell], folder: Path) -> list[Any]:
        import submitit

        folder /= str(time.time_ns())
        write_cells(cells, folder)
        executor = submitit.AutoExecutor(
            folder, cluster="slurm", slurm_max_num_timeout=self._settings["max_num_timeout"]
        )
        executor.update_parameters(**slurm_parameters(self._settings, cells))
        try:
            with executor.batch():
                return [executor.submit(CellJob(self.arguments(cell))) for cell in cells]
        except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
            said = str(getattr(error, "stderr", None) or error).strip().splitlines() or [""]
            raise Unavailable(
                f"SLURM did not take {len(cells)} jobs: {shorten(said[-1], 120)}; the jobs that it "
                "took before go on, and the same line sends the others"
            ) from None

    def wait(self, jobs: Sequence["_SlurmJob"], stop: Stop) -> None:
        deadline = time.monotonic() + self._settings["poll_seconds"]
        while (left := deadline - time.monotonic()) > 0 and stop.signal is None:
            time.sleep(min(0.25, left))
        self._queue = _in_queue()

    def abandon(self, jobs: Sequence["_SlurmJob"]) -> None:
        if jobs:
            log.info("the jobs go on; scancel %s ends them", job_list(job.id for job in jobs))

    def is_gone(self, job: str) -> bool:
        """Return whether a job was missing in the queue twice."""
        if job in self._queue:
            self._missing.discard(job)
            return False
        gone = job in self._missing
        self._missing.add(job)
        return gone


class _SlurmJob(Job):
    """A job of SLURM, seen from the command that waits for it."""

    def __init__(self, cell: Cell, job: Any, launcher: _Slurm) -> None:
        super().__init__(cell)
        self.id = job.job_id
        self.loss = f"job {self.id} ended without a result; {job.paths.stderr} may say why"
        self._result, self._launcher = job.paths.result_pickle, launcher

    def stop(self) -> None:
        subprocess.run(["scancel", self.id], check=False, timeout=60)

    def poll(self) -> int | None:
        if self._result.exists():  # it was not killed: the folder tells the rest
            return _ENDED.get(self.cell.state(), 3)
        return LOST if self._launcher.is_gone(self.id) else None


def slurm_parameters(settings: Mapping[str, Any], cells: Sequence[Cell]) -> dict[str, Any]:
    """Return submitit's parameters for these cells."""
    given = {k: v for k, v in settings.items() if k not in _OURS and v not in (None, {})}
    threads = max((cell.config.threads or 1 for cell in cells), default=1)
    on_cuda = any(cell.config.device.startswith("cuda") for cell in cells)
    defaults: dict[str, Any] = {"cpus_per_task": threads}
    if on_cuda and "gres" not in given:
        defaults["gpus_per_node"] = 1
    return {f"slurm_{name}": value for name, value in {**defaults, **given}.items()}


def write_cells(cells: Sequence[Cell], folder: Path) -> None:
    """Note in the folder of an array which cells its tasks run, before it is sent."""
    folder.mkdir(parents=True)
    beside = folder.parents[3]
    lines = [f"{os.path.relpath(cell.run.path.absolute(), beside)}\n" for cell in cells]
    (folder / "cells.txt").write_text("".join(lines), encoding="utf-8")


def sent_jobs(parent: Path, queue: Iterable[str]) -> dict[str, Any]:
    """Return the jobs of a queue that sweeps below `parent` have sent, by their run folders.

    They are known by submitit's files, so that those of a command are found that was killed while
    it was sending. A job without its file does nothing.
    """
    from submitit import SlurmJob

    sent: dict[str, Any] = {}
    wanted = set(queue)
    for file in sorted(parent.glob(".sweeps/*/jobs/*/*_submitted.pkl")) if wanted else ():
        job = file.name.removesuffix("_submitted.pkl")
        if job in wanted:
            names = (file.parent / "cells.txt").read_text(encoding="utf-8").splitlines()
            name = names[int(job.partition("_")[2] or 0)]
            sent[os.path.normpath(parent / name)] = SlurmJob(file.parent.absolute(), job)
    return sent


def job_list(ids: Iterable[str]) -> str:
    """Return ids of jobs as scancel takes them, each array with its tasks: 7 12_[0-3,5]."""
    arrays: dict[str, list[int]] = {}
    for job, _, task in (name.partition("_") for name in ids):
        arrays.setdefault(job, []).extend([int(task)] if task else [])
    return " ".join(
        f"{job}_{_ranges(sorted(tasks))}" if tasks else job
        for job, tasks in sorted(arrays.items(), key=lambda item: int(item[0]))
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as SLURM writes them: 4, or [0-3,5]."""
    # numbers that follow each other differ from their positions by the same
    groups = itertools.groupby(enumerate(numbers), lambda item: item[1] - item[0])
    parts = [[number for _, number in group] for _, group in groups]
    shown = [str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts]
    return shown[0] if len(numbers) == 1 else f"[{','.join(shown)}]"


def _longest_array() -> int:
    """Return how many jobs an array of this SLURM may have (its setting MaxArraySize)."""
    for line in _ask(["scontrol", "show", "config"]).splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "MaxArraySize" and value.strip().isdigit():
            return max(1, int(value))
    return 1001  # SLURM's default


def _in_queue() -> set[str]:
    """Return the ids of the user's jobs that SLURM has in its queue, each of an array by itself."""
    return set(_ask(["squeue", "--noheader", "--array", "--me", "--format=%i"]).split())


def _ask(command: Sequence[str]) -> str:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        raise UsageError(f"SLURM does not answer: {detail.strip().splitlines()[-1]}") from None
    return answer.stdout
