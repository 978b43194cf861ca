"""Images with the same pixels: within a set they count twice, and across sets they leak."""

import zlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from cifar_lab.errors import UsageError

Groups = list[list[int]]
"""Positions of images with the same pixels; test images count on after the training images."""


def groups_of_equal(keys: Iterable[Hashable]) -> Groups:
    """Return the positions of each key that is there more than once."""
    positions: defaultdict[Hashable, list[int]] = defaultdict(list)
    for position, key in enumerate(keys):
        positions[key].append(position)
    return [group for group in positions.values() if len(group) > 1]


def pixel_sum(image: NDArray[np.uint8]) -> int:
    """Return a number that is the same for equal images, and rarely for others.

    Those of CIFAR-10 take 0.2 s; digests would take a second.
    """
    return zlib.crc32(np.ascontiguousarray(image).data)


def equal_images(
    train: NDArray[np.uint8], test: NDArray[np.uint8], known: Groups | None = None
) -> Groups:
    """Return the groups of images with the same pixels; `known` have the same `pixel_sum`."""

    def image(position: int) -> NDArray[np.uint8]:
        rest = position - len(train)
        return np.asarray(train[position] if rest < 0 else test[rest])

    if known is None:
        known = groups_of_equal(pixel_sum(image(i)) for i in range(len(train) + len(test)))
    return [
        [candidates[i] for i in group]
        for candidates in known
        for group in groups_of_equal(image(position).tobytes() for position in candidates)
    ]


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
