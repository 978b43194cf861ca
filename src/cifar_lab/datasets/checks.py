"""What is computed from images: their statistics, equal ones, and what would tell their class."""

import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cifar_lab.errors import UsageError, listing, shorten

if TYPE_CHECKING:
    from cifar_lab.datasets.pictures import Traits

_PIXELS = 5_000_000  # per channel, that are counted at once
_FEW = 5  # pictures: fewer of one size or format say nothing about their class
_TELLING = 0.1  # share of pictures whose class a trait tells beyond chance
_DARK = 1 / 8  # of the range of deep pictures: 12 bits in 16 use a sixteenth

Groups = list[list[int]]
"""Positions of images with the same pixels; test images count on after the training images."""


def pixel_statistics(
    images: np.ndarray[Any, np.dtype[np.uint8]],
    indices: np.ndarray[Any, np.dtype[np.integer]] | None = None,
) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel of uint8 (N, C, H, W), in [0, 1].

    Of all images, or of those at `indices`. Exact: computed from how often each of the 256 values
    occurs.
    """
    values = np.arange(256) / 255
    chosen = np.arange(len(images)) if indices is None else indices
    # Some images at a time: they may be more than the memory holds.
    size = max(1, _PIXELS // math.prod(images.shape[2:]))
    counts = np.zeros((images.shape[1], 256), dtype=np.int64)
    for first in range(0, len(chosen), size):
        part = images[chosen[first : first + size]]
        for channel, row in enumerate(counts):
            row += np.bincount(part[:, channel].ravel(), minlength=256)
    means = [float(np.average(values, weights=row)) for row in counts]
    deviations = [(values - mean) ** 2 for mean in means]
    variances = [np.average(d, weights=row) for d, row in zip(deviations, counts, strict=True)]
    return means, [float(variance**0.5) for variance in variances]


# --- images with the same pixels: they count twice in a set, and leak across sets -----------------


def equal_images(train: NDArray[np.uint8], test: NDArray[np.uint8]) -> Groups:
    """Return the groups of images with the same pixels.

    They are compared byte by byte where they share a CRC-32. Those of CIFAR-10 take 0.2 s; digests
    would take a second.
    """
    every = [*train, *test]
    sums = (zlib.crc32(np.ascontiguousarray(image).data) for image in every)
    return [
        [candidates[i] for i in group]
        for candidates in _repeated(sums)
        for group in _repeated(every[position].tobytes() for position in candidates)
    ]


def _repeated(keys: Iterable[Hashable]) -> Groups:
    """Return the positions of each key that is there more than once."""
    positions: defaultdict[Hashable, list[int]] = defaultdict(list)
    for position, key in enumerate(keys):
        positions[key].append(position)
    return [group for group in positions.values() if len(group) > 1]


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


# --- what pictures are beside what they show: a network could learn that instead ----------------


def is_constant(image: NDArray[np.uint8]) -> bool:
    """Whether all pixels of an image (C, H, W) are the same."""
    return bool((image == image[:, :1, :1]).all())


def constant_warning(names: Sequence[str], count: int) -> list[str]:
    """Return a warning if images, given by their names, are of one colour; there are `count`."""
    if not names:
        return []
    shown = listing([shorten(name, 60) for name in names], 100)
    return [f"{len(names):,} of {count:,} images are of one colour: {shown}"]


def trait_warnings(
    traits: "Sequence[Traits]", labels: Sequence[int], class_names: Sequence[str]
) -> list[str]:
    """Return warnings of dark deep pictures, of several in a file, of traits that tell a class."""
    warnings = []
    deep = [picture for picture in traits if picture.bits > 8]
    highest = max((picture.highest for picture in deep), default=1.0)
    if highest <= _DARK:
        warnings.append(
            f"{len(deep):,} pictures of {deep[0].bits} bits are nearly black: they use "
            f"{highest:.1%} of their range; multiply their values"
        )
    several = sum(picture.several for picture in traits)
    if several:
        warnings.append(f"of {several:,} pictures with more pages or frames the first one is used")
    values_of = {
        "format": [picture.format for picture in traits],
        "depth": [f"{picture.bits} bits" for picture in traits],
        "size": ["{}x{}".format(*picture.size) for picture in traits],
    }
    for what, values in values_of.items():
        warnings += _tells_class(what, values, labels, class_names)
    return warnings


def _tells_class(
    what: str, values: Sequence[str], labels: Sequence[int], class_names: Sequence[str]
) -> list[str]:
    """Warn if a picture's class follows from a trait more often than from the largest class."""
    classes_of: defaultdict[str, Counter[int]] = defaultdict(Counter)
    frequent = {value for value, count in Counter(values).items() if count >= _FEW}
    for value, label in zip(values, labels, strict=True):
        classes_of[value if value in frequent else "other"][label] += 1
    told = sum(max(counts.values()) for counts in classes_of.values())
    largest = max(Counter(labels).values(), default=0)
    if told - largest <= _TELLING * len(labels):
        return []
    examples = [
        f"{value} mostly {shorten(class_names[counts.most_common(1)[0][0]], 30)}"
        for value, counts in classes_of.items()
    ]
    return [
        f"the {what} of a picture tells its class in {told / len(labels):.0%} of cases "
        f"({listing(examples, 100)}): a network may learn that instead of what is shown"
    ]
