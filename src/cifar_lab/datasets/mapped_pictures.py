"""Pictures that are decoded once, into files that are mapped.

Below the data folder there are, for each folder of pictures and way to decode them, an index
`decoded/pictures/<hash>.json` with the state of the files (names, sizes, times) and a key, and the
cache `decoded/pictures/<key>/`. The key is a hash of the pictures' content. The cache holds the
pixels of each set in C order, and `contents.json`, which is written last.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cifar_lab.datasets import ImageArrays, sha256
from cifar_lab.datasets.picture_sets import SETS, BrokenPictures, PictureSets
from cifar_lab.datasets.pictures import Unreadable, read_content
from cifar_lab.datasets.store import locked, read_record, write_record
from cifar_lab.errors import Unavailable, UsageError
from cifar_lab.runs.atomic_io import open_for_appending, remove_leftovers, replacing, try_lock

log = logging.getLogger("cifar_lab")

_FORMAT = 1  # of the cache; another number makes every cache anew
_BLOCK = 1 << 20


class _Damaged(Exception):
    """A cache is not what was written."""


def load_mapped(root: Path, sets: PictureSets) -> ImageArrays:
    """Return the images of the sets as maps of files below `root`, decoded if they are not there.

    Processes that ask at the same time decode once. Raises UsageError if pictures are broken or
    `root` cannot be written, Unavailable if the disk is too small or a picture changes meanwhile.
    """
    caches = root / "decoded" / "pictures"
    index = caches / f"{_hash(_request(sets))}.json"
    state = _files_state(sets)
    known = _read_index(index)
    unchanged = known is not None and known["files"] == state
    digests = None if unchanged else _content_digests(sets)
    key = known["key"] if known is not None and digests is None else _key(sets, digests or {})
    folder = caches / key
    if unchanged:
        try:
            cached = _read(folder, sets)
        except _Damaged:
            cached = None  # Another process may be writing it: it is read again with the lock.
        if cached is not None:
            return cached
    with locked(caches / f"{key}.lock", f"the pictures in {sets.folder}") as not_writable:
        if not_writable:
            raise UsageError(
                f"the pictures in {sets.folder} are mapped from a file in {caches}, which cannot "
                f"be written ({not_writable}); set CIFAR_LAB_DATA to another folder, or "
                "dataset.storage=memory"
            )
        if not unchanged:
            write_record(index, {"files": state, "key": key})
            if known is not None and known["key"] != key:
                _remove_unused(caches, known["key"])
        try:
            cached = _read(folder, sets)
        except _Damaged as damaged:
            log.warning("%s is damaged (%s); decoding the pictures again", folder, damaged)
            cached = None
        if cached is not None:
            return cached
        _decode_into(folder, sets, digests or _content_digests(sets))
        try:
            cached = _read(folder, sets)
        except _Damaged as damaged:
            raise Unavailable(
                f"{folder} does not read back as it was written ({damaged}); check the disk or "
                "set CIFAR_LAB_DATA to a folder on another one"
            ) from damaged
        assert cached is not None
        return cached


def _decode_into(folder: Path, sets: PictureSets, digests: dict[str, list[str]]) -> None:
    """Decode all pictures into the files of a cache; the caller has its lock."""
    size = f"{sets.nbytes / 1e9:,.1f} GB"
    remedy = "set CIFAR_LAB_DATA to a folder on another disk, or dataset.storage=memory"
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    (folder / "contents.json").unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    if free < sets.nbytes:
        raise Unavailable(
            f"the pictures in {sets.folder} take {size} decoded, but {folder.parent} has "
            f"{free / 1e9:,.1f} GB left; {remedy}"
        )
    log.info("decoding %s pictures once into %s (%s)", f"{len(sets):,}", folder, size)
    broken = BrokenPictures(sets)
    checksums = {}
    try:
        for name in SETS:
            digest = hashlib.sha256()
            with replacing(_pixels_file(folder, name)) as file:
                for position, picture in enumerate(sets.decode(name, broken)):
                    if picture.sha256 != digests[name][position]:
                        raise Unavailable(
                            f"{sets.paths[name][position]} has changed while it was read; run "
                            "the command again when the pictures are complete"
                        )
                    if picture.pixels is not None:
                        file.write(picture.pixels.data)
                        digest.update(picture.pixels.data)
            checksums[name] = digest.hexdigest()
    except OSError as error:
        raise Unavailable(f"{folder} cannot be written: {error.strerror}; {remedy}") from error
    broken.check()
    _write_contents(folder, checksums, broken.found)


def _write_contents(
    folder: Path, checksums: dict[str, str], broken: dict[str, dict[int, str]]
) -> None:
    contents = {
        "sha256": checksums,
        "states": {name: _state(_pixels_file(folder, name)) for name in SETS},
        "broken": {name: {str(i): why for i, why in broken[name].items()} for name in SETS},
    }
    write_record(folder / "contents.json", contents)


def _read(folder: Path, sets: PictureSets) -> ImageArrays | None:
    """Map the files of a cache; None if there is none. Raises _Damaged, or UsageError as decoding.

    A file whose size and time are those that were noted is taken as it is; else its checksum is
    computed.
    """
    index = folder / "contents.json"
    try:
        contents = read_record(index)
        checksums, states = dict(contents["sha256"]), dict(contents["states"])
        broken = {
            name: {int(i): str(why) for i, why in contents["broken"][name].items()} for name in SETS
        }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Damaged(f"{index.name}: {error}") from error
    labels = {name: sets.remaining_labels(name, broken[name]) for name in SETS}
    images = {name: _map(folder, name, (len(labels[name]), *sets.image_shape)) for name in SETS}
    moved = False
    for name in SETS:
        path = _pixels_file(folder, name)
        if _state(path) != states.get(name):
            if _sha256_of_file(path) != checksums[name]:
                raise _Damaged(f"the sha256 of {path.name} does not match")
            moved = True
    if moved:
        try:
            _write_contents(folder, checksums, broken)
        except OSError as error:
            log.warning("%s cannot be written: %s", index, error.strerror)
    warnings = BrokenPictures(sets, broken).check()
    known = {f"{name}_images": checksums[name] for name in SETS}
    known |= {f"{name}_labels": sha256(labels[name]) for name in SETS}
    return ImageArrays(
        images["train"],
        labels["train"],
        images["test"],
        labels["test"],
        sets.class_names,
        mapped=True,
        known_checksums=known,
        warnings=warnings,
    )


def _map(folder: Path, name: str, shape: Sequence[int]) -> NDArray[np.uint8]:
    path = _pixels_file(folder, name)
    try:
        if path.stat().st_size != prod(shape):
            raise _Damaged(f"{path.name} has {path.stat().st_size:,} bytes, not {prod(shape):,}")
        # Not copy on write: Linux refuses such a map where it is larger than the memory.
        return np.memmap(path, dtype=np.uint8, mode="r", shape=tuple(shape))
    except OSError as error:
        raise _Damaged(f"{path.name}: {error.strerror}") from error


def _remove_unused(caches: Path, key: str) -> None:
    """Remove the cache of pictures that have changed, unless others use it.

    What a process has mapped stays there for it.
    """
    indices = (_read_index(path) for path in caches.glob("*.json"))
    if any(index is not None and index["key"] == key for index in indices):
        return
    with open_for_appending(caches / f"{key}.lock") as lock:
        if try_lock(lock):
            shutil.rmtree(caches / key, ignore_errors=True)


def _read_index(path: Path) -> dict[str, str] | None:
    try:
        contents = read_record(path)
        return {"files": str(contents["files"]), "key": str(contents["key"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _request(sets: PictureSets) -> list[Any]:
    """Return what says which pictures are asked for, and how they are decoded."""
    return [str(sets.folder.resolve()), *_decoding(sets), sets.test_fraction]


def _decoding(sets: PictureSets) -> list[Any]:
    from PIL import __version__

    return [_FORMAT, __version__, list(sets.image_shape), sets.fit]


def _key(sets: PictureSets, digests: dict[str, list[str]]) -> str:
    """Return the hash of all that decides the bytes of a cache."""
    labels = {name: sets.labels[name].tolist() for name in SETS}
    return _hash([*_decoding(sets), sets.class_names, labels, digests])


def _content_digests(sets: PictureSets) -> dict[str, list[str]]:
    """Return the sha256 of each file, "" for one that cannot be read."""
    digests: dict[str, list[str]] = {name: [] for name in SETS}
    with tqdm(total=len(sets), desc="reading", unit="picture", disable=None) as bar:
        for name in SETS:
            for path in sets.paths[name]:
                try:
                    digests[name].append(hashlib.sha256(read_content(path)).hexdigest())
                except Unreadable:
                    digests[name].append("")
                bar.update()
    return digests


def _files_state(sets: PictureSets) -> str:
    """Return a hash of names, sizes, times and places on the disk: equal ones spare reading.

    The time of change (ctime) is there because a copy can keep the time of modification.
    """
    states: dict[str, list[Any]] = {name: [] for name in SETS}
    for name in SETS:
        for path in sets.paths[name]:
            try:
                state = path.stat()
                numbers = (state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
            except OSError:
                numbers = (-1, -1, -1, -1)
            states[name].append([path.relative_to(sets.folder).as_posix(), *numbers])
    return _hash(states)


def _sha256_of_file(path: Path) -> str:
    """Return the sha256 of a file, read in blocks: a map would stay in memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _pixels_file(folder: Path, name: str) -> Path:
    return folder / f"{name}_images.bin"


def _state(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
