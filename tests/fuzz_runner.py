"""Runs command lines in forked children, each in a folder of its own, and watches them.

`python tests/fuzz_runner.py --lines 0:300` runs lines of `fuzz_lines`, `--damages 0:100` commands
on damaged run folders of `fuzz_damage`; the last line of the output is the report as JSON.
"""

import argparse
import contextlib
import faulthandler
import importlib
import io
import itertools
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BATCH = 40
"""Lines of one child: its caches are warm, and a line that breaks them harms few others."""

CPU_SECONDS = 10
"""After these a line gets SIGTERM: a run stops and is saved, anything else is a hang."""

WAIT_SECONDS = 300
"""After these a line is a hang, whatever it waits for."""

MEMORY = 6 * 2**30
REFUSED = "must be refused"
OUTPUTS = ("out.txt", "err.txt")
MODULES = (
    *("cifar_lab.training.run", "cifar_lab.training.preflight", "cifar_lab.sweeps.start"),
    *("cifar_lab.analysis.reproduction_document", "cifar_lab.training.scoring"),
)
LONGEST = 300 + len("cifar_lab: ")


@dataclass(frozen=True)
class Case:
    """A command line, and what happens to the folder before it runs."""

    words: list[str]
    damage: Callable[[Path], object] | None = None
    label: str = ""


@dataclass
class Answer:
    """What a line said and did; `faults` are the rules that it broke."""

    number: int
    words: list[str]
    label: str
    code: int | None
    out: str
    err: str
    cpu: float
    changed: list[str]
    faults: list[str]


# --- the folder ---------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Make the template of the folder in which lines run: runs, pictures, and other things."""
    from PIL import Image
    from tiny_runs import make, train

    small = ("split.validation=1300", "training.epochs=1")
    pca = ("figures=embeddings", "figures.tsne=null")
    folder.mkdir()
    group = folder / "group"
    train(folder, *small, "name=group", *pca).path.rename(group / "one")
    shutil.copytree(group / "one", group / "other")
    config = group / "other" / "config.yaml"
    config.write_text(config.read_text().replace("\nseed: 0\n", "\nseed: 1\n"))
    shutil.copytree(group / "one", folder / "run")
    make(folder, *small, "name=x").path.rename(folder / "queued")
    shutil.copytree(folder / "queued", folder / "stopped")
    (folder / "x").rmdir()
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
    os.mkfifo(folder / "fifo")
    (folder / "link").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")


def snapshot(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Return what is in a folder, so that any change of any entry shows."""
    found = {}
    for parent, _, files in os.walk(folder):
        for name in (".", *files):
            path = os.path.join(parent, name)  # noqa: PTH118 (five times as fast)
            one = os.lstat(path)
            is_folder = name == "."
            found[os.path.relpath(path, folder)] = (
                (one.st_mode, one.st_mtime_ns)
                if is_folder
                else (one.st_mode, one.st_mtime_ns, one.st_size, one.st_ino)
            )
    return found


# --- a child ------------------------------------------------------------------------------------


def _guard(folder: Path) -> None:
    """Refuse, in this process, everything that would reach out of the folder or into the network.

    What a line does wrong then harms nobody, and is still seen: as an error where none should be.
    """
    inside = str(folder)
    places = {"os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.link": 1}

    def check(path: Any) -> None:
        if isinstance(path, int):
            return
        text = os.fsdecode(path)
        if text != os.devnull and not os.path.realpath(text).startswith(inside):
            raise PermissionError(13, "Permission denied", text)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                check(path)
        elif event in places:  # these act on a link itself, wherever it points
            path = arguments[places[event]]
            check(path if isinstance(path, int) else Path(os.fsdecode(path)).absolute().parent)

    def no_network(*_: Any) -> Any:
        raise OSError(101, "Network is unreachable")

    sys.addaudithook(hook)
    for name in ("connect", "connect_ex"):
        plain = getattr(socket.socket, name)

        def connect(self: socket.socket, address: Any, plain: Any = plain) -> Any:
            return plain(self, address) if self.family == socket.AF_UNIX else no_network()

        setattr(socket.socket, name, connect)
    vars(socket)["getaddrinfo"] = no_network


def _stop_at_limit(number: int, frame: Any) -> None:
    faulthandler.dump_traceback(file=2)
    os.kill(os.getpid(), signal.SIGTERM)


def _child(template: Path, base: Path, cases: Sequence[tuple[int, Case]], send: int) -> None:
    """Run cases one after another; write to the pipe `send`: a number, then an answer, as JSON."""
    folder = base / "work"
    _prepare_process(base, folder)
    from cifar_lab.__main__ import main

    before: dict[str, tuple[Any, ...]] = {}
    for number, case in cases:
        if not before:
            os.chdir(base)
            shutil.rmtree(folder, ignore_errors=True)
            _copy(template, folder)
        os.chdir(folder)
        if case.damage is not None:
            case.damage(folder)
        before = snapshot(folder)
        words = [word.replace("{root}", str(folder)) for word in case.words]
        for descriptor in (1, 2):
            os.ftruncate(descriptor, 0)
        os.write(send, f"{number}\n".encode())
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        cpu = time.process_time()
        code: int | None = None
        try:
            code = main(words)
        except BaseException:
            traceback.print_exc()
        cpu = time.process_time() - cpu
        signal.setitimer(signal.ITIMER_PROF, 0)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        after = snapshot(folder)
        changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
        said = {"code": code, "cpu": cpu, "changed": changed, "said": _said(base)}
        os.write(send, (json.dumps(said) + "\n").encode())
        if changed or case.damage is not None:
            before = {}


def _prepare_process(base: Path, folder: Path) -> None:
    os.environ |= {
        "HOME": str(folder),
        "XDG_CACHE_HOME": str(folder / ".cache"),
        "CIFAR_LAB_DATA": str(folder / ".data"),
        "TMPDIR": str(base / "tmp"),
        "COLUMNS": "100",
        "PATH": str(base / "no programs"),  # npm, for one, would download
    }
    tempfile.tempdir = None
    (base / "tmp").mkdir(exist_ok=True)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, name in enumerate(OUTPUTS, 1):
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        os.dup2(os.open(base / name, flags), descriptor)
    for stream, name in ((sys.stdout, OUTPUTS[0]), (sys.stderr, OUTPUTS[1])):
        assert isinstance(stream, io.TextIOWrapper), name
        stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGPROF, _stop_at_limit)
    _guard(base)


def _said(base: Path) -> dict[str, str]:
    texts = [(base / name).read_text(errors="replace") for name in OUTPUTS]
    return {key: text[-4000:] for key, text in zip(("out", "err"), texts, strict=True)}


def _copy(template: Path, folder: Path) -> None:
    """Copy the template, links and pipes as they are."""

    def copy(source: str, target: str) -> str:
        if Path(source).is_fifo():
            os.mkfifo(target)
            return target
        return str(shutil.copy2(source, target))

    shutil.copytree(template, folder, symlinks=True, copy_function=copy)


# --- the parent ---------------------------------------------------------------------------------


def run_cases(cases: dict[int, Case], template: Path, base: Path) -> Iterator[Answer]:
    """Yield the answer to each case, in their order."""
    left = list(cases.items())
    while left:
        batch = left[:BATCH]
        answers = list(_run_batch(batch, template, base))
        left = left[len(answers) :]
        yield from answers


def _run_batch(batch: Sequence[tuple[int, Case]], template: Path, base: Path) -> Iterator[Answer]:
    """Yield answers until the child ends, of itself or because a line hangs or kills it."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        os.setsid()
        try:
            _child(template, base, batch, send)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.close(send)
    current: tuple[int, Case] | None = None
    cases = dict(batch)
    try:
        for line in _lines(receive, child):
            said = json.loads(line)
            if isinstance(said, int):
                current = (said, cases[said])
            elif current is not None:
                yield judge(*current, **said)
                current = None
    finally:
        os.close(receive)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # a sweep's workers too
        os.waitpid(child, 0)
    if current is not None:
        yield judge(*current, code=None, cpu=0.0, changed=[], said=_said(base))


def _lines(receive: int, child: int) -> Iterator[str]:
    """Yield what a child writes, line by line, until it ends or is silent for too long.

    The pipe alone does not tell that it has ended: a process that it has left may hold it open.
    """
    rest, silent = b"", 0
    while silent < WAIT_SECONDS:
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        ready, _, _ = select.select([receive], [], [], 0 if ended else 1)
        if not ready:
            if ended:
                return
            silent += 1
            continue
        read = os.read(receive, 2**16)
        if not read:
            return
        silent = 0
        *lines, rest = (rest + read).split(b"\n")
        yield from (line.decode() for line in lines)


def judge(
    number: int,
    case: Case,
    *,
    code: int | None,
    cpu: float,
    changed: list[str],
    said: dict[str, str],
) -> Answer:
    """Return the answer with the rules that it breaks."""
    faults, out, err = [], said["out"], said["err"]
    if "Traceback (most recent call last)" in out + err:
        faults.append("traceback")
    if code is None:
        faults.append("hang, or the process ended")
    elif code not in (0, 1, 2, 3, 143):
        faults.append(f"exit code {code}")
    if case.label == REFUSED and code != 2:
        faults.append("not refused")
    if code == 2 and changed:
        faults.append("changed files")
    if code in (1, 2, 3):
        lines = err.splitlines()
        if code == 2 and len(lines) != 1:  # what is out of reach has a line for each source before
            faults.append(f"{len(lines)} lines")
        unreadable = case.words[:1] == ["summarize"] and code == 1  # its page says why
        if not unreadable and not (lines and lines[-1].startswith("cifar_lab: ")):
            faults.append("no message")
        if lines and len(lines[-1]) > LONGEST:
            faults.append("a long message")
        if case.damage is not None and cpu > 2:
            faults.append("more than two seconds")
        if code == 2 and out:
            faults.append("output before a refusal")
    return Answer(number, case.words, case.label, code, out, err, cpu, changed, faults)


def report(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return the counts, and all of the answers that broke a rule."""
    codes = Counter(str(answer.code) for answer in answers)
    return {
        "lines": len(answers),
        "codes": dict(sorted(codes.items())),
        "cpu_seconds": round(sum(answer.cpu for answer in answers), 1),
        "faults": dict(Counter(fault for answer in answers for fault in answer.faults)),
        "broken": [asdict(answer) for answer in answers if answer.faults],
    }


def main() -> int:
    """Run a part of the lines; print the counts, and what broke a rule."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", default="0:0", help="numbers of command lines, from:to")
    parser.add_argument("--damages", default="0:0", help="numbers of damages, from:to")
    parser.add_argument("--directed", action="store_true", help="the lines that are listed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--log", type=Path, help="append every answer to this file, as JSON lines")
    arguments = parser.parse_args()
    from fuzz_damage import damage
    from fuzz_lines import DIRECTED, Generator

    generator = Generator(arguments.seed)
    lines, damages = (
        range(*map(int, text.split(":"))) for text in (arguments.lines, arguments.damages)
    )
    directed = [Case(words, label=REFUSED) for words in DIRECTED] if arguments.directed else []
    parts = [
        dict(enumerate(directed)),
        {number: Case(generator.line(number)) for number in lines},
        {number: Case(*damage(arguments.seed, number)) for number in damages},
    ]
    for module in ("torch", "torchvision", "sklearn.datasets", "matplotlib.figure", *MODULES):
        importlib.import_module(module)
    with tempfile.TemporaryDirectory(prefix="cifar_lab-fuzz-", dir=arguments.folder) as name:
        base = Path(name).resolve()
        template = base / "template"
        _in_child(lambda: prepare(template))
        answers = []
        for answer in itertools.chain(*(run_cases(part, template, base) for part in parts)):
            answers.append(answer)
            if arguments.log is not None:
                with arguments.log.open("a") as log:
                    log.write(json.dumps(asdict(answer)) + "\n")
    print(json.dumps(report(answers)))
    return 0


def _in_child(action: Callable[[], object]) -> None:
    """Run an action in a child, so that this process stays as it is and can be forked."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit("the template could not be made")


if __name__ == "__main__":
    sys.exit(main())
