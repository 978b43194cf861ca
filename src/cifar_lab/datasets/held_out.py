"""A fixed, stratified test set for images that come without one, and checks of custom data."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cifar_lab.datasets import ImageArrays
from cifar_lab.errors import UsageError

SEED = 0


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
    keys = np.random.Philox(SEED).random_raw(len(labels))
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


def check_checksums(arrays: ImageArrays, checksums: Mapping[str, str], path: Path) -> None:
    """Raise UsageError if custom data do not have the checksums that the config states."""
    if not checksums:
        return
    for name, digest in arrays.checksums.items():
        if checksums.get(name, digest) != digest:
            raise UsageError(
                f"{path}: its {name} have sha256 {digest}, which is not that of dataset.checksums; "
                "restore the old data, or set 'dataset.checksums={}'"
            )
