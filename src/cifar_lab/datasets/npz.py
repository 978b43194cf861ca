"""Your own arrays, in one .npz file of numpy's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_lab.datasets import ARRAYS, ImageArrays
from cifar_lab.datasets.held_out import check_checksums, held_out_fraction
from cifar_lab.datasets.store import user_path
from cifar_lab.errors import UsageError, first_line
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

    If it has images and labels instead, a fixed stratified `test_fraction` is held out for testing.
    Images are uint8 of shape (N, C, H, W), (N, H, W, C) or, in grayscale, (N, H, W). Labels are
    whole numbers from 0. class_names is optional. Raises UsageError that names the wrong array.
    """
    if not path:
        raise UsageError("dataset.source.path is missing; give a .npz file with your images")
    file = user_path("dataset.source.path", path)
    arrays = _read(file)
    if all(name in arrays for name in ARRAYS):
        pairs = [ARRAYS[:2], ARRAYS[2:]]
    elif "images" in arrays and "labels" in arrays:
        pairs = [("images", "labels")]
    else:
        raise UsageError(
            f"{file} holds {', '.join(sorted(arrays)) or 'nothing'}; it must hold "
            f"{', '.join(ARRAYS)}, or images and labels"
        )
    sets = []
    for images_name, labels_name in pairs:
        images = _images(arrays[images_name], image_shape, f"{images_name} in {file}")
        labels = _labels(arrays[labels_name], len(images), f"{labels_name} in {file}")
        sets.append((images, labels))
    class_names = _class_names(arrays.get("class_names"), [labels for _, labels in sets], file)
    if len(sets) == 1:
        [(images, labels)] = sets
        kept, out = held_out_fraction(labels, test_fraction, file)
        sets = [(images[kept], labels[kept]), (images[out], labels[out])]
    dataset = ImageArrays(*sets[0], *sets[1], class_names=class_names)
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
        raise UsageError(f"dataset.source.path={file}: there is no such file") from None
    except Exception as error:
        # A damaged archive, or the header of an array in it, raises errors of a dozen kinds.
        why = first_line(error)
        raise UsageError(f"{file} cannot be read as .npz without pickles: {why}") from error


def _images(array: NDArray[Any], image_shape: Sequence[int], what: str) -> NDArray[np.uint8]:
    channels, height, width = image_shape
    wanted = (channels, height, width)
    if array.dtype != np.uint8 or array.size == 0:
        raise UsageError(
            f"{what}: {array.dtype} of shape {array.shape}; it must be uint8 and not empty"
        )
    if array.shape[1:] != wanted and array.shape[1:] == (height, width, channels):
        array = array.transpose(0, 3, 1, 2)
    if channels == 1 and array.shape[1:] == (height, width):
        array = array[:, None]
    if array.shape[1:] != wanted:
        raise UsageError(
            f"{what}: shape {array.shape}; it must be (N, {channels}, {height}, {width}) "
            "as in dataset.image_shape"
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
    names: NDArray[Any] | None, labels: Sequence[NDArray[np.int64]], file: Path
) -> tuple[str, ...]:
    count = 1 + max(int(of_set.max()) for of_set in labels)
    present = set(np.unique(labels[0]).tolist())
    # Not a set of all numbers up to count: one wild label would make that enormous.
    absent = next((label for label in range(count) if label not in present), None)
    if absent is not None:
        raise UsageError(
            f"{file}: labels go up to {count - 1}, but no training image has label {absent}"
        )
    if names is None:
        return tuple(str(label) for label in range(count))
    if names.ndim != 1 or len(names) != count:
        raise UsageError(f"class_names in {file}: shape {names.shape}; it must be ({count},)")
    return tuple(str(name) for name in names)
