"""The datasets: one file per origin, each with a function `load(...) -> ImageArrays`."""

import functools
import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

import numpy as np
from numpy.typing import NDArray

from cifar_lab.datasets.checks import Groups, equal_images
from cifar_lab.errors import UsageError, printable, shorten

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True)
class ImageArrays:
    """uint8 images (N, C, H, W) and integer labels (N,) of both official sets, with class names.

    The arrays may be private (copy-on-write) memory maps of the decoded cache, so that processes
    that load the same dataset share its memory.

    The last `validation` training images are a validation set of their own. `mapped`: the images
    are maps of files that may be larger than the memory, which cannot be written to; read them in
    parts. `verified` says how much of the files was compared with their checksums.
    `known_checksums` are those of arrays that were read before. `files` are the names of the files
    that the images came from, if they did, test images after training images; `broken` the reasons
    why others were left out. `alike` are images that may have the same pixels, if that is known.
    `warnings` are what a run that uses the images should report.
    """

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.integer]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.integer]
    class_names: tuple[str, ...]
    validation: int = 0
    _: KW_ONLY
    mapped: bool = False
    verified: str = "all"
    known_checksums: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[str] = ()
    broken: Mapping[str, str] = field(default_factory=dict)
    alike: Groups | None = None
    warnings: tuple[str, ...] = ()

    @functools.cached_property
    def checksums(self) -> dict[str, str]:
        """The sha256 of each array in C order, by its name; computed once."""
        known = self.known_checksums
        return {name: known.get(name) or _sha256(getattr(self, name)) for name in ARRAYS}

    @functools.cached_property
    def equal(self) -> Groups:
        """Groups of images with the same pixels, test images counted on after training images."""
        return equal_images(self.train_images, self.test_images, self.alike)


def _sha256(array: NDArray[np.generic]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def class_names(names: Sequence[str | bytes], where: str) -> tuple[str, ...]:
    """Return the names of classes as text in one form; UsageError if one is empty or two are equal.

    `where` says whose they are. Bytes are taken for UTF-8. Unicode writes é in two ways, which are
    one name (NFC): a Mac and Linux name the same folder differently. What would move a terminal's
    cursor or colour it is written as an escape.
    """
    texts = [
        name.decode(errors="surrogateescape") if isinstance(name, bytes) else name for name in names
    ]
    clean = tuple(unicodedata.normalize("NFC", printable(text)) for text in texts)
    for name in clean:
        if not name.strip():
            raise UsageError(f"{where}: the name of a class is empty")
        if clean.count(name) > 1:
            raise UsageError(f"{where}: two classes are called {shorten(name)}")
    return clean
