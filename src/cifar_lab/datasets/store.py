"""The data folder: where it is, its locks, its cache of decoded arrays, and how it is filled."""

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_lab.datasets import ARRAYS, ImageArrays
from cifar_lab.datasets.download import SourceFailed, TooSlow
from cifar_lab.errors import Unavailable, UsageError, first_line, shorten, shorten_path
from cifar_lab.runs.atomic_io import open_for_appending, remove_leftovers, replacing, try_lock

log = logging.getLogger("cifar_lab")


@dataclass(frozen=True)
class Source:
    """One place that may have a dataset.

    `get(patient)` returns the decoded arrays, or None if there is nothing. It raises SourceFailed
    with the reason in a few words, or, unless it is to be patient, TooSlow. `remedy` is what the
    user can do so that this source has the data.
    """

    name: str
    get: Callable[[bool], ImageArrays | None]
    local: bool = False
    remedy: str | None = None


def user_path(setting: str, path: str) -> Path:
    """Return the path that a setting names, ~ replaced; UsageError if it names nobody's folder."""
    try:
        expanded = Path(path).expanduser()
        expanded.exists()
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise UsageError(f"{setting}={shorten(path)} is wrong: {why}") from None
    return expanded


def data_root() -> Path:
    """Return the folder of all datasets: CIFAR_LAB_DATA, else one in the user's cache folder."""
    chosen = os.environ.get("CIFAR_LAB_DATA", "").strip()
    if chosen:
        root = user_path("CIFAR_LAB_DATA", chosen).absolute()
        if root.exists() and not root.is_dir():
            named = shorten_path(Path(chosen))
            raise UsageError(f"CIFAR_LAB_DATA={named}: it is a file; it must be a folder")
        return root
    cache = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    if sys.platform == "darwin" or not cache:
        folder = {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache")
        try:
            cache = str(Path.home() / folder)
        except RuntimeError:  # there is no HOME, and this user has no entry in passwd
            raise UsageError(
                "no home folder was found for the data; set CIFAR_LAB_DATA to a folder"
            ) from None
    return Path(cache) / "cifar_lab"


def files_digest(path: Path) -> str | None:
    """Return a digest of the names, sizes and times of the files at a path; None if it is missing.

    Two equal digests spare reading the files; their content may still be the same if they differ.
    """
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    try:
        for file in files:
            state = file.stat()
            name = file.relative_to(path).as_posix()
            digest.update(f"{name}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    except OSError:
        return None
    return digest.hexdigest()


def obtain(
    name: str,
    root: Path,
    checksums: Mapping[str, str],
    find_sources: Callable[[], Sequence[Source]],
) -> ImageArrays:
    """Return a dataset from the decoded cache, else from the first of its sources that has it.

    `checksums` are the sha256 of the decoded arrays in C order, by the name of the array. Without
    them, each source verifies its own content, and the cache is compared with what was decoded
    first. Processes that ask at the same time download once. Raises Unavailable if no source has
    the dataset, UsageError if the data folder has no valid copy and cannot be written.
    """
    folder = root / "decoded" / name
    try:
        cached = read_cache(folder, checksums)
    except _Damaged:
        cached = None  # Another process may be writing it: it is read again below, with the lock.
    if cached is not None:
        return cached
    with locked(folder.with_name(f"{name}.lock"), name) as not_writable:
        try:
            cached = read_cache(folder, checksums)
        except _Damaged as damaged:
            log.warning("%s is damaged (%s); decoding the dataset again", damaged.path, damaged.why)
            cached = None
        if cached is not None:
            return cached
        arrays = _from_sources(name, root, checksums, find_sources(), not_writable)
        if not_writable:
            return arrays
        try:
            write_cache(folder, arrays)
        except OSError as error:
            log.warning("%s cannot be cached in %s: %s", name, folder, error.strerror)
            return arrays
        del arrays  # Before they are mapped: a second copy would double the peak of memory.
        try:
            cached = read_cache(folder, checksums)
        except _Damaged as damaged:
            raise Unavailable(
                f"{damaged.path} does not read back as it was written ({damaged.why}); "
                "check the disk or set CIFAR_LAB_DATA to a folder on another one"
            ) from damaged
        assert cached is not None
        return cached


def _from_sources(
    name: str,
    root: Path,
    checksums: Mapping[str, str],
    sources: Sequence[Source],
    not_writable: str,
) -> ImageArrays:
    """Ask each source in turn, and the slow ones again after the others."""
    usable = [source for source in sources if source.local or not not_writable]
    waiting = [(source, index == len(usable) - 1) for index, source in enumerate(usable)]
    tried: list[str] = []
    while waiting:
        source, patient = waiting.pop(0)
        try:
            arrays = source.get(patient)
            if arrays is None:
                continue
            for array, digest in arrays.checksums.items():
                if checksums.get(array, digest) != digest:
                    raise SourceFailed(f"its {array} have a wrong sha256 ({digest[:8]}...)")
        except TooSlow as slow:
            log.warning("%s: %s; trying the other sources first", source.name, slow)
            waiting.append((source, True))
        except (SourceFailed, OSError) as failed:
            log.warning("%s: %s", source.name, failed)
            tried.append(f"{source.name}: {failed}")
        else:
            log.info("%s: from %s", name, source.name)
            return arrays
    if not_writable:
        raise UsageError(
            f"the data folder {root} has no valid copy of {name} and cannot be written "
            f"({not_writable}); set CIFAR_LAB_DATA to a writable folder"
        )
    remedies = [source.remedy for source in sources if source.remedy]
    remedies.append("set CIFAR_LAB_DATA to a folder that has it")
    raise Unavailable(
        f"{name} is not in {root} and could not be downloaded "
        f"(tried {'; '.join(tried) or 'nothing: it has no source'}); {', or '.join(remedies)}"
    )


class _Damaged(Exception):
    def __init__(self, path: Path, why: str) -> None:
        super().__init__(path, why)
        self.path, self.why = path, why


def read_cache(folder: Path, checksums: Mapping[str, str]) -> ImageArrays | None:
    """Map the decoded arrays of a folder into memory and verify them.

    Returns None if there are none. Raises an error if they are damaged.
    """
    index = folder / "contents.json"
    try:
        contents = read_record(index)
        forms = {name: contents["forms"][name] for name in ARRAYS}
        expected = {name: checksums.get(name, contents["sha256"][name]) for name in ARRAYS}
        class_names = tuple(contents["class_names"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _Damaged(index, str(error)) from error
    mapped = {}
    for name in ARRAYS:
        path = folder / f"{name}.npy"
        try:
            # Copy on write: the pages are shared, and torch.from_numpy takes them without a copy.
            mapped[name] = np.load(path, mmap_mode="c", allow_pickle=False)
        except Exception as error:
            # numpy evaluates the header, and a damaged one raises errors of a dozen kinds.
            raise _Damaged(path, first_line(error)) from error
        if _form(mapped[name]) != forms[name]:
            raise _Damaged(path, "its shape does not match")
    arrays = ImageArrays(**mapped, class_names=class_names)
    for name in ARRAYS:
        if arrays.checksums[name] != expected[name]:
            raise _Damaged(folder / f"{name}.npy", "its sha256 does not match")
    return arrays


def write_cache(folder: Path, arrays: ImageArrays) -> None:
    """Write the decoded arrays; contents.json comes last, so that what it names is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    contents = {
        "class_names": list(arrays.class_names),
        "forms": {name: _form(getattr(arrays, name)) for name in ARRAYS},
        "sha256": arrays.checksums,
    }
    for name in ARRAYS:
        with replacing(folder / f"{name}.npy") as file:
            np.save(file, np.ascontiguousarray(getattr(arrays, name)), allow_pickle=False)
    write_record(folder / "contents.json", contents)


def write_record(path: Path, contents: Mapping[str, Any]) -> None:
    """Replace a JSON file by plain contents and their checksum."""
    record = {"contents": contents, "sha256": _sha256_of_json(contents)}
    with replacing(path) as file:
        file.write(json.dumps(record, indent=1).encode())


def read_record(path: Path) -> Any:
    """Return the contents of such a file; OSError, ValueError, KeyError or TypeError if damaged."""
    record = json.loads(path.read_bytes())
    if record["sha256"] != _sha256_of_json(record["contents"]):
        raise ValueError("its checksum does not match")
    return record["contents"]


def _form(array: NDArray[np.generic]) -> list[object]:
    return [array.dtype.str, *array.shape]


def _sha256_of_json(contents: object) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


@contextmanager
def locked(path: Path, name: str) -> Iterator[str]:
    """Hold the lock of a dataset; yield "", or the reason why the data folder is not writable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open_for_appending(path)
    except OSError as error:
        yield error.strerror or str(error)
        return
    with file:
        waiting = False
        while not try_lock(file):
            if not waiting:
                log.warning("waiting for another process that prepares %s in %s", name, path.parent)
            waiting = True
            time.sleep(0.1)
        yield ""
