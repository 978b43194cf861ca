"""How far the runs below a folder are, as their files say: for `watch`, which writes nothing.

The summary page of runs that go on is served to a browser: a table above it asks for the rows that
have changed, every two seconds. When a run has ended, the whole page is made anew.
"""

import errno
import json
import os
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cifar_lab.errors import RunFailed, UsageError, shorten
from cifar_lab.runs.files import read_bytes
from cifar_lab.runs.run_dir import RunDir, find_runs
from cifar_lab.runs.text import align, duration

HEADER = ("run", "state", "epoch", "validation", "best", "left")
_ORDER = ("running", "damaged", "failed", "interrupted", "finished", "queued")
_FILES = (".png", ".svg", ".pdf", ".log", ".yaml", ".json", ".csv", ".md", ".txt", ".html")
_LOCAL = ("127.0.0.1", "localhost", "::1")
_RECENT = 5  # epochs, whose mean duration says how long the others will take

# One setting of config.yaml: to parse and check 1,000 of these files would take six seconds.
_EPOCHS = re.compile(r"^training:\n(?:  .*\n)*?  epochs: (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class WatchedRun:
    """A run as it was last seen; accuracies are fractions, `epoch_seconds` None before the first.

    `stamp`: times and sizes of summary.json and metrics.csv as they were read.
    """

    path: Path
    status: str
    stamp: tuple[int, ...]
    epochs: int | None = None
    done: int = 0
    now: float | None = None
    best: float | None = None
    epoch_seconds: float | None = None

    @property
    def seconds_left(self) -> float | None:
        """About how long it will train, from the duration of its last epochs."""
        if self.epochs is None or self.epoch_seconds is None or self.status == "finished":
            return None
        begun = time.time() - self.stamp[2] / 1e9 if self.status == "running" else 0.0
        return max(0.0, (self.epochs - self.done) * self.epoch_seconds - begun)


class Watcher:
    """Reads the runs below a folder again and again; only what has changed is read anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs: dict[Path, WatchedRun] = {}

    def look(self) -> list[WatchedRun]:
        """Return the runs as they are now; UsageError if the folder is gone."""
        self._runs = {run.path: self._read(run) for run in find_runs(self.folder)}
        runs = self._runs.values()
        return sorted(runs, key=lambda r: (_ORDER.index(r.status), -(r.best or 0.0), r.path))

    def _read(self, run: RunDir) -> WatchedRun:
        stamp = _stamp(run.summary_file) + _stamp(run.metrics_file)
        known = self._runs.get(run.path)
        try:
            if known is not None and known.stamp == stamp:
                ended = known.status == "running" and not run.is_locked()
                return replace(known, status="interrupted") if ended else known
            rows = run.read_metrics()
            scores = [row.val_accuracy for row in rows if row.val_accuracy is not None]
            recent = [row.seconds for row in rows[-_RECENT:]]
            epochs = _EPOCHS.search(read_bytes(run.config_file).decode())
            return WatchedRun(
                run.path,
                run.status,
                stamp,
                int(epochs[1]) if epochs else None,
                done=len(rows),
                now=scores[-1] if scores else None,
                best=max(scores, default=None),
                epoch_seconds=sum(recent) / len(recent) if recent else None,
            )
        except (RunFailed, UsageError, OSError, ValueError):  # it may be removed at any time
            return WatchedRun(run.path, "damaged", stamp)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def headline(runs: Sequence[WatchedRun]) -> str:
    """Return how many runs are in which state, the best so far, and about how long all will take.

    What is queued is expected to take as long as the others, as many at a time as run now.
    """
    counts = Counter(run.status for run in runs)
    parts = [f"{counts['finished']} of {len(runs)} finished"]
    parts += [f"{counts[s]} {s}" for s in _ORDER if counts[s] and s != "finished"]
    if (best := max(runs, key=lambda run: run.best or 0.0, default=None)) and best.best:
        name = names([run.path for run in runs])[best.path]
        parts.append(
            f"best validation accuracy {100 * best.best:.2f} %" + f" ({name})" * (len(runs) > 1)
        )
    times = [run.epoch_seconds * run.epochs for run in runs if run.epoch_seconds and run.epochs]
    if counts["running"] and times:
        left = sum(run.seconds_left or 0.0 for run in runs if run.status == "running")
        left += counts["queued"] * sum(times) / len(times)
        parts.append(f"about {duration(left / counts['running'])} left")
    return " · ".join(parts)


def cells(run: WatchedRun, name: str) -> tuple[str, ...]:
    """Return a run's row of the table."""
    of = "" if run.epochs is None else f" of {run.epochs}"
    scores = ["–" if score is None else f"{100 * score:.2f} %" for score in (run.now, run.best)]
    left = run.seconds_left if run.status == "running" else None
    return (name, run.status, f"{run.done}{of}", *scores, "" if left is None else duration(left))


def table(runs: Sequence[WatchedRun], columns: int, most: int | None = None) -> str:
    """Return the headline and a line for each run, at most `most` of them and `columns` wide."""
    named = names([run.path for run in runs])
    shown = runs if most is None else runs[:most]
    half = max(20, columns - 55) // 2
    rows: list[tuple[str, ...]] = [HEADER]
    for run in shown:
        name = shorten(named[run.path], 1000)
        cut = f"{name[: half - 1]}…{name[-half:]}"  # in the middle
        rows.append(cells(run, name if len(name) <= 2 * half else cut))
    lines = [headline(runs), "", *align(rows, right={2, 3, 4, 5})]
    if len(runs) > len(shown):
        lines.append(f"and {len(runs) - len(shown)} more")
    return "\n".join(lines)


def names(paths: Sequence[Path]) -> dict[Path, str]:
    """Return a short name of each run: what differs in the names of the folders, where it can."""
    parts = [path.name.split("-")[:-1] for path in paths]
    same = set(parts[0]).intersection(*parts) if len(parts) > 1 else set()
    short = ["-".join(part for part in own if part not in same) for own in parts]
    common = os.path.commonpath([path.parent for path in paths]) if paths else ""
    full = [str(path.relative_to(common)) for path in paths]
    unique = len(set(short)) == len(paths) and all(short)
    return dict(zip(paths, short if unique else full, strict=True))


class LiveServer(ThreadingHTTPServer):
    """Answers requests for the page, for what has changed, and for files of the runs.

    Nothing is written. Other machines need the token, which is a part of the address. UsageError if
    the port is in use.
    """

    daemon_threads = True

    def __init__(self, watcher: Watcher, host: str, port: int) -> None:
        self.folder = watcher.folder.resolve()
        self.prefix = "/" if host in _LOCAL else f"/{secrets.token_urlsafe(16)}/"
        self._watcher = watcher
        self._lock = threading.Lock()
        self._rows: dict[int, tuple[tuple[str, ...], int]] = {}  # by place: cells, and version
        self._version = 0
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            why = f"on {host}: {error.strerror}"
            if error.errno == errno.EADDRINUSE:
                why = "is in use: --serve 0 takes a free one"
            raise UsageError(f"port {port} {why}") from None
        self.address = f"http://{host}:{self.server_port}{self.prefix}"

    def changes(self, since: int) -> dict[str, Any]:
        """Return the rows that have changed since a version, each with its place before it."""
        with self._lock:
            runs = self._watcher.look()
            named = names([run.path for run in runs])
            self._version += 1
            before, self._rows = self._rows, {}
            for place, run in enumerate(runs):
                row = cells(run, named[run.path])
                known = before.get(place, ((), 0))
                self._rows[place] = known if known[0] == row else (row, self._version)
            return {
                "version": self._version,
                "headline": headline(runs),
                "ended": sum(run.status not in ("running", "queued") for run in runs),
                "count": len(runs),
                "rows": [[place, *row] for place, (row, at) in self._rows.items() if at > since],
            }

    def page(self) -> bytes:
        """Return the summary page, which asks for itself again when another run has ended."""
        # late: the table alone needs none of this
        from cifar_lab.analysis.grouping import read_collection
        from cifar_lab.analysis.summary import report, summary_of

        ended = self.changes(0)["ended"]
        summary = summary_of(read_collection(self._watcher.folder))
        return report(summary, "live.html", header=HEADER, ended=ended).encode()


class _Handler(SimpleHTTPRequestHandler):
    server: LiveServer
    extensions_map = SimpleHTTPRequestHandler.extensions_map | dict.fromkeys(
        (".log", ".yaml", ".csv", ".md"), "text/plain; charset=utf-8"
    )

    def __init__(self, request: Any, client_address: Any, server: LiveServer) -> None:
        super().__init__(request, client_address, server, directory=str(server.folder))

    def do_GET(self) -> None:
        prefix = self.server.prefix
        name = (self.headers.get("Host") or "").rpartition(":")[0].strip("[]")
        # A page of another site could reach this one under a name that leads here.
        is_foreign = prefix == "/" and name not in _LOCAL
        if is_foreign or not secrets.compare_digest(self.path[: len(prefix)], prefix):
            return self.send_error(HTTPStatus.FORBIDDEN)
        self.path = "/" + self.path[len(prefix) :]
        asked = urlsplit(self.path)
        try:
            if asked.path == "/":
                content, kind = self.server.page(), "text/html; charset=utf-8"
            elif asked.path == "/changes":
                since = int(parse_qs(asked.query).get("since", ["0"])[0])
                content = json.dumps(self.server.changes(since)).encode()
                kind = "application/json"
            else:
                file = Path(self.translate_path(self.path)).resolve()
                shown = file.is_dir() or file.suffix in _FILES
                # a folder's index.html is sent in its place, and may be a link
                sent = [file, *((file / name).resolve() for name in ("index.html", "index.htm"))]
                if not shown or not all(path.is_relative_to(self.server.folder) for path in sent):
                    raise UsageError("only files of the runs are shown")
                return super().do_GET()
        except (UsageError, RunFailed, ValueError) as error:
            return self.send_error(HTTPStatus.NOT_FOUND, str(error)[:200])
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass
