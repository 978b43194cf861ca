"""Show what takes space below a folder of runs; remove or archive what is named.

Without options nothing is removed. Runs that are in use are left alone.
"""

import contextlib
import importlib
import re
import shutil
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from cifar_lab import cli
from cifar_lab.errors import RunFailed, Unavailable, UsageError, is_terminal, shorten, shorten_path
from cifar_lab.runs.files import replacing
from cifar_lab.runs.run_dir import RunDir, find_runs


@cli.command
def main(argv: list[str]) -> int:
    """Run `python -m cifar_lab.tidy FOLDER [--last-checkpoints] [--failed] ...`."""
    parser = cli.Parser("tidy", __doc__)
    parser.add("folder", "a folder of runs", type=cli.path)
    parser.add_flag("--last-checkpoints", "remove last.pt of finished runs; no more epochs then")
    parser.add_flag("--failed", "remove runs that failed, whole")
    parser.add("--older-than", "only runs that ended so long ago", type=_age, metavar="30d|12h|4w")
    parser.add_output("--archive", "write runs not in use to a .zip or .tar.zst", ".zip", ".zst")
    parser.add_flag("--dry-run", "only say what would be removed; nothing is written")
    parser.add_flag("--yes", "do not ask")
    arguments = parser.parse_args(argv)
    if arguments.archive is not None and arguments.archive.exists():
        raise UsageError(f"--archive {arguments.archive} is there already; name another file")

    ask = (arguments.last_checkpoints or arguments.failed) and not arguments.yes
    if ask and not (arguments.dry_run or is_terminal(sys.stdin)):
        raise UsageError("tidy asks before it removes, and there is no terminal: add --yes")
    runs = find_runs(arguments.folder)
    if arguments.older_than is not None:
        oldest = time.time() - 86_400 * arguments.older_than
        runs = [run for run in runs if run.summary_file.stat().st_mtime < oldest]
    if not runs:
        raise UsageError(f"{shorten_path(arguments.folder)} holds no run of that kind")
    free = [run for run in runs if not run.is_locked()]
    states = dict(_states(free))
    # Others, as runs without validation images, have the scored weights in last.pt alone.
    done = [run for run, state in states.items() if state == ("finished", "best")]
    checkpoints = {run: run.last for run in done if run.last.is_file()}
    failed = {run: run.path for run, (status, _) in states.items() if status == "failed"}
    interrupted = [run.path for run, (status, _) in states.items() if status == "interrupted"]
    if arguments.archive is not None and not arguments.dry_run:
        _archive(free, arguments.folder, arguments.archive)
        size = _megabytes([arguments.archive]).strip()
        print(f"archive: {arguments.archive} ({len(free)} of {len(runs)} runs, {size})")
    targets = dict(checkpoints if arguments.last_checkpoints else {})
    targets |= failed if arguments.failed else {}
    if not targets:
        print(f"{_megabytes(run.path for run in runs)}  {len(runs)} runs, of that")
        print(f"{_megabytes(checkpoints.values())}  last checkpoints (--last-checkpoints)")
        print(f"{_megabytes(failed.values())}  {len(failed)} failed runs (--failed)")
        print(f"{_megabytes(interrupted)}  {len(interrupted)} interrupted runs, which can go on")
        print(f"{_megabytes(run.figures for run in runs)}  figures")
        return 0
    for path in targets.values():
        print(f"{_megabytes([path])}  {path}")
    question = f"remove these {len(targets)}, {_megabytes(targets.values()).strip()}? [y/N] "
    if arguments.dry_run or (ask and input(question).strip().lower() not in ("y", "yes")):
        print("nothing was removed")
        return 0
    removed = 0
    for run, path in targets.items():
        try:
            with run.lock():  # so that nobody continues it meanwhile
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed += 1
        except (Unavailable, UsageError) as error:  # in use, or with a link to somewhere
            print(f"left: {error}", file=sys.stderr)
    print(f"removed: {removed}")
    return 0


def _states(runs: Iterable[RunDir]) -> Iterator[tuple[RunDir, tuple[str, str | None]]]:
    """Yield each run with its status and the weights it was scored with; name the damaged ones."""
    for run in runs:
        try:
            summary = run.read_summary()
        except RunFailed as error:
            print(f"left alone: {error}", file=sys.stderr)
        else:
            yield run, (summary.status, summary.scored_weights)


def _archive(runs: Sequence[RunDir], folder: Path, file: Path) -> None:
    """Write the files of runs into an archive, under the folder's name and their paths in it."""
    paths = [path for run in runs for path in sorted(run.path.rglob("*"))]
    files = [path for path in paths if path.is_file() and not path.is_symlink()]
    with replacing(file) as handle, _open_archive(file, handle) as add:
        for path in files:
            add(path, folder.resolve().name / path.relative_to(folder))


@contextlib.contextmanager
def _open_archive(file: Path, handle: IO[bytes]) -> Iterator[Callable[[Path, Path], None]]:
    """Yield the function that adds a file to an archive; Zstandard's is smaller and faster."""
    if file.suffix.lower() == ".zip":
        options: Any = {"compression": zipfile.ZIP_DEFLATED, "strict_timestamps": False}
        with zipfile.ZipFile(handle, "w", **options) as archive:
            yield archive.write
        return
    try:
        name = "compression.zstd" if sys.version_info >= (3, 14) else "zstandard"
        zstd = importlib.import_module(name)
    except ModuleNotFoundError:
        problem = "a .tar.zst needs Python 3.14 or `pip install zstandard`; a .zip does not"
        raise UsageError(f"--archive {file}: {problem}") from None
    with zstd.open(handle, "wb") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        yield tar.add


def _megabytes(paths: Iterable[Path]) -> str:
    files = [f for path in paths for f in ([path] if path.is_file() else path.rglob("*"))]
    return f"{sum(f.stat().st_size for f in files if f.is_file()) / 1e6:9,.1f} MB"


def _age(text: str) -> float:
    """Return a duration such as 30d in days."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([hdw])", text)
    if match is None:
        raise UsageError(f"--older-than {shorten(text)} is wrong: it must be 12h, 30d or 4w")
    return float(match[1]) * {"h": 1 / 24, "d": 1.0, "w": 7.0}[match[2]]


if __name__ == "__main__":
    raise SystemExit(main())
