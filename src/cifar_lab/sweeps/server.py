"""A process that starts others on request: what is slow to import is imported once.

A request goes through a socket, with what becomes standard input, standard output and the channel
of the process that it asks for. The process is then handled like one of `subprocess`: it is asked
to stop by closing its standard input, and its exit code comes through its channel.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from cifar_lab.errors import RunFailed, shorten

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of this package."""

LOST = -1000
"""Stands for an exit code that nobody can know any more."""

_WIDTH = 8  # bytes of a number in a channel


class Request(NamedTuple):
    """What a server was asked for, and the descriptors of the process to start."""

    content: dict[str, Any]
    stdin: int
    stdout: int
    channel: int

    def answer(self, number: int) -> None:
        """Send a number: first the process's id, at its end its exit code."""
        with contextlib.suppress(BrokenPipeError):  # nobody listens any more
            os.write(self.channel, number.to_bytes(_WIDTH, "big", signed=True))

    def close(self) -> None:
        """Close this process's copies of the descriptors."""
        for descriptor in self[1:]:
            os.close(descriptor)


class Server:
    """A server, seen from the process that starts and asks it.

    It runs `python -c code`, in a session of its own so that Ctrl-C does not reach it, and ends
    with its standard input, which is the socket.
    """

    def __init__(self, code: str, environment: Mapping[str, str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._socket, theirs = socket.socketpair()
        paths = [str(PACKAGE.parent), *(path or str(Path.cwd()) for path in sys.path)]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=theirs.fileno(),
                stdout=self._errors,
                stderr=self._errors,
                start_new_session=True,
                env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
            )

    def start(self, content: Mapping[str, Any], stdout: int) -> "ServedProcess":
        """Start a process; RunFailed if the server is gone."""
        try:
            return ServedProcess(self._socket, content, stdout)
        except OSError:
            raise RunFailed(f"no process can be started: {self.last_words()}") from None

    def hello(self) -> dict[str, Any]:
        """Return the line that a server sends before it serves; RunFailed if it ended first."""
        with self._socket.makefile("rb", buffering=0) as lines:
            if line := lines.readline():
                content: dict[str, Any] = json.loads(line)
                return content
        raise RunFailed(self.last_words())

    def is_alive(self) -> bool:
        """Return whether the server still runs."""
        return self._process.poll() is None

    def last_words(self) -> str:
        """Return the last line that a server wrote which is about to end, or its exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        code = self._process.returncode
        return shorten(lines[-1], 160) if lines else f"its server ended with exit code {code}"

    def close(self, patience: float = 5.0) -> None:
        """Let the server end; end it after some seconds."""
        self._socket.close()
        self._errors.close()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def kill_all(self) -> None:
        """End the server and all that it started at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.close(0)


class ServedProcess:
    """A process that a server started, with those parts of subprocess.Popen that a sweep needs.

    It holds the other end of its channel, so that it counts as running for as long as it does,
    also when its server is gone. Then its exit code is LOST.
    """

    def __init__(self, server: socket.socket, content: Mapping[str, Any], stdout: int) -> None:
        self.returncode: int | None = None
        stdin, ours = os.pipe()
        self._channel, theirs = os.pipe()
        self.stdin: IO[bytes] = os.fdopen(ours, "wb")
        try:
            line = json.dumps(content).encode() + b"\n"
            sent = socket.send_fds(server, [line], [stdin, stdout, theirs])
            server.sendall(line[sent:])
        finally:
            os.close(stdin)
            os.close(theirs)
        self.pid = self._read()
        if self.pid == LOST:
            raise ConnectionResetError

    def poll(self) -> int | None:
        """Return the exit code, None while the process runs."""
        if self.returncode is None and select.select([self._channel], [], [], 0)[0]:
            self.returncode = self._read()
            os.close(self._channel)
            self.stdin.close()
        return self.returncode

    def kill(self) -> None:
        """End the process at once."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def _read(self) -> int:
        answer = os.read(self._channel, _WIDTH)
        return int.from_bytes(answer, "big", signed=True) if answer else LOST


def receive(server: socket.socket) -> Request | None:
    """Return the next request that came to a server, None when there will be no more."""
    line, descriptors, _, _ = socket.recv_fds(server, 1 << 16, 3)
    while line and not line.endswith(b"\n"):
        more = server.recv(1 << 16)
        line = line + more if more else b""
    return Request(json.loads(line), *descriptors) if line else None
