"""The datasets: one file per origin, each with a function `load(...) -> ImageArrays`."""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field

import numpy as np
from numpy.typing import NDArray

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True)
class ImageArrays:
    """uint8 images (N, C, H, W) and integer labels (N,) of both official sets, with class names.

    The arrays may be private (copy-on-write) memory maps of the decoded cache, so that processes
    that load the same dataset share its memory.

    `mapped`: the images are maps of files that may be larger than the memory, which cannot be
    written to; read them in parts. `known_checksums` are those of arrays that were read before.
    `broken` are the reasons why files were left out, by their paths. `warnings` are what a run that
    uses the images should report.
    """

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.integer]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.integer]
    class_names: tuple[str, ...]
    _: KW_ONLY
    mapped: bool = False
    known_checksums: Mapping[str, str] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @functools.cached_property
    def checksums(self) -> dict[str, str]:
        """The sha256 of each array in C order, by its name; computed once."""
        known = self.known_checksums
        return {name: known.get(name) or _sha256(getattr(self, name)) for name in ARRAYS}


def _sha256(array: NDArray[np.generic]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
