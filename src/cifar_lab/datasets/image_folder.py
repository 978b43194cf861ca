"""Your own pictures: `train/<class>/*` and `test/<class>/*`, or `<class>/*` alone."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cifar_lab.datasets import ImageArrays
from cifar_lab.datasets.held_out import check_checksums, held_out_fraction
from cifar_lab.datasets.mapped_pictures import load_mapped
from cifar_lab.datasets.picture_sets import SETS, BrokenPictures, PictureSets
from cifar_lab.datasets.pictures import SUFFIXES, Fit
from cifar_lab.datasets.store import user_path
from cifar_lab.errors import UsageError

log = logging.getLogger("cifar_lab")

Storage = Literal["auto", "memory", "mapped"]

LARGEST_IN_MEMORY = 1_000_000_000
"""Bytes of decoded pictures up to which `auto` keeps them in memory, if there is four times more"""


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

    `fit` is that of `fit_picture`. `storage`: the decoded pictures are in memory, or in files below
    the data folder `root` that are mapped; `auto` maps them where they have more than 1 GB or a
    quarter of the machine's memory. The images are the same. Without the folders train and test, a
    fixed stratified `test_fraction` is held out for testing. `skip_broken` leaves out pictures that
    cannot be decoded, up to `max_broken`. Raises UsageError that names the wrong folder or file.
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
    class_names, paths, labels = _list(folder, test_fraction)
    sets = PictureSets(
        folder,
        class_names,
        paths,
        labels,
        tuple(image_shape),
        fit,
        test_fraction,
        skip_broken,
        max_broken,
    )
    if storage == "mapped" or (storage == "auto" and sets.nbytes > _most_in_memory()):
        arrays = load_mapped(root, sets)
    else:
        arrays = _load_in_memory(sets)
    check_checksums(arrays, checksums, folder)
    return arrays


def _load_in_memory(sets: PictureSets) -> ImageArrays:
    broken, images = BrokenPictures(sets), {}
    for name in SETS:
        rows = np.empty((len(sets.paths[name]), *sets.image_shape), dtype=np.uint8)
        count = 0
        for picture in sets.decode(name, broken):
            if picture.pixels is not None:
                rows[count] = picture.pixels
                count += 1
        images[name] = rows[:count]
    warnings = broken.check()
    labels = {name: sets.remaining_labels(name, broken.found[name]) for name in SETS}
    return ImageArrays(
        images["train"],
        labels["train"],
        images["test"],
        labels["test"],
        sets.class_names,
        warnings=warnings,
    )


def _most_in_memory() -> int:
    """Return the bytes of pictures up to which they are kept in memory."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return LARGEST_IN_MEMORY
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(LARGEST_IN_MEMORY, physical // 4)


def _list(
    folder: Path, test_fraction: float
) -> tuple[tuple[str, ...], dict[str, Sequence[Path]], dict[str, NDArray[np.int64]]]:
    """Return the names of the classes, and the files and labels of each set."""
    divided = [name for name in SETS if (folder / name).is_dir()]
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
        found = {name: _pictures(folder / name, classes) for name in SETS}
        paths: dict[str, Sequence[Path]] = {name: found[name][0] for name in SETS}
        return classes, paths, {name: found[name][1] for name in SETS}
    classes = _classes(folder)
    files, labels = _pictures(folder, classes)
    indices = dict(zip(SETS, held_out_fraction(labels, test_fraction, folder), strict=True))
    paths = {name: [files[index] for index in indices[name]] for name in SETS}
    return classes, paths, {name: labels[indices[name]] for name in SETS}


def _classes(folder: Path) -> tuple[str, ...]:
    found = (entry for entry in folder.iterdir() if entry.is_dir())
    classes = tuple(sorted(entry.name for entry in found if not entry.name.startswith(".")))
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
        entries = [e for e in sorted((folder / name).iterdir()) if not e.name.startswith(".")]
        pictures = [entry for entry in entries if entry.suffix.lower() in SUFFIXES]
        others += [entry for entry in entries if entry.suffix.lower() not in SUFFIXES]
        if not pictures:
            kinds = " ".join(sorted(SUFFIXES))
            raise UsageError(f"{folder / name} holds no pictures ({kinds})")
        paths += pictures
        labels += [label] * len(pictures)
    if others:
        log.warning("skipped %d files that are not pictures, such as %s", len(others), others[0])
    return paths, np.array(labels, dtype=np.int64)
