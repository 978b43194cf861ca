"""The process that sends runs to a tracker: `python -m cifar_lab.track RUN_DIR --follow`.

The clients of trackers print, wait and try again for minutes, draw random numbers, start threads
that delay the end of Python, and may crash. In a process of their own they cannot touch a run that
trains. It reads run folders and notes in their trackers.json what came of it; nothing else passes
between the processes. A tracker that is slow, full, failing or out of reach costs one warning.
"""

import contextlib
import dataclasses
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

from cifar_lab.config import targets
from cifar_lab.config.run_config import RunConfig
from cifar_lab.config.schema import TargetConfig
from cifar_lab.errors import RunFailed, UsageError, first_line
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.trackers import Tracker, build_tracker
from cifar_lab.trackers.record import Entry, read_entry, write_entry

log = logging.getLogger("cifar_lab")

_STOPPED_SECONDS = 5.0  # that a run which is to stop waits; a cluster grants 30 seconds in all


@contextlib.contextmanager
def tracking(run: RunDir, config: RunConfig, tracker: TargetConfig) -> Iterator[Callable[[], None]]:
    """Let a tracker follow a run that trains.

    Yields a function that starts its process, and later looks whether that has a problem. The end
    waits for the process, for a limited time.
    """
    tracked = _TrackedRun(run, config, tracker)
    try:
        yield tracked.look
    except BaseException:
        tracked.close(stopped=True)
        raise
    tracked.close(stopped=False)


class _TrackedRun:
    def __init__(self, run: RunDir, config: RunConfig, target_config: TargetConfig) -> None:
        self._run, self._name, self._target_config = run, config.name, target_config
        self._tracker: Tracker | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._warned = False

    def look(self) -> None:
        """Start the process, or look whether it has a problem; return at once."""
        if self._warned:
            return
        try:
            if self._process is None:
                self._start()
            elif self._process.poll() is not None:
                self._warn(self._entry().problem or self._ended())
            elif (problem := self._entry().problem) is not None:
                self._warn(problem)
        except (OSError, UsageError, RunFailed) as error:
            self._warn(first_line(error))

    def close(self, *, stopped: bool) -> None:
        """Wait for the process, for a limited time; end it."""
        process, tracker = self._process, self._tracker
        if process is None or tracker is None:
            return
        seconds = min(tracker.wait_seconds, _STOPPED_SECONDS) if stopped else tracker.wait_seconds
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # after a second signal, too: nobody waits any longer
            self._kill(process)
        try:
            entry = self._entry()
        except (OSError, RunFailed) as error:
            self._warn(first_line(error))
            return
        if entry.problem is not None:
            self._warn(entry.problem)
        elif code is None:
            self._warn(f"it did not take everything within {seconds:g} seconds")
        elif code != 0:
            self._warn(self._ended())
        elif entry.complete and entry.link is not None:
            log.info("%s: %s", tracker.title, entry.link)

    def _start(self) -> None:
        self._tracker = build_tracker(self._target_config)
        entry = self._entry()
        if entry.problem is not None:  # of an earlier attempt
            entry = dataclasses.replace(entry, problem=None)
            write_entry(self._run, self._tracker.destination(self._name), entry)
        folders = map(os.path.abspath, sys.path)  # a trusted module may be in any of them
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
        environment.pop("RANK", None)  # it is none of torchrun's processes
        folder = os.path.abspath(self._run.path)  # noqa: PTH100
        line = [sys.executable, "-m", "cifar_lab", "track", folder, "--follow"]
        with self._run.trackers_log.open("wb") as output:
            self._process = subprocess.Popen(
                [*line, *(f"--trust={module}" for module in targets.trusted())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the run, and killing takes the client's too
            )

    @staticmethod
    def _kill(process: "subprocess.Popen[bytes]") -> None:
        """End the process, and those that its client has started, at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        process.wait()

    def _entry(self) -> Entry:
        assert self._tracker is not None
        return read_entry(self._run, self._tracker.destination(self._name))

    def _ended(self) -> str:
        return f"its process ended; see {self._run.trackers_log}"

    def _warn(self, problem: str) -> None:
        if self._warned:
            return
        self._warned = True
        log.warning(
            "warning: %s: %s; the run is not affected, and `%s` sends later what is missing",
            "the tracker" if self._tracker is None else self._tracker.title,
            problem,
            _command(self._run, self._target_config),
        )


def _command(run: RunDir, target_config: TargetConfig) -> str:
    """Return the line that sends a run to a tracker."""
    option = target_config["_target_"].split(".")[-2]
    settings = [f"tracker.{k}={v}" for k, v in target_config.items() if k != "_target_" and v]
    return " ".join(["python -m cifar_lab.track", str(run.path), f"tracker={option}", *settings])
