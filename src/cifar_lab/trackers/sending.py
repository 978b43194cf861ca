"""From a run's folder to a tracker: what the tracker does not have yet is sent."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from cifar_lab.config.identity import address
from cifar_lab.config.run_config import RunConfig, flatten, to_plain
from cifar_lab.errors import first_line
from cifar_lab.runs.atomic_io import open_lock, try_lock
from cifar_lab.runs.metrics import EpochMetrics
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.summary import RunSummary
from cifar_lab.trackers import Session, TrackedRun, Tracker, scores_of
from cifar_lab.trackers.record import Entry, read_entry, write_entry

_RETRY_SECONDS = 30.0
# The report's claims are no settings, and the tracker's own are nobody's business there.
_NOT_SENT = ("study.claims", "tracker", "choices")


@dataclass(frozen=True)
class Report:
    """What came of sending a folder; `problem` is None if the tracker has all there is so
    far, `is_new` whether something was sent just now."""

    folder: str
    problem: str | None = None
    complete: bool = False
    link: str | None = None
    is_new: bool = False


class Sender:
    """Keeps a tracker up to date with one run's folder. A failure is reported, and tried again.

    While a run is open at the tracker, the folder's `.trackers.lock` is held: the process of a run
    that was killed sends what it has for a while, and the resumed run must not send it, too.
    """

    def __init__(self, run: RunDir, tracker: Tracker, *, live: bool) -> None:
        self._run, self._tracker, self._live = run, tracker, live
        self._session: Session | None = None
        self._lock: IO[str] | None = None
        self._sent = 0
        self._failed_at: float | None = None
        self._report = Report(str(run.path))

    def update(self, *, last: bool = False) -> Report:
        """Send what is new; try again half a minute after a failure, or as it is the `last` time.

        The result follows, and the run is closed, when its status is finished.
        """
        now, failed = time.monotonic(), self._failed_at
        if failed is not None and now < failed + _RETRY_SECONDS and not last:
            return self._report
        try:
            before, entry = self._send()
            if last and self._session is not None:
                self._session.close(self._run.status)
                self._session = None
        except Exception as error:  # a client may fail in any way, and none of it ends a run
            self._failed_at, self._session = time.monotonic(), None
            problem = f"{type(error).__name__}: {first_line(error)}"
            self._report = dataclasses.replace(self._report, problem=problem)
        else:
            self._failed_at = None
            self._report = Report(
                str(self._run.path), None, entry.complete, entry.link, is_new=entry != before
            )
        if self._session is None and self._lock is not None:
            self._lock.close()
            self._lock = None
        return self._report

    def _send(self) -> tuple[Entry, Entry]:
        """Send what is new; return the entries of trackers.json before and after."""
        run, summary = self._run, self._run.read_summary()
        settings = run.read_config()
        destination = self._tracker.destination(settings.name)
        if self._lock is None:
            self._lock = open_lock(run.trackers_lock)
            while not try_lock(self._lock):
                time.sleep(0.1)
        before = entry = read_entry(run, destination)
        if entry.complete:
            return before, entry
        if self._session is None:
            write_entry(run, destination, entry)  # the key first: a second attempt has the same one
            self._session = self._tracker.open(self._describe(settings, summary, entry))
            self._sent = self._session.epochs
        session = self._session
        rows = [row for row in run.read_metrics() if row.epoch > self._sent]
        if rows:
            session.log_epochs(rows)
            self._sent = rows[-1].epoch
        entry = dataclasses.replace(entry, epochs=self._sent, link=session.link)
        if summary.status == "finished":
            figures = {name: run.figures / f"{name}.png" for name in summary.figures}
            session.log_result(
                scores_of(summary), {name: p for name, p in figures.items() if p.is_file()}
            )
            session.close("finished")
            self._session = None
            entry = dataclasses.replace(entry, complete=True)
        write_entry(run, destination, entry)
        return before, entry

    def _describe(self, settings: RunConfig, summary: RunSummary, entry: Entry) -> TrackedRun:
        plain = {k: v for k, v in to_plain(settings).items() if k not in _NOT_SENT}
        flat = {k: v for k, v in flatten(plain).items() if k not in _NOT_SENT}
        same_but_for_seed = address(dataclasses.replace(settings, seed=0)).name
        about = {
            "folder": str(self._run.path.resolve()),
            "commit": summary.commit,
            "results_version": str(summary.results_version or ""),
            "device_name": summary.device_name,
        }
        return TrackedRun(
            key=entry.key,
            name=self._run.path.resolve().name,
            folder=self._run.path.resolve(),
            project=settings.name,
            group=same_but_for_seed.replace("-seed0", ""),
            settings=flat,
            about={name: text for name, text in about.items() if text},
            epochs=entry.epochs,
            live=self._live,
        )


def times_of(rows: Sequence[EpochMetrics], ended: float) -> list[float]:
    """Return when each of these epochs ended, the last one at `ended`, in seconds."""
    times = []
    for row in reversed(rows):
        times.append(ended)
        ended -= row.seconds
    return times[::-1]
