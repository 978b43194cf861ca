"""Files that a crash leaves whole, and reading of files that anybody may have written.

They are replaced at once, grown by appending, synced, locked. Nothing here follows a symbolic link
that somebody has put in place of a file, waits for a pipe, or reads more than a run writes.
"""

import contextlib
import errno
import logging
import os
import re
import secrets
import stat
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from cifar_lab.errors import Damaged, UsageError, first_line, shorten_path

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


MAX_BYTES = 2**27
"""The most bytes that a text file of a run has; a larger one is not ours."""

_NO_FILE = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP)
"""No file can have this path, since it is too long, leads through a file, or in a circle."""

MAX_ARRAY_BYTES = 2**30
"""The most bytes that the arrays of an .npz file have, decompressed."""


def read_bytes(path: Path, most: int = MAX_BYTES) -> bytes:
    """Return the content of a text file of a run.

    Raises FileNotFoundError if there is none; Damaged for a folder, a pipe or a device in its
    place, and for a file that is far larger than any that a run writes.
    """
    try:
        with open_for_reading(path) as handle:
            content = bytes(handle.read(most + 1))
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in _NO_FILE:
            raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
        raise Damaged(f"{path} is damaged: {error.strerror}") from None
    if len(content) > most:
        raise Damaged(f"{path} is damaged: it has more than {most:,} bytes")
    return content


def read_arrays(
    path: Path, kinds: Mapping[str, str] | None = None
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays of an .npz file, without unpickling; with `kinds` those that it names.

    `kinds` gives the kind (numpy's letter) and the number of dimensions of each, such as "f2"; all
    must have the same length. Raises FileNotFoundError if there is no file, Damaged if it is not
    whole or would not fit into memory.
    """
    try:
        with open_for_reading(path) as handle:
            with zipfile.ZipFile(handle) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
            if size > MAX_ARRAY_BYTES:
                raise Damaged(f"{path} is damaged: it would decompress to {size:,} bytes")
            handle.seek(0)
            with np.load(handle, allow_pickle=False) as loaded:
                arrays = {name: loaded[name] for name in kinds or loaded.files}
    except (FileNotFoundError, Damaged):
        raise
    except Exception as error:  # numpy and zipfile refuse a damaged file in a dozen ways
        raise Damaged(f"{path} is damaged: {first_line(error)}") from None
    for name, kind in (kinds or {}).items():
        found = f"{arrays[name].dtype.kind}{arrays[name].ndim}"
        if found != kind:
            raise Damaged(f"{path} is damaged: {name} is {arrays[name].dtype}{arrays[name].shape}")
    if kinds and len({len(array) for array in arrays.values()}) > 1:
        raise Damaged(f"{path} is damaged: its arrays differ in length")
    return arrays
