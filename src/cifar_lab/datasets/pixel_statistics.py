"""Mean and standard deviation of the pixels of a set of images."""

import math
from typing import Any

import numpy as np

_PIXELS = 5_000_000  # per channel, that are counted at once


def pixel_statistics(
    images: np.ndarray[Any, np.dtype[np.uint8]],
    indices: np.ndarray[Any, np.dtype[np.integer]] | None = None,
) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel of uint8 (N, C, H, W), in [0, 1].

    Of all images, or of those at `indices`. Exact: computed from how often each of the 256 values
    occurs.
    """
    values = np.arange(256) / 255
    channels, pixels = images.shape[1], math.prod(images.shape[2:])
    chosen = np.arange(len(images)) if indices is None else indices
    size = max(1, _PIXELS // pixels)  # images at a time: they may be more than the memory holds
    counts = np.zeros((channels, 256), dtype=np.int64)
    for first in range(0, len(chosen), size):
        part = images[chosen[first : first + size]]
        for channel in range(channels):
            counts[channel] += np.bincount(part[:, channel].ravel(), minlength=256)
    means = [float(np.average(values, weights=row)) for row in counts]
    variances = [
        np.average((values - mean) ** 2, weights=row)
        for mean, row in zip(means, counts, strict=True)
    ]
    return means, [float(variance**0.5) for variance in variances]
