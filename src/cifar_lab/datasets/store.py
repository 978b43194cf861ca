"""The data folder: its place, its lock, its cache of decoded arrays, and how it gets filled."""

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

import numpy as np
from numpy.typing import NDArray

from cifar_lab.datasets import ImageArrays
from cifar_lab.datasets.download import SourceFailed, TooSlow
from cifar_lab.errors import NotNow, RequestError
from cifar_lab.files import remove_leftovers, replacing, try_lock

log = logging.getLogger("cifar_lab")

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True)
class Source:
    """One place that may have a dataset.

    `get(patient)` returns the decoded arrays, or None where there is nothing, and raises
    SourceFailed with the reason in a few words, or TooSlow if it was not to be patient.
    """

    name: str
    get: Callable[[bool], ImageArrays | None]
    local: bool = False


def data_root() -> Path:
    """Return the folder of all datasets: CIFAR_LAB_DATA, else one in the user's cache folder."""
    chosen = os.environ.get("CIFAR_LAB_DATA", "").strip()
    if chosen:
        root = Path(chosen).expanduser().absolute()
        if root.exists() and not root.is_dir():
            raise RequestError(f"CIFAR_LAB_DATA={chosen}: it is a file; it must be a folder")
        return root
    if sys.platform == "win32":
        cache = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "cifar_lab"


def obtain(
    name: str,
    root: Path,
    checksums: Mapping[str, str],
    sources: Callable[[], Sequence[Source]],
    way_out: str = "",
) -> ImageArrays:
    """Return a dataset from the decoded cache, else from the first of its sources that is right.

    `checksums` are sha256 of the decoded arrays in C order, by the name of the array; without
    them, each source vouches for its own content, and the cache is held to what was first decoded.
    Processes that ask at the same time fetch once. `way_out` says in the message of a failure what
    one can do by hand. Raises NotNow if no source has it, RequestError if nothing can be written.
    """
    folder = root / "decoded" / name
    try:
        cached = read_cache(folder, checksums)
    except _Damaged:
        cached = None  # Another process may be writing it: judged again below, under the lock.
    if cached is not None:
        return cached
    with _locked(folder.with_name(f"{name}.lock"), name) as refused:
        try:
            cached = read_cache(folder, checksums)
        except _Damaged as damaged:
            log.warning("%s is damaged (%s): making it anew", damaged.path, damaged.why)
            cached = None
        if cached is not None:
            return cached
        tried: list[str] = []
        arrays = _first_right(
            [source for source in sources() if source.local or not refused], checksums, tried
        )
        if arrays is None and refused:
            raise RequestError(
                f"the data folder {root} has no sound {name} and cannot be written ({refused}); "
                "set CIFAR_LAB_DATA to a folder that can"
            )
        if arrays is None:
            raise NotNow(
                f"{name} is not in {root} and could not be fetched "
                f"(tried {'; '.join(tried) or 'nothing: there is no source'}); {way_out}"
                "set CIFAR_LAB_DATA to a folder that has it"
            )
        if refused:
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
            raise NotNow(
                f"{damaged.path} reads back other than it was written ({damaged.why}); "
                "check the disk or set CIFAR_LAB_DATA to another"
            ) from damaged
        assert cached is not None
        return cached


def _first_right(
    sources: Sequence[Source], checksums: Mapping[str, str], tried: list[str]
) -> ImageArrays | None:
    """Ask each source in turn, the slow ones again at the end; `tried` takes down what failed."""
    waiting = [(source, index == len(sources) - 1) for index, source in enumerate(sources)]
    while waiting:
        source, patient = waiting.pop(0)
        try:
            arrays = source.get(patient)
            if arrays is None:
                continue
            for array, digest in array_checksums(arrays).items():
                if checksums.get(array, digest) != digest:
                    raise SourceFailed(f"its {array} are not the right ones (sha256 {digest[:8]})")
        except TooSlow as slow:
            log.warning("%s: %s; trying the other sources first", source.name, slow)
            waiting.append((source, True))
        except (SourceFailed, OSError) as failed:
            log.warning("%s: %s", source.name, failed)
            tried.append(f"{source.name}: {failed}")
        else:
            log.info("%s", source.name)
            return arrays
    return None


def array_checksums(arrays: ImageArrays) -> dict[str, str]:
    """Return the sha256 of each array, C order, by its name."""
    return {name: _sha256(getattr(arrays, name)) for name in ARRAYS}


class _Damaged(Exception):
    def __init__(self, path: Path, why: str) -> None:
        super().__init__(path, why)
        self.path, self.why = path, why


def read_cache(folder: Path, checksums: Mapping[str, str]) -> ImageArrays | None:
    """Map the decoded arrays of a folder into memory and verify them; None if there are none."""
    index = folder / "contents.json"
    try:
        record = json.loads(index.read_bytes())
        contents = record["contents"]
        if record["sha256"] != _sha256_of_json(contents):
            raise _Damaged(index, "its checksum does not match")
        forms = {name: contents["forms"][name] for name in ARRAYS}
        expected = {name: checksums.get(name, contents["sha256"][name]) for name in ARRAYS}
        class_names = tuple(contents["class_names"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _Damaged(index, str(error)) from error
    arrays = {}
    for name in ARRAYS:
        path = folder / f"{name}.npy"
        try:
            # Copy on write: the pages are shared, and torch.from_numpy takes them without a copy.
            arrays[name] = np.load(path, mmap_mode="c", allow_pickle=False)
        except Exception as error:
            # numpy evaluates the header, and a damaged one raises errors of a dozen kinds.
            raise _Damaged(path, str(error).partition("\n")[0]) from error
        if _form(arrays[name]) != forms[name] or _sha256(arrays[name]) != expected[name]:
            raise _Damaged(path, "its sha256 or its shape does not match")
    return ImageArrays(**arrays, class_names=class_names)


def write_cache(folder: Path, arrays: ImageArrays) -> None:
    """Write the decoded arrays; contents.json comes last, so that what it names is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    contents = {
        "class_names": list(arrays.class_names),
        "forms": {name: _form(getattr(arrays, name)) for name in ARRAYS},
        "sha256": array_checksums(arrays),
    }
    for name in ARRAYS:
        with replacing(folder / f"{name}.npy") as file:
            np.save(file, np.ascontiguousarray(getattr(arrays, name)), allow_pickle=False)
    record = {"contents": contents, "sha256": _sha256_of_json(contents)}
    with replacing(folder / "contents.json") as file:
        file.write(json.dumps(record, indent=1).encode())


def _form(array: NDArray[np.generic]) -> list[object]:
    return [array.dtype.str, *array.shape]


def _sha256(array: NDArray[np.generic]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _sha256_of_json(contents: object) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


@contextmanager
def _locked(path: Path, name: str) -> Iterator[str]:
    """Hold the lock of a dataset; yields "", or why the data folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        yield error.strerror or str(error)
        return
    with file:
        said = False
        while not try_lock(file):
            if not said:
                log.warning("another process is getting %s into %s; waiting", name, path.parent)
            said = True
            time.sleep(0.1)
        yield ""
