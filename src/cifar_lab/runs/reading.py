"""Reading files that anybody may have written: regular files of a plausible size, checked."""

import errno
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cifar_lab.errors import Damaged, first_line
from cifar_lab.runs.atomic_io import open_for_reading

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
