"""Cells as processes of this machine that submitit starts."""

import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar_lab.config.launch import LaunchOptions
from cifar_lab.errors import missing_extra
from cifar_lab.sweeps.cell import Cell
from cifar_lab.sweeps.launcher import Job, Launcher
from cifar_lab.sweeps.slurm import cell_job, job_result
from cifar_lab.training.signals import Stop


def launcher(settings: Mapping[str, Any], options: LaunchOptions) -> Launcher:
    """Return the launcher of these settings; UsageError where submitit is missing."""
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise missing_extra("hydra/launcher=submitit_local", "submitit", "slurm") from None
    return _Processes(settings, options)


class _Processes(Launcher):
    """The launcher that does with processes what that of SLURM does with its jobs."""

    def __init__(self, settings: Mapping[str, Any], options: LaunchOptions) -> None:
        super().__init__(options)
        self._settings = settings

    def start(self, cells: Sequence[Cell], folder: Path) -> list["_Process"]:
        import submitit

        jobs = []
        for cell in cells:
            gpu = self.free_gpus.pop()
            executor = submitit.LocalExecutor(folder=folder.absolute() / "jobs")
            visible = {"gpus_per_node": 1, "visible_gpus": [int(gpu)]} if gpu else {}
            executor.update_parameters(timeout_min=self._settings["timeout_min"], **visible)
            job = executor.submit(cell_job(cell, self.options))
            jobs.append(_Process(cell, job, gpu, self))
        return jobs

    def wait(self, jobs: Sequence["_Process"], stop: Stop) -> None:
        time.sleep(self._settings["poll_seconds"])

    def abandon(self, jobs: Sequence["_Process"]) -> None:
        for job in jobs:
            job.process.terminate()  # submitit's own process, which ends the run with it
            job.process.wait()


class _Process(Job):
    """A process that submitit started, seen from the sweep."""

    def __init__(self, cell: Cell, job: Any, gpu: str, launcher: Launcher) -> None:
        super().__init__(cell)
        self.process: subprocess.Popen[bytes] = job._process
        self._job, self._gpu, self._launcher = job, gpu, launcher

    def stop(self) -> None:
        self.process.terminate()

    def has_ended(self) -> bool:
        return self._job.paths.result_pickle.exists() or bool(self._job.done())

    def result(self) -> tuple[int, str | None]:
        self.process.wait()  # its result is there; it is about to end
        self._launcher.free_gpus.append(self._gpu)
        return job_result(self.cell, self._job)
