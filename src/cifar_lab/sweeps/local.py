"""Cells as processes of this machine, one each.

A server starts them: on Linux it forks, since it has imported torch once and started no thread.
Windows has no fork and cannot wait for pipes: there they are started from here.
"""

import atexit
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from cifar_lab.config.run_config import RunConfig
from cifar_lab.runs.files import open_for_appending
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.sweeps import cell as cell_module
from cifar_lab.sweeps.cell import Cell
from cifar_lab.sweeps.pool import Job, Launcher
from cifar_lab.sweeps.server import ServedProcess, Server, answer
from cifar_lab.training import device

_CAN_FORK = sys.platform == "linux"  # macOS's libraries do not survive it
_PRELOADED = (
    "cifar_lab.config.compose",
    "torch",
    "sklearn.metrics",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
)

_BYTES_PER_JOB = 1_500_000_000  # what a process with torch and CIFAR-10 needs, with room

_servers: list[Server] = []  # one at most, for all sweeps of this process


class LocalProcesses(Launcher):
    """The launcher that starts a process for each cell, on this machine."""

    def prepare(self, configs: Sequence[RunConfig]) -> int:
        """Return how many processes go at a time; each has a slot of its own, with a GPU or not."""
        _, gpus = fitting_jobs(configs, self.options.jobs, self.options.jobs_per_gpu)
        self._slots: list[tuple[str, Job | None]] = [(gpu, None) for gpu in gpus]
        return len(gpus)

    def start(self, cells: Sequence[Cell]) -> list[Job]:
        """Start a process for each cell, in slots whose jobs have ended."""
        jobs = []
        for cell in cells:
            has_ended = [job is None or job.poll() is not None for _, job in self._slots]
            slot = has_ended.index(True)
            gpu, _ = self._slots[slot]
            visible = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
            jobs.append(Job(cell, start_process(cell.run, self.arguments(cell), visible)))
            self._slots[slot] = gpu, jobs[-1]
        return jobs

    def abandon(self, jobs: Sequence[Job]) -> None:
        """End the processes at once."""
        for job in jobs:
            job.process.kill()
        for job in jobs:
            while job.poll() is None:
                time.sleep(0.01)


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
    threads = max((config.threads or 1 for config in configs), default=1)
    fitting = min(_cores() // threads, _free_memory() // _BYTES_PER_JOB)
    if gpus:
        fitting = len(gpus) * jobs_per_gpu
    elif "mps" in devices:
        fitting = 1
    wanted = fitting if jobs == "auto" else jobs
    count = max(1, min(wanted, len(configs), fitting if gpus else wanted))
    return count, [gpus[slot % len(gpus)] if gpus else "" for slot in range(count)]


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _free_memory() -> int:
    """Return the bytes that new processes may take; a lot where the system does not say."""
    source = Path("/proc/meminfo")
    lines = source.read_text(encoding="ascii").splitlines() if source.exists() else []
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kilobytes[0]) * 1024 if kilobytes else 1 << 60


def start_process(
    run: RunDir, arguments: Sequence[str], environment: Mapping[str, str]
) -> "ServedProcess | subprocess.Popen[bytes]":
    """Start the process of a cell; what it prints goes to the train.log of its run.

    It saves and ends with SIGTERM, and with the process that calls this.
    """
    environment = {**os.environ, **environment}
    if sys.platform == "win32":
        line = [sys.executable, "-m", cell_module.__name__, *arguments]
        with _log_of(run) as log:
            nothing = subprocess.DEVNULL
            return subprocess.Popen(line, stdin=nothing, stdout=log, stderr=log, env=environment)
    while _servers and not _servers[-1].is_alive():
        _servers.pop()
    if not _servers:
        # torch starts no threads in it, which would not survive a fork.
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        _servers.append(Server(f"import {__name__} as local; local.serve()", alone))
        atexit.register(_servers[-1].close)
    return _servers[-1].start(
        run=str(run.path),
        arguments=list(arguments),
        environment=environment,
        cwd=str(Path.cwd()),
        path=sys.path,
    )


def serve() -> None:
    """Be the server: start a process for each request, on Linux with all imports done."""
    for name in _PRELOADED if _CAN_FORK else ():
        importlib.import_module(name)
    numbers: dict[int, int] = {}  # of the requests, by the processes of their cells
    with open(0, "rb", buffering=0) as requests:
        while True:
            if select.select([requests], [], [], 0.02 if numbers else None)[0]:
                line = requests.readline()
                request = json.loads(line) if line else {"stop": True}  # nobody asks any more
                if "stop" in request:
                    for process, number in numbers.items():
                        if number == request.get("number", number):
                            os.kill(process, signal.SIGTERM)
                else:
                    numbers[_start_cell(request)] = request["number"]
                if not line:
                    return
            while numbers and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                answer(numbers.pop(ended[0]), os.waitstatus_to_exitcode(ended[1]))


def _start_cell(request: Mapping[str, Any]) -> int:
    """Start the process of a cell; return its number."""
    if _CAN_FORK and (process := os.fork()):
        return process
    os.chdir(request["cwd"])
    with _log_of(RunDir(request["run"])) as log, Path(os.devnull).open("rb") as nothing:
        streams = [(nothing.fileno(), 0), (log.fileno(), 1), (log.fileno(), 2)]
        if not _CAN_FORK:
            line = [sys.executable, "-m", cell_module.__name__, *request["arguments"]]
            actions = [(os.POSIX_SPAWN_DUP2, *stream) for stream in streams]
            return os.posix_spawn(line[0], line, request["environment"], file_actions=actions)
        for stream in streams:
            os.dup2(*stream)
    code = 1
    try:
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.path[:] = request["path"]
        code = cell_module.main(request["arguments"])
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _log_of(run: RunDir) -> IO[bytes]:
    """Return train.log, opened; one that cannot be written is for the run itself to refuse."""
    try:
        return open_for_appending(run.log_file)
    except OSError:
        return Path(os.devnull).open("wb")
