"""Where the images come from: one file per origin, each with `load(...) -> ImageArrays`."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ImageArrays:
    """uint8 images (N, C, H, W) and integer labels (N,) of both official sets, with class names.

    The arrays may be private (copy-on-write) memory maps of the decoded cache: processes that load
    the same dataset share its pages.
    """

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.integer]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.integer]
    class_names: tuple[str, ...]
