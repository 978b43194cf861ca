"""The datasets: one file per origin, each with a function `load(...) -> ImageArrays`.

What they share is here: the arrays, the names of classes, and a test set for images without one.
"""

import functools
import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

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
    why others were left out. `known_equal` is `equal`, if that was computed before. `warnings` are
    what a run that uses the images should report.
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
    known_equal: Groups | None = None
    warnings: tuple[str, ...] = ()

    @functools.cached_property
    def checksums(self) -> dict[str, str]:
        """The sha256 of each array in C order, by its name; computed once."""
        known = self.known_checksums
        return {name: known.get(name) or _sha256(getattr(self, name)) for name in ARRAYS}

    def wrong_array(self, checksums: Mapping[str, str]) -> str | None:
        """Return the name of an array whose sha256 is not the one in `checksums`, if there is one.

        Not all need be there.
        """
        wrong = (n for n in ARRAYS if n in checksums and checksums[n] != self.checksums[n])
        return next(wrong, None)

    @functools.cached_property
    def equal(self) -> Groups:
        """Groups of images with the same pixels, test images counted on after training images."""
        known = self.known_equal
        return equal_images(self.train_images, self.test_images) if known is None else known


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


def held_out(
    labels: NDArray[np.integer], test_size: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return sorted train and test indices, with `test_size` test images stratified by class.

    The number of each class is rounded by largest remainder. The draw depends only on the bits of
    numpy's Philox generator, which are the same in every version of numpy, and so is the split.
    """
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * (test_size / len(labels))
    shares = np.floor(exact).astype(int)
    largest = np.argsort(shares - exact, kind="stable")[: test_size - shares.sum()]
    shares[largest] += 1
    keys = np.random.Philox(0).random_raw(len(labels))
    test = [
        (members := np.flatnonzero(labels == label))[np.argsort(keys[members], kind="stable")][:n]
        for label, n in zip(classes, shares, strict=True)
    ]
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[np.concatenate(test)] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def held_out_fraction(
    labels: NDArray[np.integer], fraction: float, path: Path
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return train and test indices. Raises UsageError if a class or the test set is empty."""
    if 0 < fraction < 1:
        train, test = held_out(labels, round(fraction * len(labels)))
        if len(test) and len(np.unique(labels[train])) == len(np.unique(labels)):
            return train, test
    raise UsageError(
        f"dataset.source.test_fraction={fraction}: of the {len(labels)} images in {path} it leaves "
        "no test image, or no training image of some class; add images, or set it to 0.2 or so"
    )


def check_checksums(arrays: ImageArrays, checksums: Mapping[str, str], path: Path) -> ImageArrays:
    """Return custom data; UsageError if they do not have the checksums that the config states."""
    if name := arrays.wrong_array(checksums):
        raise UsageError(
            f"{path}: its {name} have sha256 {arrays.checksums[name]}, which is not that of "
            "dataset.checksums; restore the old data, or set 'dataset.checksums={}'"
        )
    return arrays
