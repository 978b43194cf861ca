"""A fixed, stratified test set for images that come without one."""

import numpy as np
from numpy.typing import NDArray

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
