"""Your own pictures: `train/<class>/*` and `test/<class>/*`, or `<class>/*` alone."""

import dataclasses
import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
from numpy.typing import NDArray
from tqdm import tqdm

from cifar_lab.datasets import ImageArrays
from cifar_lab.datasets.held_out import check_checksums, held_out_fraction
from cifar_lab.datasets.pictures import (
    SUFFIXES,
    Fit,
    Unreadable,
    cannot_be_read,
    decode_files,
    list_pictures,
)
from cifar_lab.datasets.store import (
    Add,
    Facts,
    cached,
    sha256_of_json,
    user_path,
)
from cifar_lab.errors import Unavailable, UsageError, listing, shorten, shows_bars

log = logging.getLogger("cifar_lab")

Storage = Literal["auto", "memory", "mapped"]

LARGEST_IN_MEMORY = 1_000_000_000
"""Bytes of decoded pictures up to which `auto` keeps them in memory, if there is four times more"""

_SETS = ("train", "test")


def load(
    *,
    root: Path,
    checksums: Mapping[str, str],
    path: str | None,
    image_shape: Sequence[int],
    fit: Fit = "crop",
    storage: Storage = "auto",
    test_fraction: float = 0.2,
    skip_broken: bool = False,
    max_broken: int = 100,
) -> ImageArrays:
    """Return the pictures below `path`, each converted to `image_shape` (channels, height, width).

    `fit` is that of `fit_picture`. The pictures are decoded once, into files below the data folder
    `root`. `storage`: all of them are held in memory while they are used, or are read from the file
    as they are needed; `auto` does so where they have more than 1 GB or a quarter of the machine's
    memory. The images are the same. Without the folders train and test, a fixed stratified
    `test_fraction` is held out for testing. `skip_broken` leaves out pictures that cannot be
    decoded, up to `max_broken`. Raises UsageError that names the wrong folder or file.
    """
    if not path:
        raise UsageError(
            "dataset.source.path is missing; give the folder that holds train/<class>/* "
            "and test/<class>/*, or <class>/*"
        )
    if max_broken < 0:
        raise UsageError(f"dataset.source.max_broken={max_broken} is wrong: it must be at least 0")
    folder = user_path("dataset.source.path", path)
    if not folder.is_dir():
        raise UsageError(f"dataset.source.path={path}: there is no such folder")
    pictures = _Pictures(
        folder,
        *_list(folder, test_fraction),
        tuple(image_shape),
        fit,
        most_broken=max_broken,
        skip_broken=skip_broken,
    )
    mapped = storage == "mapped" or (storage == "auto" and pictures.nbytes > _most_in_memory())
    key = pictures.key()
    decoding = [folder.resolve().as_posix(), pictures.image_shape, fit, test_fraction]
    arrays = cached(
        root / "decoded" / "pictures" / sha256_of_json(decoding)[:24],
        key,
        functools.partial(pictures.decode, key),
        f"the pictures in {folder}",
        mapped=mapped,
    )
    warnings = pictures.check_broken(arrays.broken, arrays.train_labels, arrays.test_labels)
    arrays = dataclasses.replace(arrays, warnings=warnings)
    check_checksums(arrays, checksums, folder)
    return arrays


def _most_in_memory() -> int:
    """Return the bytes of pictures up to which they are kept in memory."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return LARGEST_IN_MEMORY
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(LARGEST_IN_MEMORY, physical // 4)


@dataclass(frozen=True)
class _Pictures:
    """The files and labels of both sets, how each becomes an image, and how many may be broken."""

    folder: Path
    class_names: tuple[str, ...]
    paths: Mapping[str, Sequence[Path]]
    labels: Mapping[str, NDArray[np.int64]]
    image_shape: tuple[int, ...]
    fit: Fit
    most_broken: int
    skip_broken: bool

    @property
    def count(self) -> int:
        """The number of files."""
        return sum(map(len, self.paths.values()))

    @property
    def nbytes(self) -> int:
        """The bytes of all decoded images."""
        return self.count * prod(self.image_shape)

    def key(self) -> str:
        """Return a hash of names, sizes, times and labels: where it is equal, nothing has changed.

        The time of change (ctime) is there because a copy can keep the time of modification.
        """
        states: list[Any] = []
        for name in _SETS:
            for path, label in zip(self.paths[name], self.labels[name].tolist(), strict=True):
                try:
                    state = path.stat()
                    numbers = [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
                except OSError:  # a link to nowhere, which is a broken picture
                    numbers = []
                states.append([name, self._relative(path), label, *numbers])
        return sha256_of_json([PIL.__version__, self.class_names, states])

    def decode(self, key: str, add: Add) -> Facts:
        """Add the images and labels of both sets, without the pictures that are broken."""
        log.info("decoding %s pictures of %s once", f"{self.count:,}", self.folder)
        broken: dict[str, str] = {}
        labels = {}
        for name in _SETS:
            kept: list[int] = []
            add(f"{name}_images", self._decode_set(name, broken, kept))
            labels[name] = self.labels[name][np.array(kept, dtype=int)]
        if self.key() != key:
            raise Unavailable(
                f"the pictures in {self.folder} have changed while they were read; run the command "
                "again when they are complete"
            )
        self.check_broken(broken, labels["train"], labels["test"])
        for name in _SETS:
            add(f"{name}_labels", [labels[name]])
        return Facts(self.class_names, broken)

    def _decode_set(
        self, name: str, broken: dict[str, str], kept: list[int]
    ) -> Iterator[NDArray[np.uint8]]:
        """Yield the images of a set; note those that are broken, and the positions of the rest."""
        paths = self.paths[name]
        decoded = decode_files(paths, self.image_shape, self.fit)
        bar = tqdm(
            decoded, f"decoding {name}", len(paths), unit="picture", disable=not shows_bars()
        )
        for position, picture in enumerate(bar):
            if isinstance(picture, Unreadable):
                broken[self._relative(paths[position])] = shorten(str(picture), 100)
            else:
                kept.append(position)
                yield picture[None]

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def check_broken(
        self,
        broken: Mapping[str, str],
        train_labels: NDArray[np.integer],
        test_labels: NDArray[np.integer],
    ) -> tuple[str, ...]:
        """Return a warning if pictures are left out; the labels are those of the others.

        Raises UsageError if none may be, or if a class or the test set is empty without them.
        """
        if not broken:
            return ()
        names = [shorten(path, 60) for path in sorted(broken)]
        number, folder = f"{self.count:,} pictures in {self.folder}", self.folder
        if len(broken) > self.most_broken:  # those of a cache were found with another limit
            raise UsageError(
                f"more than {self.most_broken} of the {number} cannot be read, such as "
                f"{listing(names, 60)}; remove them, or raise dataset.source.max_broken"
            )
        remedy = "or set dataset.source.skip_broken=true"
        if not self.skip_broken and len(broken) == 1:
            [(path, reason)] = broken.items()
            raise UsageError(f"{cannot_be_read(folder / path, reason)}; remove it, {remedy}")
        if not self.skip_broken:
            raise UsageError(
                f"{len(broken)} of the {number} cannot be read: {listing(names, 100)}; "
                f"remove them, {remedy}"
            )
        absent = sorted(set(range(len(self.class_names))) - set(train_labels.tolist()))
        missing = f"training picture of {self.class_names[absent[0]]}" if absent else ""
        if missing or not len(test_labels):
            raise UsageError(
                f"without the {len(broken)} broken pictures, {folder} has no "
                f"{missing or 'test picture'}"
            )
        return (
            f"skipped {len(broken)} of {self.count:,} pictures that cannot be read: "
            f"{listing(names, 120)}",
        )


def _list(
    folder: Path, test_fraction: float
) -> tuple[tuple[str, ...], dict[str, Sequence[Path]], dict[str, NDArray[np.int64]]]:
    """Return the names of the classes, and the files and labels of each set."""
    divided = [name for name in _SETS if (folder / name).is_dir()]
    if len(divided) == 1:
        other = "test" if divided == ["train"] else "train"
        raise UsageError(
            f"{folder} has {divided[0]} but not {other}; it must have both, or neither"
        )
    if divided:
        classes = _classes(folder / "train")
        unknown = sorted(set(_classes(folder / "test")) - set(classes))
        if unknown:
            raise UsageError(f"{folder / 'test' / unknown[0]} is not a class of train")
        sets = [_pictures(folder / name, classes) for name in _SETS]
    else:
        classes = _classes(folder)
        files, labels = _pictures(folder, classes)
        parts = held_out_fraction(labels, test_fraction, folder)
        sets = [([files[index] for index in part], labels[part]) for part in parts]
    (train, train_labels), (test, test_labels) = sets
    return classes, {"train": train, "test": test}, {"train": train_labels, "test": test_labels}


def _classes(folder: Path) -> tuple[str, ...]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    classes = tuple(name for name in names if not name.startswith("."))
    if len(classes) < 2:
        raise UsageError(
            f"{folder} has {len(classes)} folders; it must have at least two, one per class"
        )
    return classes


def _pictures(folder: Path, classes: Sequence[str]) -> tuple[list[Path], NDArray[np.int64]]:
    paths: list[Path] = []
    labels: list[int] = []
    others: list[Path] = []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue
        pictures, rest = list_pictures(folder / name)
        pictures = [path for path in pictures if not path.name.startswith(".")]
        others += [path for path in rest if not path.name.startswith(".")]
        if not pictures:
            kinds = " ".join(sorted(SUFFIXES))
            raise UsageError(f"{folder / name} holds no pictures ({kinds})")
        paths += pictures
        labels += [label] * len(pictures)
    if others:
        log.warning("skipped %d files that are not pictures, such as %s", len(others), others[0])
    return paths, np.array(labels, dtype=np.int64)
