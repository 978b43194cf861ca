"""Files that a crash leaves whole, and reading of files that anybody may have written.

They are replaced at once, grown by appending, synced, locked. Nothing here writes through a link
that somebody has put in place of a file, or reads more than a run writes.
"""

import contextlib
import errno
import hashlib
import io
import os
import secrets
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from cifar_lab.errors import Damaged, UsageError, first_line, shorten_path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that becomes `path` when the block ends well, and vanishes if not."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
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
    if os.name != "nt":  # where folders cannot be opened
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            _fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole."""
    with replacing(path) as handle:
        handle.write(text.encode("utf-8", "backslashreplace"))  # a lone surrogate has no bytes


def append_text(path: Path, text: str, *, safely: bool = True) -> None:
    """Append to a text file; with `safely` the text is on the disk when this returns."""
    try:
        with open_for_appending(path) as handle:
            handle.write(text.encode("utf-8", "backslashreplace"))
            if safely:
                sync_file(handle)
    except OSError as error:
        error.filename = str(path)
        raise


def open_for_reading(path: Path) -> IO[bytes]:
    """Open a file to read its bytes; OSError for a device or a pipe, which may have no end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.open("rb")


def open_for_appending(path: Path, *, anew: bool = False) -> IO[bytes]:
    """Open (or create) a file to add bytes at its end, or to lock it; `anew` replaces it.

    Raises OSError for a link, which could lead to any file.
    """
    if anew:
        path.unlink(missing_ok=True)

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)

    return open(path, "a+b", opener=opener)


def check_inside(path: Path, folder: Path) -> Path:
    """Return a path that is to be written; UsageError if it leads out of a run's folder."""
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        where = shorten_path(folder)
        raise UsageError(f"{shorten_path(path)} is not inside the run's folder {where}")
    return path


def sync_file(handle: IO[bytes]) -> None:
    """Make what was written to an open file survive a power loss."""
    handle.flush()
    _fsync(handle.fileno())


def _fsync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems sync no folders, or nothing at all
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def try_lock(handle: IO[Any], *, exclusive: bool = True) -> bool | None:
    """Take the lock of an open file, which the system releases when the file is closed.

    Returns False if another process has it, and None where the file system has no locks, as some
    network file systems: two processes may do the same work there.
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
        return None
    return True


MAX_BYTES = 2**27
"""The most bytes that a text file of a run has; a larger one is not ours."""

MAX_ARRAY_BYTES = 2**30
"""The most bytes that the arrays of an .npz file have, decompressed."""


def read_bytes(path: Path) -> bytes:
    """Return the content of a text file of a run.

    Raises FileNotFoundError if there is none; Damaged for a folder, a pipe or a device in its
    place, and for a file that is far larger than any that a run writes.
    """
    try:
        with open_for_reading(path) as handle:
            content = handle.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
    except OSError as error:
        raise Damaged(f"{path} is damaged: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise Damaged(f"{path} is damaged: it has more than {MAX_BYTES:,} bytes")
    return content


def read_arrays(
    path: Path, kinds: Mapping[str, str] | None = None
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays of a run's .npz file, or those that `kinds` names, without unpickling.

    `kinds` gives the kind (numpy's letter) and the number of dimensions of each, such as "f2"; all
    must have the same length. Raises UsageError if there is no file, Damaged if it is not whole or
    would not fit into memory.
    """
    kinds = kinds or {}
    try:
        with open_for_reading(path) as handle:
            with zipfile.ZipFile(handle) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
            if size > MAX_ARRAY_BYTES:
                raise ValueError(f"it would decompress to {size:,} bytes")
            handle.seek(0)
            with np.load(handle, allow_pickle=False) as loaded:
                arrays = {name: loaded[name] for name in kinds or loaded.files}
        for name, kind in kinds.items():
            if f"{arrays[name].dtype.kind}{arrays[name].ndim}" != kind:
                raise ValueError(f"{name} is {arrays[name].dtype}{arrays[name].shape}")
        if kinds and len({len(array) for array in arrays.values()}) > 1:
            raise ValueError("its arrays differ in length")
    except FileNotFoundError:
        raise UsageError(
            f"{path} is missing; `python -m cifar_lab.evaluate {path.parent}` creates it"
        ) from None
    except Exception as error:  # numpy and zipfile refuse a damaged file in a dozen ways
        raise Damaged(f"{path} is damaged: {first_line(error)}") from None
    return arrays


# --- checkpoints: tensors and plain values, so that reading one cannot run code -------------------

CHECKPOINT_FORMAT = 1


def save_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Replace a checkpoint as a whole."""
    import torch

    # Through memory: on a full disk torch's own writer raises no OSError.
    buffer = io.BytesIO()
    torch.save({"format": CHECKPOINT_FORMAT, **state}, buffer)
    with replacing(path) as handle:
        handle.write(buffer.getbuffer())


def weights_checksum(weights: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a model's tensors, with their names, shapes and types."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_entries(handle: IO[bytes]) -> None:
    """Raise ValueError if a zip file of torch.save is damaged or takes more memory than its size.

    torch compresses nothing; a stranger's entry could unpack to a thousand times as much, and many
    entries could share their bytes.
    """
    with zipfile.ZipFile(handle) as archive:
        entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > os.fstat(handle.fileno()).st_size:
            raise ValueError("its entries are compressed or overlap")
        if broken := archive.testzip():
            raise ValueError(f"the checksum of {broken} is wrong")
    handle.seek(0)


def load_checkpoint(path: Path, *, most: int | None = None) -> dict[str, Any]:
    """Return a checkpoint's tensors and plain values, on the CPU.

    Raises Damaged if a bit of the file is wrong or it is not a checkpoint, or if it would take more
    memory than its own size, or than `most` bytes; and UsageError if a newer version wrote it.
    """
    import torch

    try:
        with open_for_reading(path) as handle:
            size = os.fstat(handle.fileno()).st_size
            if most is not None and size > most:
                raise ValueError(f"{size:,} bytes are too many for its model")
            check_entries(handle)
            state: dict[str, Any] = torch.load(handle, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except Exception as error:  # torch.load refuses a damaged file in many ways
        raise Damaged(f"{path} is damaged: {first_line(error)}") from None
    found = state.get("format") if isinstance(state, dict) else None
    if not isinstance(found, int):
        raise Damaged(f"{path} is not a checkpoint of cifar_lab")
    if found > CHECKPOINT_FORMAT:
        raise UsageError(
            f"{path} has format {found}, this version reads up to {CHECKPOINT_FORMAT}: "
            "use the newer cifar_lab that wrote it"
        )
    return state
