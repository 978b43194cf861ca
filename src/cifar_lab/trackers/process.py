"""What a run that trains has to do with its tracker: it never waits for it, but at its end.

A tracker that is slow, full, failing or out of reach costs one warning.
"""

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cifar_lab.config import targets
from cifar_lab.config.run_config import RunConfig
from cifar_lab.config.schema import TargetConfig
from cifar_lab.errors import UsageError, first_line
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.trackers import Tracker, build_tracker
from cifar_lab.trackers.sending import Report

log = logging.getLogger("cifar_lab")

_STOPPED_SECONDS = 5.0  # that a run which is to stop waits; a cluster grants 30 seconds in all


class TrackerProcess:
    """A process that sends run folders to a tracker, and may hang or die.

    `live`: the folders are those of runs that train. Its output goes to `output`.
    """

    def __init__(self, target_config: TargetConfig, *, live: bool, output: IO[bytes] | int) -> None:
        specification = {"tracker": target_config, "trust": targets.trusted(), "live": live}
        path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)  # noqa: PTH100
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cifar_lab.trackers.child", json.dumps(specification)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the run, and killing takes the client's own too
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input = self._process.stdin.fileno()
        os.set_blocking(self._input, False)
        self._reports: queue.SimpleQueue[Report | None] = queue.SimpleQueue()
        self._reader = threading.Thread(
            target=self._read, args=(self._process.stdout,), daemon=True
        )
        self._reader.start()

    def ask(self, folder: Path) -> bool:
        """Let it send what is new in a folder; return False if it is gone.

        If it is so far behind that the pipe is full, it will hear of the folder soon enough.
        """
        try:
            os.write(self._input, f"{folder}\n".encode())
        except BlockingIOError:
            return True
        except BrokenPipeError:
            return False
        return True

    def report(self, timeout: float = 0.0) -> Report | None:
        """Return its next report; None if there is none within `timeout` seconds, or ever."""
        try:
            return self._reports.get(timeout=timeout) if timeout else self._reports.get_nowait()
        except queue.Empty:
            return None

    def end(self, timeout: float) -> bool:
        """Let it finish what it was asked for; kill it after `timeout` seconds and return False."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            code = self._process.wait(timeout)
            self._reader.join(1)  # the last reports
            return code == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            self.kill()

    def kill(self) -> None:
        """End it, and the processes that its client has started, at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.wait()

    def _read(self, answers: IO[bytes]) -> None:
        with answers:
            for line in answers:
                self._reports.put(Report(**json.loads(line)))
        self._reports.put(None)


class Tracking:
    """One run that trains and its tracker, if it has one."""

    def __init__(self, run: RunDir, target_config: TargetConfig | None) -> None:
        self._run, self._target_config = run, target_config
        self._tracker: Tracker | None = None
        self._process: TrackerProcess | None = None
        self._warned = False

    def update(self) -> None:
        """Let the tracker know that the folder has something new; return at once."""
        if self._target_config is None or (self._warned and self._process is None):
            return
        try:
            if self._process is None:
                self._tracker = build_tracker(self._target_config)
                with self._run.trackers_log.open("wb") as output:
                    self._process = TrackerProcess(self._target_config, live=True, output=output)
            if not self._process.ask(self._run.path):
                self._warn(f"its process ended; see {self._run.trackers_log}")
        except (OSError, UsageError) as error:
            self._warn(first_line(error))
        self._look()

    def close(self, *, stopped: bool) -> None:
        """Wait for the tracker, for a limited time; end its process."""
        process, tracker = self._process, self._tracker
        if process is None or tracker is None:
            return
        seconds = min(tracker.wait_seconds, _STOPPED_SECONDS) if stopped else tracker.wait_seconds
        try:
            process.ask(self._run.path)
            began = time.monotonic()
            in_time = process.end(seconds)
        except BaseException:  # a second signal: nobody waits any longer
            process.kill()
            raise
        last = self._look()
        if last is not None and last.complete and last.link is not None:
            log.info("%s: %s", tracker.title, last.link)
        if not in_time and time.monotonic() - began >= seconds:
            self._warn(f"it did not take everything within {seconds:g} seconds")
        elif not in_time:
            self._warn(f"its process ended; see {self._run.trackers_log}")

    def _look(self) -> Report | None:
        """Read what the process has reported; return its last report."""
        last = None
        while self._process is not None and (report := self._process.report()) is not None:
            last = report
            if report.problem is not None:
                self._warn(report.problem)
        return last

    def _warn(self, problem: str) -> None:
        if self._warned or self._target_config is None:
            return
        self._warned = True
        name = self._tracker.title if self._tracker is not None else "the tracker"
        log.warning(
            "warning: %s: %s; the run is not affected, and `%s` sends later what is missing",
            name,
            problem,
            command(self._run.path, self._target_config),
        )


@contextlib.contextmanager
def tracking(run: RunDir, settings: RunConfig) -> Iterator[Tracking]:
    """Give a run its tracker, which starts with the first `update` and is closed at the end."""
    follower = Tracking(run, settings.tracker)
    try:
        yield follower
    except BaseException:
        follower.close(stopped=True)
        raise
    follower.close(stopped=False)


def command(folder: Path, target_config: TargetConfig) -> str:
    """Return the line that sends a folder to a tracker."""
    option = target_config["_target_"].split(".")[-2]
    settings = [f"tracker.{k}={v}" for k, v in target_config.items() if k != "_target_" and v]
    return " ".join(["python -m cifar_lab.track", str(folder), f"tracker={option}", *settings])
