"""The summary page of runs that go on, served to a browser; only what has changed is sent again.

A table above the page asks for the rows that have changed, every two seconds. When a run has ended,
the whole page is made anew.
"""

import contextlib
import errno
import json
import secrets
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cifar_lab.analysis import html_report
from cifar_lab.analysis.grouping import read_collection
from cifar_lab.analysis.summary import summary_of
from cifar_lab.analysis.watching import HEADER, Watcher, cells, headline, names
from cifar_lab.errors import RunFailed, UsageError

_FILES = (".png", ".svg", ".pdf", ".log", ".yaml", ".json", ".csv", ".md", ".txt", ".html")
_LOCAL = ("127.0.0.1", "localhost", "::1")


class LiveRuns:
    """The rows of the table, and the page; for several threads at once."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._lock = threading.Lock()
        self._rows: dict[int, tuple[tuple[str, ...], int]] = {}  # by place: cells, and version
        self._version = 0
        self._page: tuple[int, bytes] = (-1, b"")

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
            new = [[place, *row] for place, (row, at) in self._rows.items() if at > since]
            return {
                "version": self._version,
                "headline": headline(runs),
                "ended": sum(run.status not in ("running", "queued") for run in runs),
                "count": len(runs),
                "rows": new,
            }

    def page(self) -> bytes:
        """Return the page, which is made once for as many runs as have ended."""
        ended = self.changes(0)["ended"]
        with self._lock:
            if self._page[0] != ended:
                summary = summary_of(read_collection(self._watcher.folder))
                page = html_report.report(summary, "live.html", header=HEADER, ended=ended)
                self._page = ended, page.encode()
            return self._page[1]


class LiveServer(ThreadingHTTPServer):
    """Answers requests for the page, its changes, and files of the runs; writes nothing.

    Other machines need the token, which is a part of the address.
    """

    daemon_threads = True

    def __init__(self, runs: LiveRuns, folder: Path, host: str, port: int) -> None:
        self.runs, self.folder = runs, folder.resolve()
        self.prefix = "/" if host in _LOCAL else f"/{secrets.token_urlsafe(16)}/"
        super().__init__((host, port), _Handler)
        self.address = f"http://{host}:{self.server_port}{self.prefix}"


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
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        self.path = "/" + self.path[len(prefix) :]
        asked = urlsplit(self.path)
        try:
            if asked.path == "/":
                self._answer(self.server.runs.page(), "text/html; charset=utf-8")
            elif asked.path == "/changes":
                since = int(parse_qs(asked.query).get("since", ["0"])[0])
                content = json.dumps(self.server.runs.changes(since)).encode()
                self._answer(content, "application/json")
            else:
                super().do_GET()
        except (UsageError, RunFailed, ValueError) as error:
            self.send_error(HTTPStatus.NOT_FOUND, str(error)[:200])

    do_HEAD = do_GET

    def send_head(self) -> Any:
        path = Path(self.translate_path(self.path)).resolve()
        shown = path.is_dir() or path.suffix in _FILES
        if not shown or not path.is_relative_to(self.server.folder):
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        return super().send_head()

    def _answer(self, content: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def open_server(watcher: Watcher, host: str, port: int) -> Iterator[LiveServer]:
    """Open the port of a page; UsageError if it is in use."""
    try:
        server = LiveServer(LiveRuns(watcher), watcher.folder, host, port)
    except OSError as error:
        busy = error.errno == errno.EADDRINUSE
        why = "is in use: --serve 0 takes a free one" if busy else f"on {host}: {error.strerror}"
        raise UsageError(f"port {port} {why}") from None
    with server:
        yield server
