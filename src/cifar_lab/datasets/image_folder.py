"""Your own pictures: `train/<class>/*`, `val/<class>/*` and `test/<class>/*`, or `<class>/*`."""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray
from tqdm import tqdm

from cifar_lab.datasets import (
    ImageArrays,
    check_checksums,
    class_names,
    constant_warning,
    held_out_fraction,
    is_constant,
    trait_warnings,
)
from cifar_lab.datasets import pictures as intake
from cifar_lab.datasets.store import Add, Facts, cached, files_digest, user_path
from cifar_lab.errors import UsageError, listing, log, shorten, shorten_path, shows_bars

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
    fit: intake.Fit = "crop",
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
    right = "the folder that holds train/<class>/* and test/<class>/*, or <class>/*"
    folder = user_path("dataset.source.path", path, right)
    if not folder.is_dir():
        raise UsageError(f"dataset.source.path={shorten_path(folder)}: there is no such folder")
    names, files, warnings = _list(folder, test_fraction)
    where = shorten_path(folder)
    preparation = intake.Preparation(tuple(image_shape), fit, max_megapixels)
    most = LARGEST_IN_MEMORY
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):  # Windows does not say
        most = min(most, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
    size, most_broken = len(files) * prod(image_shape), max_broken if skip_broken else 0
    # The files' state alone tells whether they are the same: sets and labels follow from names.
    state = files_digest(folder, [folder / file.name for file in files])
    decoding = json.dumps([folder.resolve().as_posix(), preparation.shape, fit, test_fraction])

    def decode(add: Add) -> Facts:
        log.info("decoding %s pictures of %s once", f"{len(files):,}", where)
        facts = _decode(folder, files, preparation, names, add)
        _check_broken(folder, facts["broken"], len(files), most_broken)  # before they are kept
        return facts

    arrays = cached(
        root / "decoded" / "pictures" / hashlib.sha256(decoding.encode()).hexdigest()[:24],
        json.dumps([PIL.__version__, _DECODER, max_megapixels, state]),
        decode,
        f"the pictures in {where}",
        mapped=storage == "mapped" or (storage == "auto" and size > most),
    )
    skipped = _check_broken(folder, arrays.broken, len(files), most_broken)
    arrays = dataclasses.replace(arrays, warnings=(*warnings, *skipped, *arrays.warnings))
    return check_checksums(arrays, checksums, folder)


class _File(NamedTuple):
    """A picture: its set (train, validation or test), its path from the folder, and its class."""

    part: str
    name: str
    label: int


def _decode(
    folder: Path,
    files: Sequence[_File],
    preparation: intake.Preparation,
    names: Sequence[str],
    add: Add,
) -> Facts:
    """Add the images and labels of both sets, without the pictures that are broken."""
    read: list[_File] = []
    broken: dict[str, str] = {}
    traits, constant = [], []

    def images(part: str) -> Iterator[NDArray[np.uint8]]:
        chosen = [file for file in files if (file.part == "test") == (part == "test")]
        decoded = intake.decode_files([folder / file.name for file in chosen], preparation)
        hidden = not shows_bars()
        bar = tqdm(decoded, f"decoding {part}", len(chosen), unit="picture", disable=hidden)
        for file, picture in zip(chosen, bar, strict=True):
            if isinstance(picture, intake.Unreadable):
                broken[file.name] = shorten(str(picture), 100)
                continue
            image, noted = picture
            read.append(file)
            traits.append(noted)
            if is_constant(image):
                constant.append(file.name)
            yield image[None]

    for part in ("train", "test"):
        first = len(read)
        add(f"{part}_images", images(part))
        add(f"{part}_labels", [np.array([f.label for f in read[first:]], dtype=np.int64)])
    return {
        "class_names": names,
        "validation": sum(file.part == "validation" for file in read),
        "broken": broken,
        "files": [file.name for file in read],
        "warnings": (
            *constant_warning(constant, len(read)),
            *trait_warnings(traits, [file.label for file in read], names),
        ),
    }


def _check_broken(folder: Path, broken: Mapping[str, str], size: int, most: int) -> tuple[str, ...]:
    """Return a warning if some of the `size` pictures are left out; UsageError above `most`."""
    if not broken:
        return ()
    number, where = f"{len(broken):,} of the {size:,} pictures", shorten_path(folder)
    shown = listing([shorten(name, 60) for name in sorted(broken)], 100)
    if most == 0:
        name, reason = min(broken.items())
        first = intake.cannot_be_read(folder / name, reason)
        more = f" (one of {number}: {shown})" if len(broken) > 1 else ""
        raise UsageError(f"{first}{more}; remove it, or set dataset.source.skip_broken=true")
    if len(broken) > most:
        raise UsageError(
            f"{number} in {where} cannot be read, more than dataset.source.max_broken={most}: "
            f"{shown}"
        )
    return (f"skipped {number} in {where} that cannot be read: {shown}",)


def _list(
    folder: Path, test_fraction: float
) -> tuple[tuple[str, ...], list[_File], tuple[str, ...]]:
    """Return a folder's classes, its pictures (validation after training), and a warning."""
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
        beside = [entry.name for entry in intake.visible_folders(folder) if entry.name not in parts]
        skipped.update(f"folder {name}" for name in beside)
    for place in (folder, *(folder / part for part in parts)):
        skipped["pictures outside of the classes"] += len(intake.list_pictures(place, Counter()))
    for part in parts if divided else ("",):
        for name, path in _class_folders(folder / part).items():
            if name not in names:
                raise UsageError(f"{shorten_path(path)} is not a class of train")
            pictures = intake.list_pictures(path, skipped)
            if not pictures:
                raise UsageError(f"{shorten_path(path)} holds no pictures ({intake.KINDS})")
            role = "validation" if part in _VALIDATION else part
            label = names.index(name)
            files += [_File(role, p.relative_to(folder).as_posix(), label) for p in pictures]
    if not divided:
        sets = held_out_fraction(np.array([file.label for file in files]), test_fraction, folder)
        files = [
            files[index]._replace(part=part)
            for part, indices in zip(("train", "test"), sets, strict=True)
            for index in indices
        ]
    return names, files, intake.skipped_warning(skipped, folder)


def _class_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of the classes by name."""
    folders = intake.visible_folders(folder)
    where = shorten_path(folder)
    if len(folders) < 2:
        raise UsageError(
            f"{where} has {len(folders)} folders; it must have at least two, one per class"
        )
    names = class_names([entry.name for entry in folders], f"the folders of {where}")
    return dict(sorted(zip(names, folders, strict=True)))
