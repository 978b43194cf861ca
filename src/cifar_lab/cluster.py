"""A sweep's cells as jobs of submitit: SLURM's, or processes of this machine.

A job executes the cell in a folder, as every launcher does. When SLURM takes its place away (a
preemption or the end of its time, announced by SIGUSR2) the cell saves, the job is queued again,
and goes on from there, in another process and perhaps on another machine.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from cifar_lab import cli
from cifar_lab.errors import RequestError, RunFailed, Stopped
from cifar_lab.execute import Stop
from cifar_lab.planning import SweepCell
from cifar_lab.run_dir import RunDir
from cifar_lab.sweep import Outcome, Record, carry_out, fitting_jobs, log, sort_out

_OURS = (
    "cluster",
    "poll_seconds",
    "max_num_timeout",
)  # settings that are not submitit's parameters


class CellJob:
    """What submitit pickles and calls: the execution of one folder. Returns (exit code, error)."""

    def __init__(
        self, path: Path, code: str, rerun: bool, accept_code: bool, trust: tuple[str, ...]
    ) -> None:
        self.path, self.code, self.trust = path, code, trust
        self.rerun, self.accept_code = rerun, accept_code

    def __call__(self) -> tuple[int, str | None]:
        """Execute the folder; a job that SLURM has started before goes on from its checkpoint."""
        cli.show_log()
        queue_again = signal.getsignal(signal.SIGUSR2)  # submitit's own handler
        again = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
        with _Notice().installed() as notice:
            code, error = carry_out(
                RunDir(self.path),
                self.code,
                notice,
                rerun=self.rerun and not again,
                accept_code=self.accept_code,
                trust=self.trust,
            )
            if code >= 128 and notice.signal == signal.SIGTERM:
                time.sleep(1)  # SLURM may send SIGTERM just before SIGUSR2
            if code >= 128 and notice.signal == signal.SIGUSR2 and callable(queue_again):
                queue_again(signal.SIGUSR2, None)  # does not come back
        return code, error

    def checkpoint(self) -> Any:
        """Return what submitit queues again: the same folder."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(CellJob(self.path, self.code, False, self.accept_code, self.trust))


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
        if not self._patient and not self._raised:
            self._raised = True
            raise Stopped(number)


def run_all(
    cells: Sequence[SweepCell],
    launcher: Mapping[str, Any],
    *,
    stop: Stop,
    jobs: Any = "auto",
    jobs_per_gpu: int = 1,
    rerun: bool = False,
    accept_code: bool = False,
    trust: Sequence[str] = (),
    command: Sequence[str] = (),
) -> list[Outcome]:
    """Send the cells that are not finished to submitit, wait for them, return all outcomes.

    A signal ends the waiting; SLURM's jobs go on, and the same line waits for them again.
    """
    executor_kind = _executor_kind(launcher)
    on_slurm = launcher["cluster"] == "slurm"
    queue = _Queue(on_slurm)
    outcomes, waiting, before = sort_out(cells, rerun=rerun, accept_code=accept_code)
    if not waiting:
        return [outcomes[index] for index in range(len(cells))]
    record = Record(cells, command)
    count, gpus = 0, list[str]()  # SLURM has its own
    if not on_slurm:
        count, gpus = fitting_jobs([cells[i].config for i in waiting], jobs, jobs_per_gpu)
    executor = executor_kind(
        folder=record.folder.absolute() / "jobs",
        **({"max_num_timeout": launcher["max_num_timeout"]} if on_slurm else {}),
    )
    running: dict[int, Any] = {}
    started: dict[int, float] = {}
    free = list(reversed(gpus))
    held: dict[int, str] = {}
    if on_slurm:
        running |= queue.sent_before(cells, waiting)
        waiting = [index for index in waiting if index not in running]
        executor.update_parameters(**_parameters(launcher, [cells[i] for i in waiting]))
        if waiting:
            tasks = [_job(cells[i], rerun, accept_code, trust) for i in waiting]
            with executor.batch():
                sent = [executor.submit(task) for task in tasks]
            running |= dict(zip(waiting, sent, strict=True))
        record.note_jobs({cells[i].run.path: job.job_id for i, job in running.items()})
        log.info("%d jobs in SLURM's queue: %s", len(running), _ids(running.values()))
        waiting = []
    started |= dict.fromkeys(running, time.monotonic())
    with stop.graceful():
        while (waiting or running) and stop.signal is None:
            while waiting and len(running) < count:
                index = waiting.pop(0)
                held[index] = free.pop()
                gpu = (
                    {"gpus_per_node": 1, "visible_gpus": [int(held[index])]} if held[index] else {}
                )
                executor.update_parameters(timeout_min=launcher["timeout_min"], **gpu)
                running[index] = executor.submit(_job(cells[index], rerun, accept_code, trust))
                started[index] = time.monotonic()
            for index in [i for i, job in running.items() if queue.has_ended(job)]:
                job = running.pop(index)
                if index in held:
                    free.append(held.pop(index))
                    job._process.wait()  # its result is there; it is about to end
                seconds = time.monotonic() - started[index]
                outcomes[index] = _outcome(cells[index], before[index], job, seconds)
                log.info("%s: %s", cells[index].run.path.name, outcomes[index].after)
            if running and stop.signal is None:
                queue.look(launcher["poll_seconds"], stop)
        if running and on_slurm:
            log.info("the jobs go on; scancel %s ends them", _ids(running.values()))
        elif running:
            for job in running.values():
                job._process.terminate()
            for job in running.values():
                job._process.wait()
    for index in (*running, *waiting):
        outcomes[index] = Outcome(cells[index], before[index], cells[index].state())
    ordered = [outcomes[index] for index in range(len(cells))]
    record.close(ordered)
    return ordered


def _job(cell: SweepCell, rerun: bool, accept_code: bool, trust: Sequence[str]) -> CellJob:
    return CellJob(cell.run.path.absolute(), cell.code, rerun, accept_code, tuple(trust))


def _ids(jobs: Any) -> str:
    return " ".join(sorted(job.job_id for job in jobs))


def _executor_kind(launcher: Mapping[str, Any]) -> Any:
    try:
        import submitit
    except ImportError:
        raise RequestError(
            f"hydra/launcher=submitit_{launcher['cluster']} needs submitit: "
            "pip install cifar-lab[slurm]"
        ) from None
    if launcher["cluster"] == "local":
        return submitit.LocalExecutor
    if submitit.SlurmExecutor.affinity() <= 0:
        raise RequestError("hydra/launcher=submitit_slurm: there is no SLURM here (no srun)")
    return submitit.SlurmExecutor


def _parameters(launcher: Mapping[str, Any], cells: Sequence[SweepCell]) -> dict[str, Any]:
    """Return submitit's parameters for these cells."""
    given = {k: v for k, v in launcher.items() if k not in _OURS and v not in (None, {})}
    threads = max((cell.config.threads or 1 for cell in cells), default=1)
    on_cuda = any(cell.config.device.startswith("cuda") for cell in cells)
    defaults: dict[str, Any] = {"cpus_per_task": threads}
    if on_cuda and "gres" not in given:
        defaults["gpus_per_node"] = 1
    from submitit import SlurmExecutor

    names: dict[str, str] = dict(SlurmExecutor._equivalence_dict())  # type: ignore[arg-type]
    return {names.get(str(k), str(k)): v for k, v in {**defaults, **given}.items()}


class _Queue:
    """Which jobs are still to end: SLURM's queue, or the processes that submitit started."""

    def __init__(self, on_slurm: bool) -> None:
        self._on_slurm = on_slurm
        self._missing: set[str] = set()
        self._known = _in_queue() if on_slurm else set()

    def look(self, seconds: float, stop: Stop) -> None:
        """Wait a while (or until a signal), then ask again."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and stop.signal is None:
            time.sleep(min(0.25, seconds))
        if self._on_slurm:
            self._known = _in_queue()

    def has_ended(self, job: Any) -> bool:
        """Whether a job left its result, or is gone without one (seen twice)."""
        if job.paths.result_pickle.exists():
            return True
        if not self._on_slurm:
            return bool(job.done())
        if job.job_id in self._known:
            self._missing.discard(job.job_id)
            return False
        gone = job.job_id in self._missing
        self._missing.add(job.job_id)
        return gone

    def sent_before(self, cells: Sequence[SweepCell], waiting: Sequence[int]) -> dict[int, Any]:
        """Return the jobs of these cells that an earlier line sent and that are not over."""
        from submitit import SlurmJob

        found: dict[int, Any] = {}
        sent: dict[str, tuple[Path, str]] = {}
        for folder in {cells[index].run.path.parent for index in waiting}:
            for record in sorted(folder.glob(".sweeps/*/sweep.json")):
                content = json.loads(record.read_text(encoding="utf-8"))
                for cell in content["cells"]:
                    if cell.get("job") in self._known:
                        path = os.path.normpath(folder / cell["folder"])
                        sent[path] = (record.parent.absolute() / "jobs", cell["job"])
        for index in waiting:
            if (path := os.path.normpath(cells[index].run.path)) in sent:
                found[index] = SlurmJob(*sent[path])
        return found


def _in_queue() -> set[str]:
    """Return the ids of the user's jobs that SLURM has in its queue, each of an array by itself."""
    command = ["squeue", "--noheader", "--array", "--me", "--format=%i"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        raise RequestError(f"SLURM does not answer: {detail.strip().splitlines()[-1]}") from None
    return set(answer.stdout.split())


def _outcome(cell: SweepCell, before: str, job: Any, seconds: float) -> Outcome:
    code: int = 1
    error: str | None = f"job {job.job_id} ended without a result; {job.paths.stderr} may say why"
    with contextlib.suppress(RequestError, RunFailed):
        if cell.is_finished():
            code, error = 0, None
    if job.paths.result_pickle.exists():
        status, value = job._get_outcome_and_result()
        if status == "success":
            code, error = value
        else:
            error = f"job {job.job_id}: {str(value).strip().splitlines()[-1]}"
    return Outcome(cell, before, cell.state(), seconds, code, error)
