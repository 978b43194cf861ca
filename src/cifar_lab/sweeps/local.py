"""Cells as processes of this machine, one each.

They are started anew, or on Linux forked from a server that has imported torch once and started no
thread.
"""

import atexit
import importlib
import json
import os
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from cifar_lab.runs.files import open_for_appending
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.sweeps import cell as cell_module
from cifar_lab.sweeps.cell import Cell
from cifar_lab.sweeps.launcher import Job, Launcher
from cifar_lab.sweeps.outcome import Outcome
from cifar_lab.sweeps.server import LOST, ServedProcess, Server, answer

_HAS_SERVER = sys.platform == "linux"  # macOS's libraries do not survive a fork, Windows has none
_PRELOADED = (
    "cifar_lab.config.compose",
    "torch._dynamo",  # the first optimizer imports it
    "sklearn.metrics",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
)

_servers: list[Server] = []  # one at most, for all sweeps of this process


class LocalProcesses(Launcher):
    """The launcher that starts a process for each cell, on this machine."""

    def start(self, cells: Sequence[Cell]) -> list["_LocalJob"]:
        """Start a process for each cell."""
        return [_LocalJob(cell, self) for cell in cells]

    def abandon(self, jobs: Sequence["_LocalJob"]) -> None:
        """End the processes at once."""
        for job in jobs:
            job.process.kill()
        for job in jobs:
            while job.poll() is None:
                time.sleep(0.01)


class _LocalJob(Job):
    """The process of one cell, seen from the sweep."""

    def __init__(self, cell: Cell, launcher: LocalProcesses) -> None:
        super().__init__(cell)
        self._free_gpus, self._gpu = launcher.free_gpus, launcher.free_gpus.pop()
        visible = {"CUDA_VISIBLE_DEVICES": self._gpu} if self._gpu else {}
        self.process = start_process(cell.run, launcher.arguments(cell), visible)

    def stop(self) -> None:
        self.process.terminate()

    def poll(self) -> int | None:
        return code_of(self.process, self.cell.run)

    def outcome(self) -> Outcome:
        self._free_gpus.append(self._gpu)
        return super().outcome()


def start_process(
    run: RunDir, arguments: Sequence[str], environment: Mapping[str, str]
) -> "subprocess.Popen[bytes] | ServedProcess":
    """Start the process of a cell; what it prints goes to the train.log of its run.

    It saves and ends with SIGTERM, and if it is `--attached` with the process that calls this.
    """
    environment = {**os.environ, **environment}
    if _HAS_SERVER:
        place = {"run": str(run.path), "cwd": str(Path.cwd()), "path": sys.path}
        return _server().start(arguments=list(arguments), environment=environment, **place)
    with _log_of(run) as log:
        return subprocess.Popen(
            [sys.executable, "-m", cell_module.__name__, *arguments],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches the sweep alone
            env=environment,
        )


def code_of(process: "subprocess.Popen[bytes] | ServedProcess", run: RunDir) -> int | None:
    """Return the exit code of a cell's process, None while it runs: it may outlive its server."""
    code = process.poll()
    return None if code == LOST and run.is_locked() else code


def _server() -> Server:
    while _servers and not _servers[-1].is_alive():
        _servers.pop()
    if not _servers:
        # torch starts no threads in it, which would not survive a fork.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        _servers.append(Server(f"import {__name__} as local; local.serve()", environment))
        atexit.register(_servers[-1].close)
    return _servers[-1]


def serve() -> None:
    """Be the server: import what cells need, then fork a process for each request."""
    for name in _PRELOADED:
        importlib.import_module(name)
    numbers: dict[int, int] = {}  # of the requests, by the processes of their cells
    with open(0, "rb", buffering=0) as requests:
        while True:
            if select.select([requests], [], [], 0.02 if numbers else None)[0]:
                line = requests.readline()
                if not line:
                    return
                request = json.loads(line)
                if "signal" in request:
                    for process, number in numbers.items():
                        if number == request["number"]:
                            os.kill(process, request["signal"])
                elif (process := os.fork()) == 0:
                    os._exit(_be_cell(request))
                else:
                    numbers[process] = request["number"]
            while numbers and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                answer(numbers.pop(ended[0]), os.waitstatus_to_exitcode(ended[1]))


def _be_cell(request: Mapping[str, Any]) -> int:
    """Be the process of a cell; return its exit code."""
    try:
        with _log_of(RunDir(request["run"])) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.path[:] = request["path"]
        os.chdir(request["cwd"])
        return cell_module.main(request["arguments"])
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _log_of(run: RunDir) -> IO[bytes]:
    """Return train.log, opened; one that cannot be written is for the run itself to refuse."""
    try:
        return open_for_appending(run.log_file)
    except OSError:
        return Path(os.devnull).open("wb")
