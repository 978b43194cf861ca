"""Files that a crash leaves whole: replaced at once, grown by appending, synced, locked."""

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

log = logging.getLogger("cifar_lab")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that becomes `path` when the block ends well, and vanishes if not."""
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as handle:
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
    """Add to a text file; `safely`: on the disk when this returns."""
    try:
        with path.open("ab") as handle:
            handle.write(text.encode("utf-8"))
            if safely:
                sync_file(handle)
    except OSError as error:
        error.filename = str(path)
        raise


def copy_at_once(source: Path, target: Path) -> None:
    """Make `target` a second name of `source`; a copy on a file system without links."""
    temporary = _temporary(target)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        with replacing(target) as handle:
            handle.write(source.read_bytes())
    else:
        temporary.replace(target)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that were killed; for who holds the folder's lock."""
    for path in folder.glob(".*.tmp"):
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
    """Take the lock of an open file, which the system gives back when the file is closed.

    False where another process has it. Some network file systems have no locks: there it warns,
    and two processes may do the same work twice.
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
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
