"""The handwritten digits that scikit-learn includes: 1,437 and 360 images in ten classes."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cifar_lab.datasets import ImageArrays, held_out
from cifar_lab.datasets.store import add_arrays, cached

TEST_SIZE = 360


def load(*, root: Path, checksums: Mapping[str, str]) -> ImageArrays:
    """Return the digits: 8x8 pixels with values from 0 to 16, enlarged to 1x32x32 bytes.

    Nothing is downloaded. The decoded dataset is cached because importing scikit-learn takes longer
    than everything else here.
    """
    folder = root / "decoded" / "digits"
    return cached(folder, "", lambda add: add_arrays(_decode(), add), "digits", checksums=checksums)


def _decode() -> ImageArrays:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 255 * v / 16, rounded half up, in integers: the same bytes on every machine.
    small = ((digits.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)
    images = small.repeat(4, axis=1).repeat(4, axis=2)[:, None]
    labels = digits.target.astype(np.uint8)
    train, test = held_out(labels, TEST_SIZE)
    class_names = tuple(str(name) for name in digits.target_names)
    return ImageArrays(images[train], labels[train], images[test], labels[test], class_names)
