"""Your own arrays, in one .npz file of numpy's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_lab.datasets import (
    ARRAYS,
    ImageArrays,
    check_checksums,
    class_names,
    constant_warning,
    held_out_fraction,
    is_constant,
)
from cifar_lab.datasets.store import user_path
from cifar_lab.errors import UsageError, first_line, listing, shorten, shorten_path
from cifar_lab.runs.files import open_for_reading

_USED = {*ARRAYS, "val_images", "val_labels", "images", "labels", "class_names"}


def load(
    *,
    root: Path,
    checksums: Mapping[str, str],
    path: str | None,
    image_shape: Sequence[int],
    test_fraction: float = 0.2,
) -> ImageArrays:
    """Return the arrays of a file with train_images, train_labels, test_images, test_labels.

    If there are val_images and val_labels, these validate. If it has images and labels instead, a
    fixed stratified `test_fraction` is held out for testing. Images are uint8 of shape
    (N, C, H, W), (N, H, W, C) or, in grayscale, (N, H, W). Labels are whole numbers from 0.
    class_names is optional. Raises UsageError that names the wrong array.
    """
    file = user_path("dataset.source.path", path, "a .npz file with your images")
    where = shorten_path(file)
    arrays, validation = _read(file), 0
    if all(name in arrays for name in ARRAYS):
        train = _take(arrays, "train_", image_shape, where)
        test = _take(arrays, "test_", image_shape, where)
        if {"val_images", "val_labels"} & arrays.keys():
            images, labels = _take(arrays, "val_", image_shape, where)
            train = np.concatenate([train[0], images]), np.concatenate([train[1], labels])
            validation = len(labels)
    elif {"images", "labels"} <= arrays.keys():
        images, labels = _take(arrays, "", image_shape, where)
        kept, out = held_out_fraction(labels, test_fraction, file)
        train, test = (images[kept], labels[kept]), (images[out], labels[out])
    else:
        raise UsageError(
            f"{where} holds {shorten(', '.join(sorted(arrays)) or 'nothing', 200)}; it must hold "
            f"{', '.join(ARRAYS)}, or images and labels"
        )
    names = _class_names(arrays.pop("class_names", None), train[1], test[1], where)
    every = [*train[0], *test[0]]
    constant = [f"number {i}" for i, image in enumerate(every) if is_constant(image)]
    warnings = constant_warning(constant, len(every))
    if arrays:
        unused = listing(map(shorten, sorted(arrays)))
        warnings.append(f"arrays in {where} that are not used: {unused}")
    dataset = ImageArrays(*train, *test, names, validation, warnings=tuple(warnings))
    return check_checksums(dataset, checksums, file)


def _read(file: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a file; those that are not used are not read, and may be anything."""
    try:
        # Opened here, because numpy leaves a damaged file open; and not by np.load, which advises
        # to unpickle what it does not know.
        with open_for_reading(file) as stream:
            archive = np.lib.npyio.NpzFile(stream, allow_pickle=False)
            return {n: archive[n] if n in _USED else np.empty(0) for n in archive.files}
    except FileNotFoundError:
        raise UsageError(
            f"dataset.source.path={shorten_path(file)}: there is no such file"
        ) from None
    except Exception as error:
        # A damaged archive, or the header of an array in it, raises errors of a dozen kinds.
        raise UsageError(
            f"{shorten_path(file)} cannot be read as .npz without pickles: {first_line(error)}"
        ) from error


def _take(
    arrays: dict[str, NDArray[Any]], part: str, image_shape: Sequence[int], where: str
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Take the images and labels of a set out of the arrays of a file."""
    for name in (f"{part}images", f"{part}labels"):
        if name not in arrays:
            raise UsageError(f"{where} holds no {name}")
    images, labels = arrays.pop(f"{part}images"), arrays.pop(f"{part}labels")
    channels, height, width = wanted = tuple(image_shape)
    given = images.shape
    if given[1:] != wanted and given[1:] == (height, width, channels):
        images = images.transpose(0, 3, 1, 2)
    if channels == 1 and given[1:] == (height, width):
        images = images[:, None]
    if images.dtype != np.uint8 or images.shape[1:] != wanted or len(images) == 0:
        raise UsageError(
            f"{part}images in {where}: {images.dtype} of shape {given}; it must be (N, {channels}, "
            f"{height}, {width}) as in dataset.image_shape, must be uint8, and not empty"
        )
    what, size = f"{part}labels in {where}", len(images)
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (size,):
        raise UsageError(
            f"{what}: {labels.dtype} of shape {labels.shape}; it must be whole numbers, ({size},)"
        )
    labels = labels.astype(np.int64)  # first: the -1 of unsigned labels is their maximum
    if labels.min() < 0:
        raise UsageError(f"{what}: its minimum is {labels.min()}; labels begin at 0")
    return np.ascontiguousarray(images), labels


def _class_names(
    names: NDArray[Any] | None, train: NDArray[np.int64], test: NDArray[np.int64], where: str
) -> tuple[str, ...]:
    count = 1 + int(max(train.max(), test.max()))
    present = np.unique(train)
    if len(present) < count:  # no list of all labels: a wild one would make that enormous
        absent = np.setdiff1d(np.arange(len(present) + 1), present)[0]
        raise UsageError(
            f"{where}: labels go up to {count - 1}, but no training image has label {absent}"
        )
    if count < 2:
        raise UsageError(f"{where}: all labels are 0; there must be at least two classes")
    if names is None:
        return tuple(str(label) for label in range(count))
    if names.ndim != 1 or len(names) != count:
        raise UsageError(f"class_names in {where}: shape {names.shape}; it must be ({count},)")
    texts = [name if isinstance(name, bytes) else str(name) for name in names.tolist()]
    return class_names(texts, f"class_names in {where}")
