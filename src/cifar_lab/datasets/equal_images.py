"""Images with the same pixels: within a set they count twice, and across sets they leak."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from cifar_lab.errors import UsageError

Groups = list[list[int]]
"""Positions of images with the same pixels; test images count on after the training images."""

_AT_ONCE = 4_000_000  # bytes that are hashed together, which a processor's cache holds


def pixel_hashes(images: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return a number for each of the images (N, C, H, W): equal images have equal numbers.

    Different images rarely have. It is a sum of products modulo 2^64, which takes 0.1 s for
    CIFAR-10, a sixth of what a digest of each image does.
    """
    size = images[:1].size
    padded = -(-size // 8) * 8
    generator = np.random.default_rng(0)
    factors = generator.integers(0, 2**63, padded // 8, dtype=np.uint64) * np.uint64(2) + np.uint64(
        1
    )
    hashes = np.empty(len(images), dtype=np.uint64)
    step = max(1, _AT_ONCE // max(size, 1))
    for first in range(0, len(images), step):
        part = images[first : first + step].reshape(-1, size)
        if padded != size:
            part = np.pad(part, [(0, 0), (0, padded - size)])
        hashes[first : first + step] = (np.ascontiguousarray(part).view(np.uint64) * factors).sum(
            axis=1, dtype=np.uint64
        )
    return hashes


def candidates(hashes: NDArray[np.uint64]) -> Groups:
    """Return the positions of equal hashes, where there are at least two."""
    order = np.argsort(hashes, kind="stable")
    ends = np.flatnonzero(np.diff(hashes[order])) + 1
    return [part.tolist() for part in np.split(order, ends) if len(part) > 1]


def equal_images(
    train: NDArray[np.uint8], test: NDArray[np.uint8], known: Groups | None = None
) -> Groups:
    """Return the groups of images with the same pixels; `known` are the candidates, if known."""
    if known is None:
        known = candidates(np.concatenate([pixel_hashes(train), pixel_hashes(test)]))

    def pixels(position: int) -> bytes:
        rest = position - len(train)
        return bytes((train[position] if rest < 0 else test[rest]).tobytes())

    groups: Groups = []
    for positions in known:
        by_pixels: dict[bytes, list[int]] = {}
        for position in positions:
            by_pixels.setdefault(pixels(position), []).append(position)
        groups += [group for group in by_pixels.values() if len(group) > 1]
    return groups


def check_leaks(
    groups: Groups, parts: Mapping[str, NDArray[np.integer]], labels: NDArray[np.integer]
) -> tuple[list[str], list[int]]:
    """Return warnings about equal images, and the positions of test images that are trained on.

    `parts` are the positions of the training, validation and test images; `labels` are those of all
    positions. Raises UsageError if the test set is a copy of the others.
    """
    part_of = {p: name for name, part in parts.items() for p in part.tolist()} if groups else {}
    counts = Counter[str]()
    trained_on: list[int] = []
    copied = 0  # images of the test set that are elsewhere, and those elsewhere that are in it
    for group in groups:
        members = [position for position in group if position in part_of]
        names = Counter(part_of[position] for position in members)
        for place, (name, count) in enumerate(names.items()):
            counts[f"{name} images that repeat another one"] += count - 1
            for other in list(names)[:place]:  # parts are in the order of positions
                counts[f"{name} images that are {other} images, too"] += count
        if len(names) > 1 and "test" in names:
            copied += len(members)
        if "training" in names:
            trained_on += [p for p in members if part_of[p] == "test"]
        counts["pictures with more than one label"] += len(set(labels[members].tolist())) > 1
    if copied and copied == sum(map(len, parts.values())):
        raise UsageError(
            "the test images are the training images: their pixels are the same; give others that "
            "are not trained on"
        )
    return [f"{what}: {count:,}" for what, count in counts.items() if count], trained_on
