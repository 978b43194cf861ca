"""Cells as processes of this machine, one each.

They are forked from a server that has imported torch once and started no thread (Linux), or
started anew.
"""

import atexit
import contextlib
import importlib
import os
import select
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

from cifar_lab.config.launch import LaunchOptions
from cifar_lab.errors import RunFailed
from cifar_lab.runs.files import open_for_appending
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.sweeps import cell as cell_module
from cifar_lab.sweeps.cell import Cell
from cifar_lab.sweeps.launcher import Job, Launcher
from cifar_lab.sweeps.server import Request, ServedProcess, Server, receive
from cifar_lab.sweeps.timing import SLOW_IMPORTS

_HAS_SERVER = sys.platform == "linux"  # macOS's libraries do not survive a fork, Windows has none
_PRELOADED = ("cifar_lab.config.compose", *SLOW_IMPORTS)

_servers: list[Server] = []  # one at most, for all sweeps of this process


def launcher(options: LaunchOptions) -> Launcher:
    """Return the launcher that starts a process for each cell, on this machine."""
    return _LocalProcesses(options)


class _LocalProcesses(Launcher):
    def start(self, cells: Sequence[Cell], folder: Path) -> list["_LocalJob"]:
        return [_LocalJob(cell, self) for cell in cells]

    def abandon(self, jobs: Sequence["_LocalJob"]) -> None:
        for job in jobs:
            job.process.kill()
        for job in jobs:
            while job.poll() is None:
                time.sleep(0.01)


class _LocalJob(Job):
    """The process of one cell, seen from the sweep."""

    def __init__(self, cell: Cell, launcher: _LocalProcesses) -> None:
        super().__init__(cell)
        self._free_gpus, self._gpu = launcher.free_gpus, launcher.free_gpus.pop()
        visible = {"CUDA_VISIBLE_DEVICES": self._gpu} if self._gpu else {}
        self.process = start_process(cell.run, launcher.arguments(cell), visible)

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def poll(self) -> int | None:
        is_new = self.process.returncode is None
        code = self.process.poll()
        if is_new and code is not None:
            self._free_gpus.append(self._gpu)
        return code


def start_process(
    run: RunDir, arguments: Sequence[str], environment: Mapping[str, str]
) -> "subprocess.Popen[bytes] | ServedProcess":
    """Start the process of a cell; what it prints goes to the train.log of its run.

    It saves and ends when its standard input is closed, and so when the process that calls this
    ends.
    """
    environment = {**os.environ, **environment}
    with _log_of(run) as log:
        if not _HAS_SERVER:
            return subprocess.Popen(
                [sys.executable, "-m", cell_module.__name__, *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches the sweep alone
                env=environment,
            )
        request = {
            "arguments": list(arguments),
            "environment": environment,
            "path": sys.path,
            "cwd": str(Path.cwd()),
        }
        with contextlib.suppress(RunFailed):  # the server has just been killed
            return _server().start(request, log.fileno())
        return _server().start(request, log.fileno())


def _log_of(run: RunDir) -> IO[bytes]:
    """Return train.log, opened; one that cannot be written is for the run itself to refuse."""
    try:
        return open_for_appending(run.log_file)
    except OSError:
        return Path(os.devnull).open("wb")


def _server() -> Server:
    while _servers and not _servers[-1].is_alive():
        _servers.pop()
    if not _servers:
        # torch starts no threads in it, which would not survive a fork.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        _servers.append(Server(f"import {__name__} as local; local.serve()", environment))
        atexit.register(_servers[-1].close, 0)
    return _servers[-1]


def serve() -> None:
    """Be the server: import what cells need, then fork a process for each request."""
    for name in _PRELOADED:
        importlib.import_module(name)
    running: dict[int, Request] = {}
    with socket.socket(fileno=0) as requests:
        while True:
            if select.select([requests], [], [], 0.02 if running else None)[0]:
                request = receive(requests)
                if request is None:
                    return
                if (pid := os.fork()) == 0:
                    os._exit(_be_cell(request, running.values()))
                running[pid] = request
                request.answer(pid)
            while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                request = running.pop(ended[0])
                request.answer(os.waitstatus_to_exitcode(ended[1]))
                request.close()


def _be_cell(request: Request, others: Iterable[Request]) -> int:
    """Be the process of a cell; return its exit code."""
    for other in others:
        other.close()
    try:
        os.dup2(request.stdin, 0)
        os.dup2(request.stdout, 1)
        os.dup2(request.stdout, 2)
        os.environ.clear()
        os.environ.update(request.content["environment"])
        sys.path[:] = request.content["path"]
        os.chdir(request.content["cwd"])
        return cell_module.main(request.content["arguments"])
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
