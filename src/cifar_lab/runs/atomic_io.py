"""Files that a crash leaves whole: replaced at once, grown by appending, synced, locked.

Nothing here follows a symbolic link that somebody has put in place of a file, and nothing waits
for a pipe.
"""

import contextlib
import errno
import logging
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from cifar_lab.errors import UsageError, shorten_path

log = logging.getLogger("cifar_lab")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that becomes `path` when the block ends well, and vanishes if not."""
    temporary = _temporary(path)
    try:
        # "x" fails where anything has the name, even a link to nowhere.
        with temporary.open("xb") as handle:
            yield handle
            sync_file(handle)
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say where
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole."""
    with replacing(path) as handle:
        handle.write(text.encode("utf-8"))


def append_text(path: Path, text: str, *, safely: bool = True) -> None:
    """Append to a text file; with `safely` the text is on the disk when this returns."""
    try:
        with open_for_appending(path) as handle:
            handle.write(text.encode("utf-8"))
            if safely:
                sync_file(handle)
    except OSError as error:
        error.filename = str(path)
        raise


def copy_at_once(source: Path, target: Path) -> None:
    """Make `target` a second name of `source`; a copy on a file system without hard links."""
    temporary = _temporary(target)
    try:
        os.link(source, temporary)
    except OSError:
        with replacing(target) as handle:
            handle.write(source.read_bytes())
    else:
        temporary.replace(target)
        temporary.unlink(missing_ok=True)  # rename does nothing if both are names of one file


_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def open_file(path: Path, flags: int, mode: str, buffering: int = -1) -> IO[Any]:
    """Open a regular file; OSError for a folder, a device or a pipe, which could block forever."""
    more = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    no_file = OSError(errno.EINVAL, "not a regular file", str(path))
    try:
        descriptor = os.open(path, flags | more, 0o666)
    except OSError as error:
        raise (no_file if error.errno == errno.ENXIO else error) from None  # a pipe or a socket
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise no_file
    return open(descriptor, mode, buffering)  # noqa: PTH123


def open_for_reading(path: Path) -> IO[bytes]:
    """Open a regular file to read its bytes."""
    return open_file(path, os.O_RDONLY, "rb")


def open_for_appending(path: Path, *, anew: bool = False, buffering: int = -1) -> IO[bytes]:
    """Open (or create) a regular file to add bytes at its end; `anew` replaces what is there."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NO_LINK
    if anew:
        path.unlink(missing_ok=True)
        flags |= os.O_EXCL
    return open_file(path, flags, "ab", buffering)


def open_lock(path: Path) -> IO[str]:
    """Open (or create) a lock file."""
    return open_file(path, os.O_RDWR | os.O_CREAT | _NO_LINK, "r+")


def check_inside(path: Path, folder: Path) -> Path:
    """Return a path that is to be written; UsageError if it leads out of a run's folder."""
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        where = shorten_path(folder)
        raise UsageError(f"{shorten_path(path)} is not inside the run's folder {where}")
    return path


def move_aside(files: Iterable[Path], folder: Path, trash: Path) -> None:
    """Move those of the files that are there from a folder to `trash`, keeping their names."""
    for path in files:
        if path.is_file():
            aside = trash / check_inside(path, folder).relative_to(folder)
            aside.parent.mkdir(parents=True, exist_ok=True)
            path.replace(aside)


def move_back(trash: Path, folder: Path) -> None:
    """Undo `move_aside`."""
    for path in sorted(trash.rglob("*")):
        if path.is_file():
            path.replace(check_inside(folder / path.relative_to(trash), folder))


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that were killed; the caller holds the lock."""
    for path in folder.glob(".*.tmp"):
        if re.search(r"\.([0-9a-f]{16}|\d+)\.tmp$", path.name):  # ours, of today or of old code
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make a file's (or, where the system can, a folder's) content survive a power loss."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(handle: IO[bytes]) -> None:
    """Make what was written to an open file survive a power loss."""
    handle.flush()
    os.fsync(handle.fileno())


def try_lock(handle: IO[Any], *, exclusive: bool = True) -> bool:
    """Take the lock of an open file, which the system releases when the file is closed.

    Returns False if another process has it. Some network file systems have no locks: a warning is
    logged there, and two processes may do the same work twice.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        log.warning("%s cannot be locked: %s", handle.name, error.strerror)
    return True


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
