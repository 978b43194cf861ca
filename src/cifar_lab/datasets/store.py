"""The data folder: where it is, its locks, and the datasets that were decoded into it.

A decoded dataset is a folder with the bytes of each array in C order, and `contents.json`, which is
written last and says what they are. Whoever asks maps the files into memory.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_lab.datasets import ARRAYS, ImageArrays, equal_images
from cifar_lab.errors import Unavailable, UsageError, first_line, log, shorten
from cifar_lab.runs.files import open_for_appending, replacing, try_lock, write_text

_DAY = 24 * 3600
_PART = 1 << 16  # bytes of each sample of a file

Facts = dict[str, Any]
"""What a decoded dataset holds beside its arrays: fields of ImageArrays, of plain values."""

Add = Callable[[str, Iterable[NDArray[Any]]], None]
"""Stores an array under its name; it comes in parts, and only one of them is in memory."""

Decode = Callable[[Add], Facts]
"""Adds each array of a dataset, and returns what it holds beside them."""


def add_arrays(arrays: ImageArrays, add: Add) -> Facts:
    """Add the arrays of a dataset that is in memory."""
    for name in ARRAYS:
        add(name, [getattr(arrays, name)])
    return {"class_names": arrays.class_names}


def user_path(setting: str, path: str | None, right: str = "") -> Path:
    """Return the path that a setting names, ~ replaced.

    Raises UsageError if there is none, which says what is `right`, or if it is in nobody's folder.
    """
    if not path:
        raise UsageError(f"{setting} is missing; give {right}")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{setting}={shorten(path)} is wrong: {first_line(error)}") from None


def data_root() -> Path:
    """Return the folder of all datasets: CIFAR_LAB_DATA, else one in the user's cache folder."""
    chosen = os.environ.get("CIFAR_LAB_DATA", "").strip()
    if chosen:
        return user_path("CIFAR_LAB_DATA", chosen).absolute()
    cache = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    if sys.platform == "darwin" or not cache:
        folder = {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache")
        cache = str(Path.home() / folder)
    return Path(cache) / "cifar_lab"


def files_digest(path: Path, files: Sequence[Path] = ()) -> str | None:
    """Return a digest of the names, sizes and times of the files at a path, None if it is missing.

    Of all of them, or of those that are given. Two equal digests spare reading the files; their
    content may still be the same if they differ.
    """
    if not path.exists():
        return None
    digest = hashlib.sha256()
    for file in files or sorted(path.rglob("*") if path.is_dir() else [path]):
        text = file.relative_to(path).as_posix()
        with contextlib.suppress(OSError):  # a link to nowhere
            state = file.stat()
            # A copy can keep the time of modification, but not that of the change (ctime).
            text += f"\0{state.st_size}\0{state.st_mtime_ns}\0{state.st_ctime_ns}"
        # A name that is not UTF-8 has surrogates for its bytes.
        digest.update(f"{text}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def cached(
    folder: Path,
    key: str,
    decode: Decode,
    what: str,
    *,
    checksums: Mapping[str, str] | None = None,
    mapped: bool = False,
) -> ImageArrays:
    """Return the dataset `what` that was decoded into a folder with this key, or decode it now.

    Arrays are verified by their sha256: those in `checksums`, or those that were noted when they
    were decoded. Processes that ask at the same time decode once. Where the folder cannot be
    written, the dataset is decoded into a temporary one, for this process alone.

    `mapped`: it may be larger than the memory, and must be on disk. Then samples of each file are
    compared at each start, and all of it once a day, or if the environment variable
    CIFAR_LAB_VERIFY is set. Raises Unavailable if the folder of a mapped dataset cannot be
    written.
    """
    known = checksums or {}
    with contextlib.suppress(_Damaged):  # Or is it being written? It is read again with the lock.
        if arrays := _read(folder, key, known, mapped):
            return arrays
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open_for_appending(folder.with_name(f"{folder.name}.lock")) as lock:
            if try_lock(lock) is False:
                log.warning("waiting for another process that prepares %s", what)
                while try_lock(lock) is False:
                    time.sleep(0.1)
            try:
                if arrays := _read(folder, key, known, mapped):
                    return arrays
            except _Damaged as damaged:
                log.warning("%s; decoding the dataset again", damaged)
            return _decode_into(folder, key, decode, known, mapped)
    except OSError as error:  # such as a folder of somebody else, or a full disk
        if mapped:
            raise Unavailable(
                f"{what} are mapped from a file in {folder.parent}, which cannot be written "
                f"({error.strerror}); set CIFAR_LAB_DATA to another folder, or "
                "dataset.storage=memory"
            ) from error
        log.warning("%s cannot be cached in %s: %s", what, folder.parent, error.strerror)
    # What is mapped stays when the files are gone (but on Windows, where the files stay).
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        return _decode_into(Path(temporary) / "decoded", key, decode, known, mapped)


class _Damaged(Unavailable):
    """A file is not what was written; the message names it."""


def _read(folder: Path, key: str, checksums: Mapping[str, str], mapped: bool) -> ImageArrays | None:
    """Map the arrays of a folder into memory and verify them; None if there are none.

    `mapped` arrays are verified as `cached` says.
    """
    index, note = folder / "contents.json", folder / "verified"
    if not index.exists():
        return None
    try:
        facts = json.loads(index.read_bytes())
        if facts.pop("key") != key:
            return None
        asked = os.environ.get("CIFAR_LAB_VERIFY", "").strip()
        due = not note.exists() or time.time() - note.stat().st_mtime > _DAY
        everything = bool(not mapped or asked or due)
        entries = facts.pop("arrays")
        known = {name: checksums.get(name, entries[name]["sha256"]) for name in ARRAYS}
        for name in ARRAYS:
            path, entry = folder / f"{name}.bin", entries[name]
            # Of the file and not of the map, whose pages would stay in memory.
            if everything and not file_matches(path, known[name]):
                raise _Damaged(f"{path} is damaged (its sha256 does not match)")
            if not everything and _sample(path) != entry["sample"]:
                raise _Damaged(f"{path} is damaged (the sha256 of samples of it does not match)")
            facts[name] = _map(path, entry, mapped)
        if mapped and everything:
            with contextlib.suppress(OSError):  # in a folder of somebody else
                note.touch()
        for name in ("class_names", "warnings"):
            facts[name] = tuple(facts.get(name, ()))  # a list in the file
        verified = "all" if everything else "samples"
        return ImageArrays(**facts, mapped=mapped, verified=verified, known_checksums=known)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Damaged(f"{index} is damaged ({first_line(error)})") from error


def file_matches(path: Path, digest: str) -> bool:
    """Whether the file exists and has this md5 or sha256."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        algorithm = "md5" if len(digest) == 32 else "sha256"
        return hashlib.file_digest(file, algorithm).hexdigest() == digest


def _sample(path: Path) -> str:
    """Return the sha256 of 64 parts of a file, at equal distances from its start to its end."""
    last = max(path.stat().st_size - _PART, 0)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for number in range(64):
            file.seek(number * last // 63)
            digest.update(file.read(_PART))
    return digest.hexdigest()


def _map(path: Path, entry: Mapping[str, Any], mapped: bool) -> NDArray[Any]:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if np.dtype(dtype).kind not in "iu":  # an array of objects would be one of addresses in memory
        raise ValueError(f"{path.name} holds {dtype}")
    # Copy on write: the pages are shared, and torch.from_numpy takes them without a copy. But Linux
    # refuses such a map where it is larger than the memory.
    try:
        return np.memmap(path, dtype=dtype, mode="r" if mapped else "c", shape=shape)
    except OSError as error:
        if error.errno != errno.ENODEV:  # this file system maps nothing
            raise
        return np.fromfile(path, dtype=dtype).reshape(shape)


def _decode_into(
    folder: Path, key: str, decode: Decode, checksums: Mapping[str, str], mapped: bool
) -> ImageArrays:
    """Decode a dataset into the files of a folder and read it; the caller has its lock."""
    entries: dict[str, dict[str, Any]] = {}

    def add(name: str, parts: Iterable[NDArray[Any]]) -> None:
        if not entries:  # What may be there is damaged, unfinished, or of an earlier version.
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
        digest, rows, dtype, row_shape = hashlib.sha256(), 0, "|u1", ()
        path = folder / f"{name}.bin"
        with replacing(path) as file:
            for part in parts:
                content = np.ascontiguousarray(part).data
                file.write(content)
                digest.update(content)
                rows, dtype, row_shape = rows + len(part), part.dtype.str, part.shape[1:]
        state = {"sha256": digest.hexdigest(), "sample": _sample(path)}
        entries[name] = {"dtype": dtype, "shape": [rows, *row_shape], **state}

    try:
        facts = decode(add)
        sets = ("train_images", "test_images")
        images = [_map(folder / f"{name}.bin", entries[name], mapped) for name in sets]
        facts["known_equal"] = equal_images(*images)  # once, since that reads all of them
        contents = {"key": key, **facts, "arrays": entries}
        write_text(folder / "contents.json", json.dumps(contents, indent=1))
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    arrays = _read(folder, key, checksums, mapped)
    assert arrays is not None
    return arrays
