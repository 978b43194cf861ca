"""Your own pictures: `train/<class>/*`, `val/<class>/*` and `test/<class>/*`, or `<class>/*`."""

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray
from tqdm import tqdm

from cifar_lab.datasets import ImageArrays, class_names
from cifar_lab.datasets.checks import (
    constant_warning,
    groups_of_equal,
    is_constant,
    pixel_sum,
    trait_warnings,
)
from cifar_lab.datasets.held_out import check_checksums, held_out_fraction
from cifar_lab.datasets.pictures import (
    KINDS,
    Fit,
    Preparation,
    Unreadable,
    cannot_be_read,
    decode_files,
    list_pictures,
    skipped_warning,
    visible_folders,
)
from cifar_lab.datasets.store import Add, Facts, cached, sha256_of_json, user_path
from cifar_lab.errors import UsageError, listing, shorten, shorten_path, shows_bars

log = logging.getLogger("cifar_lab")

Storage = Literal["auto", "memory", "mapped"]

LARGEST_IN_MEMORY = 1_000_000_000
"""Bytes of decoded pictures up to which `auto` keeps them in memory, if there is four times more"""

_VALIDATION = ("val", "valid", "validation")
_DECODER = 5  # raised where the same files become other images, or more is noted of them


def load(
    *,
    root: Path,
    checksums: Mapping[str, str],
    path: str | None,
    image_shape: Sequence[int],
    fit: Fit = "crop",
    storage: Storage = "auto",
    max_megapixels: float = 120.0,
    test_fraction: float = 0.2,
    skip_broken: bool = False,
    max_broken: int = 100,
) -> ImageArrays:
    """Return the pictures below `path`, each converted to `image_shape` (channels, height, width).

    `fit` is that of `fit_picture`. The pictures are decoded once, into files below the data folder
    `root`. `storage`: all of them are held in memory while they are used, or are read from the file
    as they are needed; `auto` does so where they have more than 1 GB or a quarter of the machine's
    memory. The images are the same. Those of a folder `val` (or `valid`, `validation`) validate.
    Without the folders train and test, a fixed stratified `test_fraction` is held out for testing.
    `skip_broken` leaves out pictures that cannot be decoded, up to `max_broken`. Raises UsageError
    that names the wrong folder or file.
    """
    if not path:
        raise UsageError(
            "dataset.source.path is missing; give the folder that holds train/<class>/* "
            "and test/<class>/*, or <class>/*"
        )
    folder = user_path("dataset.source.path", path)
    if not folder.is_dir():
        raise UsageError(f"dataset.source.path={shorten(path)}: there is no such folder")
    pictures = _list(folder, test_fraction)
    preparation = Preparation(tuple(image_shape), fit, max_megapixels)
    size = len(pictures.files) * prod(image_shape)
    mapped = storage == "mapped" or (storage == "auto" and size > _most_in_memory())
    decoding = [folder.resolve().as_posix(), preparation.shape, fit, test_fraction]

    def decode(add: Add) -> Facts:
        facts = pictures.decode(preparation, add)
        pictures.check_broken(facts["broken"], skip_broken, max_broken)  # before they are kept
        return facts

    arrays = cached(
        root / "decoded" / "pictures" / sha256_of_json(decoding)[:24],
        pictures.key(max_megapixels),
        decode,
        f"the pictures in {pictures.where}",
        mapped=mapped,
    )
    broken = pictures.check_broken(arrays.broken, skip_broken, max_broken)
    arrays = dataclasses.replace(arrays, warnings=(*pictures.warnings, *broken, *arrays.warnings))
    check_checksums(arrays, checksums, folder)
    return arrays


def _most_in_memory() -> int:
    """Return the bytes of pictures up to which they are kept in memory."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return LARGEST_IN_MEMORY
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(LARGEST_IN_MEMORY, physical // 4)


class _File(NamedTuple):
    """A picture: its set (train, validation or test), path, and class."""

    part: str
    path: Path
    label: int


@dataclass(frozen=True)
class _Pictures:
    """The pictures of a folder, validation after training, and what was left out of it."""

    folder: Path
    class_names: tuple[str, ...]
    files: Sequence[_File]
    warnings: tuple[str, ...]

    @property
    def where(self) -> str:
        """The folder, as messages name it."""
        return shorten_path(self.folder)

    def name(self, file: _File) -> str:
        """Return the path of a picture from the folder."""
        return file.path.relative_to(self.folder).as_posix()

    def key(self, max_megapixels: float) -> str:
        """Return a hash of names, sizes, times and labels: where it is equal, nothing has changed.

        The time of change (ctime) is there because a copy can keep the time of modification.
        """
        states: list[Any] = [PIL.__version__, _DECODER, max_megapixels, self.class_names]
        for file in self.files:
            try:
                state = file.path.stat()
                numbers = [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
            except OSError:  # a link to nowhere, which is a broken picture
                numbers = []
            states.append([file.part, self.name(file), file.label, *numbers])
        return sha256_of_json(states)

    def decode(self, preparation: Preparation, add: Add) -> Facts:
        """Add the images and labels of both sets, without the pictures that are broken."""
        log.info("decoding %s pictures of %s once", f"{len(self.files):,}", self.where)
        read: list[_File] = []
        broken: dict[str, str] = {}
        traits, sums, constant = [], [], []

        def images(name: str) -> Iterator[NDArray[np.uint8]]:
            files = [file for file in self.files if (file.part == "test") == (name == "test")]
            decoded = decode_files([file.path for file in files], preparation)
            hidden = not shows_bars()
            bar = tqdm(decoded, f"decoding {name}", len(files), unit="picture", disable=hidden)
            for file, picture in zip(files, bar, strict=True):
                if isinstance(picture, Unreadable):
                    broken[self.name(file)] = shorten(str(picture), 100)
                    continue
                image, noted = picture
                read.append(file)
                traits.append(noted)
                sums.append(pixel_sum(image))
                if is_constant(image):
                    constant.append(self.name(file))
                yield image[None]

        for name in ("train", "test"):
            first = len(read)
            add(f"{name}_images", images(name))
            add(f"{name}_labels", [np.array([f.label for f in read[first:]], dtype=np.int64)])
        return {
            "class_names": self.class_names,
            "validation": sum(file.part == "validation" for file in read),
            "broken": broken,
            "files": [self.name(file) for file in read],
            "alike": groups_of_equal(sums),
            "warnings": (
                *constant_warning(constant, len(read)),
                *trait_warnings(traits, [file.label for file in read], self.class_names),
            ),
        }

    def check_broken(
        self, broken: Mapping[str, str], skip_broken: bool, most: int
    ) -> tuple[str, ...]:
        """Return a warning if pictures are left out.

        Raises UsageError if none may be, or if they are too many.
        """
        if not broken:
            return ()
        number = f"{len(broken):,} of the {len(self.files):,} pictures"
        shown = listing([shorten(name, 60) for name in sorted(broken)], 100)
        if not skip_broken:
            name, reason = min(broken.items())
            first = cannot_be_read(self.folder / name, reason)
            more = f" (one of {number}: {shown})" if len(broken) > 1 else ""
            raise UsageError(f"{first}{more}; remove it, or set dataset.source.skip_broken=true")
        if len(broken) > most:
            raise UsageError(
                f"{number} in {self.where} cannot be read, more than "
                f"dataset.source.max_broken={most}: {shown}"
            )
        return (f"skipped {number} in {self.where} that cannot be read: {shown}",)


def _list(folder: Path, test_fraction: float) -> _Pictures:
    """Return the classes and the pictures of a folder."""
    parts = [name for name in ("train", *_VALIDATION, "test") if (folder / name).is_dir()]
    divided = "train" in parts or "test" in parts
    if divided and not {"train", "test"} <= set(parts):
        raise UsageError(
            f"{shorten_path(folder)} has {' and '.join(parts)} but not "
            f"{'train' if 'test' in parts else 'test'}; it must have train and test (and val, if "
            "there is one), or the folders of the classes alone"
        )
    names = tuple(_class_folders(folder / "train" if divided else folder))
    files: list[_File] = []
    skipped = Counter[str]()
    if divided:
        beside = [entry.name for entry in visible_folders(folder) if entry.name not in parts]
        skipped.update(f"folder {name}" for name in beside)
    for place in (folder, *(folder / part for part in parts)):
        skipped["pictures outside of the classes"] += len(list_pictures(place, Counter()))
    for part in parts if divided else ("",):
        for name, path in _class_folders(folder / part).items():
            if name not in names:
                raise UsageError(f"{shorten_path(path)} is not a class of train")
            pictures = list_pictures(path, skipped)
            if not pictures:
                raise UsageError(f"{shorten_path(path)} holds no pictures ({KINDS})")
            role = "validation" if part in _VALIDATION else part
            files += [_File(role, p, names.index(name)) for p in pictures]
    if not divided:
        sets = held_out_fraction(np.array([file.label for file in files]), test_fraction, folder)
        files = [
            files[index]._replace(part=part)
            for part, indices in zip(("train", "test"), sets, strict=True)
            for index in indices
        ]
    return _Pictures(folder, names, files, skipped_warning(skipped, folder))


def _class_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of the classes by name."""
    folders = visible_folders(folder)
    where = shorten_path(folder)
    if len(folders) < 2:
        raise UsageError(
            f"{where} has {len(folders)} folders; it must have at least two, one per class"
        )
    names = class_names([entry.name for entry in folders], f"the folders of {where}")
    return dict(sorted(zip(names, folders, strict=True)))
