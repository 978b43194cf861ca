"""From a run's folder to a tracker: what the tracker does not have yet is sent.

trackers.json notes which run at which tracker the folder is, so that it goes on there.

The clients of trackers print, wait and try again for minutes, draw random numbers, start threads
that delay the end of Python, and may crash. In a process of their own they cannot touch a run that
trains: `python -m cifar_lab.track RUN_DIR --follow` reads its folder and notes in trackers.json
what came of it; nothing else passes between the processes. A tracker that is slow, full, failing or
out of reach costs one warning.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

from cifar_lab.config import targets
from cifar_lab.config.identity import address
from cifar_lab.config.run_config import flatten, to_plain
from cifar_lab.config.schema import TargetConfig, parse_as
from cifar_lab.errors import Damaged, RunFailed, UsageError, first_line, log, redact
from cifar_lab.runs.files import open_for_appending, read_bytes, try_lock, write_text
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.summary import RunSummary
from cifar_lab.trackers import Session, TrackedRun, Tracker, build_tracker

_STOPPED = 5.0  # seconds that a run waits which is to stop; a cluster grants 30 in all
_POLL_SECONDS = 0.5
_RETRY_SECONDS = 30.0
# The tracker's own settings are nobody's business there.
_NOT_SENT = ("tracker", "choices")


@dataclass(frozen=True)
class Entry:
    """A run at a tracker: its key there, the epochs that were sent, whether the result was.

    `link` is the address of its page, `problem` why the last attempt to send something failed.
    """

    key: str
    epochs: int = 0
    complete: bool = False
    link: str | None = None
    problem: str | None = None


def read_entry(run: RunDir, destination: str) -> Entry:
    """Return what is known of a run at a destination; one with a new key, if nothing is."""
    return _entries(run).get(redact(destination)) or Entry(secrets.token_hex(6))


def write_entry(run: RunDir, destination: str, entry: Entry) -> None:
    """Note the state of a run at a destination."""
    entries = _entries(run) | {redact(destination): entry}
    content = {name: asdict(entry) for name, entry in entries.items()}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_text(run.trackers_file, redact(text))  # addresses and clients' messages have passwords


def _entries(run: RunDir) -> dict[str, Entry]:
    try:
        content = json.loads(read_bytes(run.trackers_file))
        return {str(name): parse_as(Entry, entry, "") for name, entry in dict(content).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, UsageError, RecursionError) as error:
        raise Damaged(
            f"{run.trackers_file} is damaged ({first_line(error)}); without it, the run is sent as "
            "a new one"
        ) from None


def follow(run: RunDir, tracker: Tracker, give_up: Callable[[], None]) -> Entry:
    """Send what a run's folder holds, and what is added to it until the run has ended.

    A failure is noted in trackers.json and the attempt repeated after half a minute, and as the
    run has ended. `give_up` is called, in a thread of its own, where that last attempt takes longer
    than `tracker.wait_seconds`: a client may hang.
    """
    owner = _owner(run)
    with open_for_appending(run.trackers_lock) as lock:
        while try_lock(lock) is False:  # by the process of a run that was killed, for a while
            time.sleep(0.1)
        sender = Sender(run, tracker)
        sent, due = None, 0.0
        while True:
            ended, stamp = run.status != "running", 0.0
            if run.metrics_file.exists():
                stamp = run.metrics_file.stat().st_mtime  # of the last row
            if _owner(run) != owner:  # it was killed, and another process goes on with it
                sender.close()
                return sender.entry
            if ended:
                timer = threading.Timer(tracker.wait_seconds, give_up)
                timer.daemon = True
                timer.start()
                sender.update(last=True)
                timer.cancel()
                return sender.entry
            if stamp != sent and time.monotonic() >= due:
                if sender.update(last=False):
                    sent = stamp
                else:
                    due = time.monotonic() + _RETRY_SECONDS
            time.sleep(_POLL_SECONDS)


def _owner(run: RunDir) -> bytes:
    """Return what the process that trains a run has written into its lock."""
    return read_bytes(run.lock_file) if run.lock_file.exists() else b""


class Sender:
    """Keeps a tracker up to date with one run's folder."""

    def __init__(self, run: RunDir, tracker: Tracker) -> None:
        self._run, self._tracker = run, tracker
        self._config = run.read_config()
        self._destination = tracker.destination(self._config.name)
        self._session: Session | None = None
        self.entry = read_entry(run, self._destination)

    def update(self, *, last: bool) -> bool:
        """Send what is new, and the result once there is one; return whether that went well.

        `last`: the run has ended, and is closed at the tracker.
        """
        try:
            self._send()
            if last:
                self.close()
            self._note(problem=None)
        except Exception as error:  # a client may fail in any way, and none of it ends a run
            self._session = None
            self._note(problem=f"{type(error).__name__}: {first_line(error)}")
        return self.entry.problem is None

    def close(self) -> None:
        """Close the run at the tracker, if it is open there."""
        if self._session is not None:
            self._session.close(self._run.status)
            self._session = None

    def _note(self, **changes: object) -> None:
        entry = replace(self.entry, **changes)  # type: ignore[arg-type]
        if entry != self.entry or not self._run.trackers_file.exists():
            write_entry(self._run, self._destination, entry)
            self.entry = entry

    def _send(self) -> None:
        if self.entry.complete:
            return
        summary = self._run.read_summary()
        if self._session is None:
            self._note()  # the key first: a second attempt has the same one
            self._session = self._tracker.open(self._describe(summary))
        session, is_finished = self._session, summary.status == "finished"
        if rows := [row for row in self._run.read_metrics() if row.epoch > session.epochs]:
            session.log_epochs(rows)
            session.epochs = rows[-1].epoch
        if is_finished:
            figures = {name: self._run.figures / f"{name}.png" for name in summary.figures}
            drawn = {name: path for name, path in figures.items() if path.is_file()}
            numbers = vars(summary).items()
            scores = {
                f"result/{name}": n
                for name, n in numbers
                if type(n) in (int, float) and name not in ("seed", "threads")
            }
            session.log_result(scores, drawn)
            self.close()
        self._note(epochs=session.epochs, link=session.link, complete=is_finished)

    def _describe(self, summary: RunSummary) -> TrackedRun:
        plain = {k: v for k, v in to_plain(self._config).items() if k not in _NOT_SENT}
        same_but_for_seed = address(replace(self._config, seed=0)).name
        folder = self._run.path.resolve()
        about = {
            "folder": str(folder),
            "commit": summary.commit,
            "results_version": str(summary.results_version or ""),
            "device_name": summary.device_name,
        }
        return TrackedRun(
            key=self.entry.key,
            name=folder.name,
            folder=folder,
            project=self._config.name,
            group=same_but_for_seed.replace("-seed0", ""),
            settings=flatten(plain),
            about={name: text for name, text in about.items() if text},
            epochs=self.entry.epochs,
            live=summary.status == "running",
        )


# --- the process, seen from the run, and what it prints -------------------------------------------


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
            write_entry(self._run, destination, replace(entry, problem=None))
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
