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
import threading
from collections.abc import Callable, Iterator

from cifar_lab.config import targets
from cifar_lab.config.schema import TargetConfig
from cifar_lab.errors import RunFailed, UsageError, first_line, redact
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.trackers import Tracker, build_tracker
from cifar_lab.trackers.sending import Entry, read_entry, write_entry

log = logging.getLogger("cifar_lab")

_STOPPED = 5.0  # seconds that a run waits which is to stop; a cluster grants 30 in all


class Follower:
    """Lets a tracker follow a run that trains, while a `with` block runs, which gets `look`.

    The end of the block waits for the process, for a limited time. What goes wrong is one warning.
    """

    def __init__(self, run: RunDir, name: str, target_config: TargetConfig) -> None:
        self._run, self._name, self._target_config = run, name, target_config
        self._tracker: Tracker | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._warned = False

    def look(self) -> None:
        """Start the process, or look whether it has a problem; return at once."""
        with self._warning():
            if self._tracker is None:
                self._tracker = build_tracker(self._target_config)
                self._process = self._start(self._tracker)
            elif self._process is not None:
                self._check(self._tracker, ended=self._process.poll() is not None)

    def __enter__(self) -> Callable[[], None]:
        return self.look

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        process, tracker = self._process, self._tracker
        if process is None or tracker is None:
            return
        seconds = tracker.wait_seconds if kind is None else min(tracker.wait_seconds, _STOPPED)
        code = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(seconds)
        finally:  # after a second signal, too: nobody waits any longer
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if hasattr(os, "killpg"):  # and those that its client has started
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.kill()
            process.wait()
        with self._warning():
            entry = self._check(tracker, ended=code not in (None, 0))
            if code is None:
                raise RunFailed(f"it did not take everything within {seconds:g} seconds")
            if entry.complete and entry.link is not None:
                log.info("%s: %s", tracker.title, entry.link)

    def _start(self, tracker: Tracker) -> "subprocess.Popen[bytes]":
        destination = tracker.destination(self._name)
        entry = read_entry(self._run, destination)
        if entry.problem is not None:  # of an earlier attempt
            write_entry(self._run, destination, dataclasses.replace(entry, problem=None))
        folders = map(os.path.abspath, sys.path)  # a trusted module may be in any of them
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
        environment.pop("RANK", None)  # it is none of torchrun's processes
        folder = str(self._run.path.absolute())
        line = [sys.executable, "-m", "cifar_lab", "track", folder, "--follow"]
        with self._run.trackers_log.open("wb") as output:
            return subprocess.Popen(
                [*line, *(f"--trust={module}" for module in targets.trusted())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the run, and killing takes the client's too
            )

    def _check(self, tracker: Tracker, *, ended: bool) -> Entry:
        """Return what trackers.json says; RunFailed if that, or its process, has a problem."""
        entry = read_entry(self._run, tracker.destination(self._name))
        if ended or entry.problem is not None:
            ending = f"its process ended; see {self._run.trackers_log}"
            raise RunFailed(entry.problem or ending)
        return entry

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        """Warn of what goes wrong, once."""
        try:
            yield
        except (OSError, UsageError, RunFailed) as error:
            if not self._warned:
                option = self._target_config["_target_"].split(".")[-2]
                given = {k: v for k, v in self._target_config.items() if k != "_target_" and v}
                settings = "".join(f" tracker.{key}={value}" for key, value in given.items())
                log.warning(
                    "warning: %s: %s; the run is not affected, and `python -m cifar_lab.track %s "
                    "tracker=%s%s` sends later what is missing",
                    "the tracker" if self._tracker is None else self._tracker.title,
                    *(first_line(error), self._run.path, option, settings),
                )
            self._warned = True


@contextlib.contextmanager
def redacted_output() -> Iterator[Callable[[], None]]:
    """Redact what this process and its children print into trackers.log; yield what ends that."""
    # Not sys.stdout alone: clients in C and processes of theirs print addresses and keys, too.
    reading, writing = os.pipe()
    before = [os.dup(1), os.dup(2)]

    def pass_on() -> None:
        with os.fdopen(reading, encoding="utf-8", errors="backslashreplace") as lines:
            for line in lines:
                os.write(before[1], redact(line).encode("utf-8", "backslashreplace"))

    def restore() -> None:
        for stream, kept in zip((1, 2), before, strict=True):
            os.dup2(kept, stream)
        thread.join(1.0)

    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    for stream in (1, 2):
        os.dup2(writing, stream)
    os.close(writing)
    try:
        yield restore
    finally:
        restore()
        if not thread.is_alive():  # a child of the client may live on, and print
            for kept in before:
                os.close(kept)
