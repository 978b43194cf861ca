"""Your own arrays, in one .npz file of numpy's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_lab.datasets import ARRAYS, ImageArrays, class_names
from cifar_lab.datasets.checks import constant_warning, is_constant
from cifar_lab.datasets.held_out import check_checksums, held_out_fraction
from cifar_lab.datasets.store import user_path
from cifar_lab.errors import UsageError, first_line, listing, shorten, shorten_path
from cifar_lab.runs.files import open_for_reading


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
    if not path:
        raise UsageError("dataset.source.path is missing; give a .npz file with your images")
    file = user_path("dataset.source.path", path)
    where = shorten_path(file)
    arrays, used = _read(file), {"class_names"}

    def read_set(prefix: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        pair = {f"{prefix}images", f"{prefix}labels"}
        if missing := pair - arrays.keys():
            raise UsageError(f"{where} holds no {' and no '.join(missing)}")
        used.update(pair)
        images = _images(arrays[f"{prefix}images"], image_shape, f"{prefix}images in {where}")
        labels = _labels(arrays[f"{prefix}labels"], len(images), f"{prefix}labels in {where}")
        return images, labels

    validation = 0
    if all(name in arrays for name in ARRAYS):
        train, test = read_set("train_"), read_set("test_")
        if "val_images" in arrays or "val_labels" in arrays:
            images, labels = read_set("val_")
            train = np.concatenate([train[0], images]), np.concatenate([train[1], labels])
            validation = len(labels)
    elif "images" in arrays and "labels" in arrays:
        images, labels = read_set("")
        kept, out = held_out_fraction(labels, test_fraction, file)
        train, test = (images[kept], labels[kept]), (images[out], labels[out])
    else:
        raise UsageError(
            f"{where} holds {shorten(', '.join(sorted(arrays)) or 'nothing', 200)}; it must hold "
            f"{', '.join(ARRAYS)}, or images and labels"
        )
    names = _class_names(arrays.get("class_names"), [train[1], test[1]], where)
    every = [*train[0], *test[0]]
    constant = [f"number {i}" for i, image in enumerate(every) if is_constant(image)]
    warnings = constant_warning(constant, len(every))
    if unused := sorted(arrays.keys() - used):
        warnings.append(f"arrays in {where} that are not used: {listing(map(shorten, unused))}")
    dataset = ImageArrays(*train, *test, names, validation, warnings=tuple(warnings))
    check_checksums(dataset, checksums, file)
    return dataset


def _read(file: Path) -> dict[str, NDArray[Any]]:
    try:
        # Opened here, because numpy leaves a damaged file open; and not by np.load, which advises
        # to unpickle what it does not know.
        with open_for_reading(file) as stream:
            archive = np.lib.npyio.NpzFile(stream, allow_pickle=False)
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise UsageError(
            f"dataset.source.path={shorten_path(file)}: there is no such file"
        ) from None
    except Exception as error:
        # A damaged archive, or the header of an array in it, raises errors of a dozen kinds.
        raise UsageError(
            f"{shorten_path(file)} cannot be read as .npz without pickles: {first_line(error)}"
        ) from error


def _images(array: NDArray[Any], image_shape: Sequence[int], what: str) -> NDArray[np.uint8]:
    channels, height, width = wanted = tuple(image_shape)
    given = array.shape
    if array.shape[1:] != wanted and array.shape[1:] == (height, width, channels):
        array = array.transpose(0, 3, 1, 2)
    if channels == 1 and array.shape[1:] == (height, width):
        array = array[:, None]
    if array.dtype != np.uint8 or array.shape[1:] != wanted or len(array) == 0:
        raise UsageError(
            f"{what}: {array.dtype} of shape {given}; it must be (N, {channels}, {height}, "
            f"{width}) as in dataset.image_shape, must be uint8, and not empty"
        )
    return np.ascontiguousarray(array)


def _labels(array: NDArray[Any], size: int, what: str) -> NDArray[np.int64]:
    if not np.issubdtype(array.dtype, np.integer) or array.shape != (size,):
        raise UsageError(
            f"{what}: {array.dtype} of shape {array.shape}; it must be whole numbers, ({size},)"
        )
    if array.min() < 0:
        raise UsageError(f"{what}: its minimum is {array.min()}; labels begin at 0")
    return array.astype(np.int64)


def _class_names(
    names: NDArray[Any] | None, labels: Sequence[NDArray[np.int64]], where: str
) -> tuple[str, ...]:
    count = 1 + max(int(of_set.max()) for of_set in labels)
    present = np.unique(labels[0])
    if len(present) < count:  # no list of all labels: a wild one would make that enormous
        absent = next(i for i in range(count) if i >= len(present) or present[i] != i)
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
