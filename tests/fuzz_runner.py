"""Runs command lines in this process, each in a folder of its own, and judges the answers.

While a line runs, what would write outside of its folder or reach into the network is refused.
"""

import contextlib
import io
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_runs import make

from cifar_lab.__main__ import main
from cifar_lab.runs.run_dir import RunDir

CPU_SECONDS = 10
"""After these a run is stopped, and anything else is a hang."""
MEMORY = 6 * 2**30
LONGEST = 300 + len("cifar_lab: ")
PLACES = {"os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.link": 1}


@dataclass
class Answer:
    """What a line said and did."""

    code: int | None = None
    out: str = ""
    err: str = ""
    changed: Sequence[str] = ()


def prepare(folder: Path, finished: RunDir) -> None:
    """Make the template of the folder in which lines run: runs, pictures, and other things."""
    group = folder / "group"
    for run in (group / "one", group / "other", folder / "run"):
        shutil.copytree(finished.path, run)
    config = group / "other" / "config.yaml"
    config.write_text(config.read_text().replace("\nseed: 0\n", "\nseed: 1\n"))
    queued = make(folder / "x").path.rename(folder / "queued")
    shutil.copytree(queued, folder / "stopped")
    shutil.rmtree(folder / "x")
    for path in ("empty", "pictures/cat", "pictures/dog", "conf/model", "broken_conf/model"):
        (folder / path).mkdir(parents=True)
    (folder / "conf/model/mine.yaml").write_text("_target_: torch.nn.Flatten\n")
    (folder / "conf/mine.yaml").write_text("defaults: [config, _self_]\nseed: 4\n")
    (folder / "broken_conf/model/mine.yaml").write_text("a: [\n")
    (folder / "broken_conf/model/convnet.yaml").write_text("- 1\n")
    picture = Image.new("RGB", (40, 30), (200, 30, 0))
    for name in ("picture.png", "ü.png", "pictures/cat/a.png", "pictures/dog/b.png"):
        picture.save(folder / name)
    (folder / "broken.png").write_bytes((folder / "picture.png").read_bytes()[:40])
    header = io.BytesIO()
    picture.save(header, "PPM")
    (folder / "huge.png").write_bytes(header.getvalue().replace(b"40 30", b"99999 99999", 1))
    (folder / "file.txt").write_text("text\n")
    (folder / "deep.yaml").write_text("a: " + "[" * 5000)
    (folder / "run.npz").write_bytes(b"PK\x03\x04 no")
    (folder / "link").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")


def snapshot(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return what is in a folder, so that any change of any entry shows."""
    entries: dict[str, tuple[int, ...]] = {}
    for parent, _, files in os.walk(folder):
        for name in (".", *files):
            path = os.path.join(parent, name)  # noqa: PTH118 (five times as fast)
            stat = os.lstat(path)
            size = 0 if name == "." else stat.st_size
            entries[path] = (stat.st_mode, stat.st_mtime_ns, size, stat.st_ino)
    return entries


_fence: Path | None = None
"""The folder outside of which nothing may be written now; an audit hook cannot be removed."""


def _check(path: Any) -> None:
    text = os.devnull if isinstance(path, int) else os.fsdecode(path)
    if text != os.devnull and not os.path.realpath(text).startswith(str(_fence)):
        raise PermissionError(13, "Permission denied", text)


def _guard(event: str, arguments: tuple[Any, ...]) -> None:
    if _fence is None:
        return
    if event == "open":
        path, _, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            _check(path)
    elif event in PLACES:  # these act on a link itself, wherever it points
        path = arguments[PLACES[event]]
        _check(path if isinstance(path, int) else Path(os.fsdecode(path)).absolute().parent)
    elif event in ("socket.connect", "socket.getaddrinfo") and (
        getattr(arguments[0], "family", None) != socket.AF_UNIX
    ):
        raise OSError(101, "Network is unreachable")


sys.addaudithook(_guard)


class Hang(BaseException):
    """A line has used up its time."""


def _stop_at_limit(number: int, frame: Any) -> None:
    """Stop a run as SIGTERM does, and be saved; anything else hangs."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        raise Hang
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def fenced(base: Path) -> Iterator[None]:
    """Let nothing be written outside of a folder, and end what takes too long."""
    global _fence

    before = signal.signal(signal.SIGPROF, _stop_at_limit)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.MonkeyPatch.context() as patch:
        places = {"HOME": "", "XDG_CACHE_HOME": ".cache", "CIFAR_LAB_DATA": ".data"}
        for name, value in places.items():
            patch.setenv(name, str(base / "work" / value))
        patch.setenv("COLUMNS", "100")
        patch.setenv("PATH", str(base / "no programs"))  # npm, for one, would download
        patch.chdir(base / "work")
        patch.setattr(tempfile, "tempdir", str(base))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, limits[1]))
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        _fence = base
        try:
            yield
        finally:
            _fence = None
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
            resource.setrlimit(resource.RLIMIT_DATA, limits)


def answer(words: Sequence[str], template: Path) -> Answer:
    """Run a command line in a copy of the template; return what it says and changes."""
    base = template.parent
    folder = base / "work"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder, symlinks=True)
    before = snapshot(folder)
    result = Answer()
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace") for _ in range(2))
    with fenced(base), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            result.code = main([word.replace("{root}", str(folder)) for word in words])
        except BaseException:
            traceback.print_exc()
    for name, stream in (("out", out), ("err", err)):
        stream.seek(0)
        setattr(result, name, stream.read())
    after = snapshot(folder)
    result.changed = sorted(
        path for path in before.keys() | after.keys() if before.get(path) != after.get(path)
    )
    return result


def faults(answer: Answer, words: Sequence[str] = (), *, refused: bool = False) -> Iterator[str]:
    """Yield the rules that an answer breaks."""
    code, lines = answer.code, answer.err.splitlines()
    unexpected = ("Traceback (most recent call last)", "(CIFAR_LAB_DEBUG=1 shows where)")
    if any(words in answer.out + answer.err for words in unexpected):
        yield "traceback"
    if code is None:
        yield "hang, or the process ended"
    elif code not in (0, 1, 2, 3, 143):
        yield f"exit code {code}"
    if refused and code != 2:
        yield "not refused"
    if code == 2 and answer.changed:
        yield "changed files"
    if code == 2 and answer.out:
        yield "output before a refusal"
    if code == 2 and len(lines) != 1:  # what is out of reach has a line for each source before
        yield f"{len(lines)} lines"
    if code in (1, 2, 3):
        unreadable = words[:1] == ["summarize"] and code == 1  # its page says why
        if not unreadable and not (lines and lines[-1].startswith("cifar_lab: ")):
            yield "no message"
        if lines and len(lines[-1]) > LONGEST:
            yield "a long message"
