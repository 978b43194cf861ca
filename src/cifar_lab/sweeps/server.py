"""A process that runs cells on request, and what it answers: one line of JSON each.

What is slow to import or must not run in the process of a sweep (torch, Ray) is in the server.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cifar_lab.errors import shorten

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of this package."""

LOST = -1000
"""Stands for an exit code that nobody can know any more."""


def python_path() -> str:
    """Return the PYTHONPATH of a process that imports this package, and what this one can."""
    folders = [str(PACKAGE.parent), *(folder or str(Path.cwd()) for folder in sys.path)]
    return os.pathsep.join(folders)


class Server:
    """A server, seen from the process that starts and asks it.

    It runs `python -c code`, in a session of its own so that Ctrl-C does not reach it. Requests go
    to its standard input, with whose end it and its cells end, and answers come from its standard
    output, `[number of the request, answer]`. Other lines are its last words.
    """

    def __init__(self, code: str, environment: Mapping[str, str]) -> None:
        self.answers: dict[int, Any] = {}
        self.last_words = "it ended without a word"
        self._asked = 0
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**environment, "PYTHONPATH": python_path()},
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                number, content = json.loads(line)
                self.answers[number] = content
            except (ValueError, TypeError):
                text = line.decode("utf-8", "replace").strip()
                self.last_words = shorten(text, 160) or self.last_words

    def start(self, **content: Any) -> "ServedProcess":
        """Ask for a cell; a server that is gone is seen by its exit code."""
        self._asked += 1
        self.send(number=self._asked, **content)
        return ServedProcess(self, self._asked)

    def send(self, **content: Any) -> None:
        """Send a request, if the server is there."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(content).encode() + b"\n")
            self._process.stdin.flush()

    def first_answer(self) -> Any:
        """Return what a server says of itself before it serves, as number 0; None if it ended."""
        while 0 not in self.answers and self.is_alive():
            time.sleep(0.02)
        return self.answers.get(0)

    def is_alive(self) -> bool:
        """Return whether answers can still come."""
        return self._listener.is_alive()

    def close(self, patience: float = 0.0) -> None:
        """Let the server end; after some seconds kill it and what is left of what it started."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._process.stdout.closed:
            return
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        self.signal_all(signal.SIGKILL)
        self._process.wait()
        self._listener.join(5)
        self._process.stdout.close()

    def signal_all(self, number: int) -> None:
        """Send a signal to the server, if it is there, and to all processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


class ServedProcess:
    """A cell that a server runs, with those parts of subprocess.Popen that a sweep needs."""

    def __init__(self, server: Server, number: int) -> None:
        self._server, self._number = server, number

    def poll(self) -> int | None:
        """Return the exit code, None while the cell runs, LOST if the server is gone."""
        unknown = None if self._server.is_alive() else LOST
        code: int | None = self._server.answers.get(self._number, unknown)
        return code

    def terminate(self) -> None:
        """Let the cell save and end."""
        if self._server.is_alive():
            self._server.send(number=self._number, stop=True)
        else:
            self._server.signal_all(signal.SIGTERM)

    def kill(self) -> None:
        """End the cell at once, and with it the server."""
        self._server.close()


def answer(number: int, content: Any) -> None:
    """Answer a request, as the server, in one line whatever a library has printed before."""
    with contextlib.suppress(BrokenPipeError):  # nobody listens any more
        os.write(1, f"\n{json.dumps([number, content])}\n".encode())
