"""Cells as processes of this machine, one each.

They are forked from a server that has imported torch once and started no thread (Linux), or
spawned anew.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import types
from collections.abc import Iterator, Sequence
from multiprocessing import connection, forkserver, resource_tracker, util
from pathlib import Path
from typing import Any

from cifar_lab.config.launch import LaunchOptions
from cifar_lab.errors import RunFailed, Stopped, Unavailable, UsageError, first_line
from cifar_lab.runs.atomic_io import open_for_appending
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.sweeps.cell import Cell, run_cell
from cifar_lab.sweeps.launcher import Job, Launcher
from cifar_lab.sweeps.timing import SLOW_IMPORTS
from cifar_lab.training.run import note_killed
from cifar_lab.training.signals import Stop

log = logging.getLogger("cifar_lab")

_HAS_SERVER = sys.platform == "linux"  # macOS's libraries do not survive a fork, Windows has none
_LONGEST_FOLDER = 60  # characters; the path of a socket may have some 100
_PRELOADED = (  # what a fork starts with
    "cifar_lab.config.compose",
    "cifar_lab.sweeps.workers",
    *SLOW_IMPORTS,
)


def launcher(options: LaunchOptions) -> Launcher:
    """Return the launcher that starts a process for each cell, on this machine."""
    return _LocalProcesses(options)


class _LocalProcesses(Launcher):
    def start(self, cells: Sequence[Cell], folder: Path) -> list["_Worker"]:
        context = _process_context()
        return [_Worker(context, cell, self) for cell in cells]

    def wait(self, jobs: Sequence["_Worker"], stop: Stop) -> None:
        connection.wait([job.receiver for job in jobs], timeout=0.25)

    def abandon(self, jobs: Sequence["_Worker"]) -> None:
        for job in jobs:
            job.kill()


class _Worker(Job):
    """The process of one cell, seen from the sweep.

    It lives for as long as it holds the other end of `receiver`. `Process.is_alive` asks the server
    that forked it, and takes it for dead when only the server is gone.
    """

    def __init__(self, context: Any, cell: Cell, launcher: Launcher) -> None:
        super().__init__(cell)
        self._launcher, self._gpu = launcher, launcher.free_gpus.pop()
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_work,
            args=(str(cell.run.path), cell.code, self._gpu, launcher.options, sender),
            name=cell.run.path.name,
            daemon=True,
        )
        _start(self.process)
        sender.close()

    def stop(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """End the process at once."""
        self._send(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        self.process.join()

    def has_ended(self) -> bool:
        try:
            return bool(self.receiver.poll())
        except OSError:  # how Windows reports the other end's end
            return True

    def result(self) -> tuple[int, str | None]:
        """Return what the ended process came to; a killed one is noted as failed in its folder."""
        received: tuple[int, str | None] | None = None
        with contextlib.suppress(EOFError, OSError):
            received = self.receiver.recv()
        self.receiver.close()
        self.process.join()
        self._launcher.free_gpus.append(self._gpu)
        if received is not None:
            return received
        error = _reason(self.process.exitcode)
        with contextlib.suppress(Unavailable, UsageError, RunFailed, OSError):
            note_killed(self.cell.run, error)
        return 1, error

    def _send(self, number: int) -> None:
        if not self.has_ended():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)


def _reason(exit_code: int | None) -> str:
    """Return why a process ended that sent no result."""
    if exit_code is not None and -exit_code in list(signal.Signals):
        name = signal.Signals(-exit_code).name
        return f"killed by {name}{' (out of memory?)' * (name == 'SIGKILL')}"
    return f"its process ended without a result (exit code {exit_code}); see its train.log"


def _start(process: Any) -> None:
    """Start a process; try again where the server that forks it has just been killed."""
    for is_last in (False, True):
        try:
            with _without_main_module():
                # Blocked signals reach no server, and a process when it is ready for them.
                # No thread in the server.
                with _signals_blocked(), _environment(OMP_NUM_THREADS="1"):
                    if _HAS_SERVER:
                        _shorten_temporary_folder()
                        forkserver.ensure_running()
                    else:
                        process.start()
                if _HAS_SERVER:
                    process.start()
            return
        except (OSError, EOFError) as error:
            if is_last:
                raise RunFailed(f"no process can be started: {first_line(error)}") from None


def _work(path: str, code: str, gpu: str, options: LaunchOptions, sender: Any) -> None:
    """Be the process of one cell: run its folder, send (exit code, message), and end.

    What is printed here goes to the cell's train.log. A sweep that dies takes its cells along:
    they save and stop, so that the same line can go on at once.
    """
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C reaches the sweep alone, which passes it on once
    run = RunDir(path)
    try:
        output = open_for_appending(run.log_file)
    except OSError as error:
        _report(sender, (2, f"{run.log_file} cannot be written: {error.strerror}"))
        return
    with output:
        sys.stdout.flush()
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
    log.setLevel(logging.INFO)
    log.propagate = False
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    with Stop().installed() as stop:
        try:
            _unblock_signals()
            result = run_cell(run, code, stop, options)
        except Stopped as stopped:  # before the run began, or after its end
            name = signal.Signals(stopped.signal).name
            result = 128 + stopped.signal, f"stopped by {name}; all is saved"
        _report(sender, result)


def _report(sender: Any, result: tuple[int, str | None]) -> None:
    """Send what a cell came to; a sweep that was killed does not listen any more."""
    with contextlib.suppress(BrokenPipeError):
        sender.send(result)
    sender.close()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _process_context() -> Any:
    """Return how processes start: forked from a server that imported all, or anew."""
    context = multiprocessing.get_context("forkserver" if _HAS_SERVER else "spawn")
    if _HAS_SERVER:
        context.set_forkserver_preload(list(_PRELOADED))
    return context


def _shorten_temporary_folder() -> None:
    """Let multiprocessing keep its socket in /tmp where TMPDIR is too long for the name of one."""
    if len(tempfile.gettempdir()) > _LONGEST_FOLDER:
        before, tempfile.tempdir = tempfile.tempdir, "/tmp"
        try:
            util.get_temp_dir()  # made once for each process, and removed at its end
        finally:
            tempfile.tempdir = before


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Let signals wait; processes that are started here inherit this."""
    if os.name == "nt":
        yield
        return
    resource_tracker.ensure_running()  # starting it would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _blocked())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _unblock_signals() -> None:
    if os.name != "nt":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _blocked())


def _blocked() -> set[signal.Signals]:
    return {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """Keep new processes from running the user's script again, which has no use there.

    multiprocessing imports the main module into each process; a script that starts a sweep without
    `if __name__ == "__main__"` would start it once more in every cell.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
