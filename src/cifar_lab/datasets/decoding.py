"""Many pictures, decoded by several processes."""

import hashlib
import itertools
import json
import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cifar_lab.datasets.pictures import Fit, Unreadable, decode, read_content
from cifar_lab.errors import RunFailed

PER_PROCESS = 200
"""Pictures from which another process is worth the time that it takes to start."""

_CHUNK, _CHUNK_BYTES = 16, 8 << 20  # pictures, and bytes of pixels, that a process is asked for


@dataclass(frozen=True)
class Decoded:
    """A picture (C, H, W), or None and the reason; and the sha256 of its file, "" if unread."""

    pixels: NDArray[np.uint8] | None
    error: str | None
    sha256: str


def decode_files(paths: Sequence[Path], image_shape: Sequence[int], fit: Fit) -> Iterator[Decoded]:
    """Yield the pictures of files in their order, decoded by as many processes as there are cores.

    Only a few are in memory at a time, however slowly they are taken. Raises RunFailed if a process
    is killed.
    """
    count = min(_cores(), len(paths) // PER_PROCESS)
    if count < 2:
        yield from (_decode_file(path, image_shape, fit) for path in paths)
        return
    size = max(1, min(_CHUNK, _CHUNK_BYTES // prod(image_shape)))
    chunks = (paths[first : first + size] for first in range(0, len(paths), size))
    with (
        closing(_Processes(count, image_shape, fit)) as processes,
        ThreadPoolExecutor(count) as threads,
    ):
        asked: deque[Future[list[Decoded]]] = deque()
        try:
            for chunk in itertools.islice(chunks, 2 * count):
                asked.append(threads.submit(processes.decode, chunk))
            while asked:
                yield from asked.popleft().result()
                for chunk in itertools.islice(chunks, 1):
                    asked.append(threads.submit(processes.decode, chunk))
        finally:
            for future in asked:
                future.cancel()


def _decode_file(path: Path, image_shape: Sequence[int], fit: Fit) -> Decoded:
    digest = ""
    try:
        content = read_content(path)
        digest = hashlib.sha256(content).hexdigest()
        return Decoded(decode(content, image_shape, fit), None, digest)
    except Unreadable as error:
        return Decoded(None, str(error), digest)


class _Processes:
    """Processes that decode; each serves one thread at a time.

    Not those of multiprocessing: they would run the user's script again, and a process of a sweep,
    which is daemonic, may not have any.
    """

    def __init__(self, count: int, image_shape: Sequence[int], fit: Fit) -> None:
        self._shape = tuple(image_shape)
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from {__name__} import serve; serve({list(image_shape)!r}, {fit!r})"
        )
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._all: list[subprocess.Popen[bytes]] = []
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C reaches this process, which then ends that one
            )
            self._all.append(process)
            self._idle.put(process)

    def decode(self, paths: Sequence[Path]) -> list[Decoded]:
        """Have one of the processes decode some files."""
        process = self._idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps([str(path) for path in paths]).encode() + b"\n")
            process.stdin.flush()
            answers = json.loads(process.stdout.readline())
            found = []
            for error, digest in answers:
                pixels = None
                if error is None:
                    content = process.stdout.read(prod(self._shape))
                    pixels = np.frombuffer(content, dtype=np.uint8).reshape(self._shape)
                found.append(Decoded(pixels, error, digest))
            return found
        except (OSError, ValueError) as error:  # a broken pipe, or half an answer
            raise RunFailed(
                f"a process that decodes pictures ended with exit code {process.wait()} at one of "
                f"the {len(paths)} files from {paths[0]} on (-9: out of memory?)"
            ) from error
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """End the processes: each ends when nothing more can be asked."""
        for process in self._all:
            process.communicate()


def serve(image_shape: Sequence[int], fit: Fit) -> None:
    """Be one of the processes: answer lists of files on standard input, until it is closed.

    An answer is a line of JSON, [error, sha256] for each file, and then the pixels of all that have
    no error.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin.buffer:
        found = [_decode_file(Path(path), image_shape, fit) for path in json.loads(line)]
        answers.write(json.dumps([[one.error, one.sha256] for one in found]).encode() + b"\n")
        for one in found:
            if one.pixels is not None:
                answers.write(one.pixels.data)
        answers.flush()


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
