"""A fixed, stratified test set for images that come without one, and checks of one's own data."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cifar_lab.datasets import ImageArrays
from cifar_lab.datasets.store import array_checksums
from cifar_lab.errors import RequestError

SEED = 0


def held_out(
    labels: NDArray[np.integer], test_size: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return sorted train and test indices; each class gives its share of the `test_size` images.

    The shares are rounded by largest remainder. The draw depends on numpy's Philox bits alone,
    which stay the same from version to version, so that the split does too.
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
    """Return train and test indices; RequestError if a class or the test set would be empty."""
    if not 0 < fraction < 1:
        raise RequestError(
            f"dataset.source.test_fraction={fraction}: it must be between 0 and 1, such as 0.2"
        )
    train, test = held_out(labels, round(fraction * len(labels)))
    if len(test) == 0 or len(np.unique(labels[train])) < len(np.unique(labels)):
        raise RequestError(
            f"dataset.source.test_fraction={fraction}: of the {len(labels)} images in {path} it "
            "leaves none to test, or none of some class to learn from; add images or change it"
        )
    return train, test


def check_checksums(arrays: ImageArrays, checksums: Mapping[str, str], path: Path) -> None:
    """Raise RequestError if one's own data are not those that the checksums were taken of."""
    if not checksums:
        return
    for name, found in array_checksums(arrays).items():
        if checksums.get(name, found) != found:
            raise RequestError(
                f"{path}: its {name} are not those of dataset.checksums (sha256 {found}); "
                "put the old pictures back, or set dataset.checksums={}"
            )
