"""A real file server on this machine that counts requests and misbehaves as it is told."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Behaviour:
    """How one path is served; offsets count from the first byte of each answer."""

    content: bytes
    ranges: bool = True
    bytes_per_second: float | None = None
    hang_after: int | None = None
    close_after: int | None = None
    claimed_length: int | None = None
    status: int = 200


@dataclass
class FileServer:
    """The paths it serves and the requests it has seen: (path, Range header)."""

    address: str
    paths: dict[str, Behaviour] = field(default_factory=dict)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    def serve(self, path: str, behaviour: Behaviour) -> str:
        """Serve a path from now on; returns its address."""
        self.paths[path] = behaviour
        return self.address + path

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one GET request."""
        asked = handler.headers["Range"]
        self.requests.append((handler.path, asked))
        behaviour = self.paths.get(handler.path, Behaviour(b"no such file", status=404))
        body, status, start = behaviour.content, behaviour.status, 0
        if asked and behaviour.ranges and status == 200:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])  # type: ignore[index]
            status = 206 if start < len(body) else 416
            body = body[start:] if status == 206 else b""
        handler.send_response(status)
        length = len(body) if behaviour.claimed_length is None else behaviour.claimed_length
        handler.send_header("Content-Length", str(length))
        if status == 206:
            last = len(behaviour.content) - 1
            handler.send_header("Content-Range", f"bytes {start}-{last}/{last + 1}")
        handler.end_headers()
        self._send(handler, behaviour, body)

    def _send(self, handler: BaseHTTPRequestHandler, how: Behaviour, body: bytes) -> None:
        chunk = 1 << 16
        if how.bytes_per_second:
            chunk = max(1, int(how.bytes_per_second / 50))
        stops = [n for n in (how.hang_after, how.close_after) if n is not None]
        end = min([len(body), *stops])
        for start in range(0, end, chunk):
            handler.wfile.write(body[start : min(start + chunk, end)])
            if how.bytes_per_second:
                time.sleep(chunk / how.bytes_per_second)
        if how.hang_after is not None:
            self.closing.wait()


@contextmanager
def file_server() -> Iterator[FileServer]:
    """Run a FileServer on a free port of 127.0.0.1."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                state.answer(self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client gave up, as many of these tests want

        def log_message(self, format: str, *args: object) -> None:
            """Keep the test's output to itself."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state = FileServer(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield state
    finally:
        state.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
