"""Cells as jobs of SLURM, sent by submitit.

A job runs the cell in a folder, as every launcher does. When SLURM takes its place away (a
preemption or the end of its time, announced by SIGUSR2) the cell saves, the job is queued again,
and goes on from there, in another process and perhaps on another machine.
"""

import contextlib
import dataclasses
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from cifar_lab.config.launch import LaunchOptions
from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import RunFailed, Stopped, Unavailable, UsageError, missing_extra, shorten
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.sweeps.cell import Cell, run_cell
from cifar_lab.sweeps.launcher import Job, Launcher
from cifar_lab.sweeps.record import noted_jobs
from cifar_lab.training.signals import Stop

log = logging.getLogger("cifar_lab")

_OURS = ("cluster", "poll_seconds", "max_num_timeout")  # settings that submitit does not know


class CellJob:
    """What submitit pickles and calls: one folder to run. Returns (exit code, message)."""

    def __init__(self, path: Path, code: str, options: LaunchOptions) -> None:
        self.path, self.code, self.options = path, code, options

    def __call__(self) -> tuple[int, str | None]:
        """Run the folder; a job that SLURM has started before goes on from its checkpoint."""
        log.setLevel(logging.INFO)
        log.addHandler(logging.StreamHandler(sys.stdout))
        queue_again = signal.getsignal(signal.SIGUSR2)  # submitit's own handler
        again = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
        options = dataclasses.replace(self.options, rerun=self.options.rerun and not again)
        with _Notice().installed() as notice:
            code, error = run_cell(RunDir(self.path), self.code, notice, options)
            if code >= 128 and notice.signal == signal.SIGTERM:
                time.sleep(1)  # SLURM may send SIGTERM just before SIGUSR2
            if code >= 128 and notice.signal == signal.SIGUSR2 and callable(queue_again):
                queue_again(signal.SIGUSR2, None)  # does not come back
        return code, error

    def checkpoint(self) -> Any:
        """Return what submitit queues again: the same folder."""
        from submitit.helpers import DelayedSubmission

        options = dataclasses.replace(self.options, rerun=False)
        return DelayedSubmission(CellJob(self.path, self.code, options))


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
        self.most_at_once = _longest_array()

    def prepare(self, configs: Sequence[RunConfig]) -> int:
        return len(configs)  # SLURM has a queue of its own

    def is_free(self, cell: Cell) -> bool:
        return True  # a job that an earlier command sent may hold the folder; it is waited for

    def start(self, cells: Sequence[Cell], folder: Path) -> list["_SlurmJob"]:
        """Send the cells as one array, but for those that an earlier command sent."""
        jobs = self._sent_before(cells)
        to_send = [cell for cell in cells if cell.run.path not in jobs]
        if to_send:
            jobs |= self._send(to_send, folder.absolute() / "jobs")
        started = [_SlurmJob(cell, jobs[cell.run.path], self) for cell in cells]
        log.info("%d jobs in SLURM's queue: %s", len(started), job_list(j.id for j in started))
        return started

    def _send(self, cells: Sequence[Cell], folder: Path) -> dict[Path, Any]:
        import submitit

        executor = submitit.SlurmExecutor(
            folder=folder, max_num_timeout=self._settings["max_num_timeout"]
        )
        executor.update_parameters(**slurm_parameters(self._settings, cells))
        try:
            with executor.batch():
                sent = [executor.submit(cell_job(cell, self.options)) for cell in cells]
        except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
            said = str(getattr(error, "stderr", None) or error).strip().splitlines() or [""]
            raise Unavailable(
                f"SLURM did not take {len(cells)} jobs: {shorten(said[-1], 120)}; the jobs that it "
                "took before go on, and the same line sends the others"
            ) from None
        return {cell.run.path: job for cell, job in zip(cells, sent, strict=True)}

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

    def _sent_before(self, cells: Sequence[Cell]) -> dict[Path, Any]:
        """Return the jobs of these cells that an earlier line sent and that are not over."""
        from submitit import SlurmJob

        sent: dict[str, tuple[Path, str]] = {}
        for parent in {cell.run.path.parent for cell in cells} if self._queue else ():
            noted = [found for found in noted_jobs(parent) if found[2] in self._queue]
            others = self._queue - {job for _, _, job in noted}
            for folder, record, job in [*noted, *jobs_with_files(parent, others)]:
                sent[os.path.normpath(folder)] = (record.absolute() / "jobs", job)
        paths = {cell.run.path: os.path.normpath(cell.run.path) for cell in cells}
        return {path: SlurmJob(*sent[normal]) for path, normal in paths.items() if normal in sent}


class _SlurmJob(Job):
    """A job of SLURM, seen from the command that waits for it."""

    def __init__(self, cell: Cell, job: Any, launcher: _Slurm) -> None:
        super().__init__(cell)
        self.id = job.job_id
        self._job, self._launcher = job, launcher

    def stop(self) -> None:
        subprocess.run(["scancel", self.id], check=False, timeout=60)

    def has_ended(self) -> bool:
        return self._job.paths.result_pickle.exists() or self._launcher.is_gone(self.id)

    def result(self) -> tuple[int, str | None]:
        return job_result(self.cell, self._job)


def slurm_parameters(settings: Mapping[str, Any], cells: Sequence[Cell]) -> dict[str, Any]:
    """Return submitit's parameters for these cells."""
    from submitit import SlurmExecutor

    given = {k: v for k, v in settings.items() if k not in _OURS and v not in (None, {})}
    threads = max((cell.config.threads or 1 for cell in cells), default=1)
    on_cuda = any(cell.config.device.startswith("cuda") for cell in cells)
    defaults: dict[str, Any] = {"cpus_per_task": threads}
    if on_cuda and "gres" not in given:
        defaults["gpus_per_node"] = 1
    names: dict[str, str] = dict(SlurmExecutor._equivalence_dict())  # type: ignore[arg-type]
    return {names.get(str(k), str(k)): v for k, v in {**defaults, **given}.items()}


def jobs_with_files(parent: Path, jobs: Collection[str]) -> Iterator[tuple[Path, Path, str]]:
    """Yield (run folder, folder of the record, job id) of those jobs that sweeps here have sent.

    They are known by submitit's files, which are there before a record names the jobs. A command
    that was killed in between has sent them, and a job without its file does nothing.
    """
    from submitit.core.utils import DelayedSubmission

    for file in sorted(parent.glob(".sweeps/*/jobs/*_submitted.pkl")) if jobs else ():
        job = file.name.removesuffix("_submitted.pkl")
        if job in jobs:
            with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError):  # nor with this
                called = DelayedSubmission.load(file).function
                if isinstance(called, CellJob):
                    yield parent / called.path.name, file.parents[1], job


def cell_job(cell: Cell, options: LaunchOptions) -> CellJob:
    """Return what submitit is to call for a cell."""
    return CellJob(cell.run.path.absolute(), cell.code, options)


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
    if len(numbers) == 1:
        return str(numbers[0])
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return f"[{','.join('-'.join(map(str, part)) for part in parts)}]"


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


def job_result(cell: Cell, job: Any) -> tuple[int, str | None]:
    """Return the exit code and message that a job left, or what its folder tells without one."""
    if job.paths.result_pickle.exists():
        status, value = job._get_outcome_and_result()
        if status == "success":
            code, error = value
            return code, error
        return 1, f"job {job.job_id}: {str(value).strip().splitlines()[-1]}"
    with contextlib.suppress(UsageError, RunFailed):
        if cell.is_finished():
            return 0, None
    return 1, f"job {job.job_id} ended without a result; {job.paths.stderr} may say why"
