"""The datasets: one file per origin, each with a function `load(...) -> ImageArrays`.

What they share is here: the arrays, the names of classes, a test set for images without one, and
what is computed from images: their statistics, equal ones, and what would tell their class.
"""

import functools
import hashlib
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cifar_lab.errors import UsageError, listing, printable, shorten

if TYPE_CHECKING:
    from cifar_lab.datasets.pictures import Traits

_PIXELS = 5_000_000  # per channel, that are counted at once
_FEW = 5  # pictures: fewer of one size or format say nothing about their class
_TELLING = 0.1  # share of pictures whose class a trait tells beyond chance
_DARK = 1 / 8  # of the range of deep pictures: 12 bits in 16 use a sixteenth

Groups = list[list[int]]
"""Positions of images with the same pixels; test images count on after the training images."""

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
        """Return the name of an array whose sha256 is another in `checksums`, if there is one."""
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
    _, counts = np.unique(labels, return_counts=True)
    exact = counts * (test_size / len(labels))
    shares = np.floor(exact).astype(int)
    largest = np.argsort(shares - exact, kind="stable")[: test_size - shares.sum()]
    shares[largest] += 1
    order = np.lexsort((np.random.Philox(0).random_raw(len(labels)), labels))  # class by class
    starts = np.cumsum(counts) - counts
    chosen = [order[first : first + n] for first, n in zip(starts, shares, strict=True)]
    test = np.sort(np.concatenate(chosen))
    return np.setdiff1d(np.arange(len(labels)), test), test


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
        "no test image, or no training image of some class; add images, or choose another share"
    )


def check_checksums(arrays: ImageArrays, checksums: Mapping[str, str], path: Path) -> ImageArrays:
    """Return custom data; UsageError if they do not have the checksums that the config states."""
    if name := arrays.wrong_array(checksums):
        raise UsageError(
            f"{path}: its {name} have sha256 {arrays.checksums[name]}, which is not that of "
            "dataset.checksums; restore the old data, or set 'dataset.checksums={}'"
        )
    return arrays


# --- statistics -----------------------------------------------------------------------------------


def pixel_statistics(
    images: NDArray[np.uint8], indices: NDArray[np.integer] | None = None
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
    """Return the groups of images with the same pixels, known by their sha256."""
    positions: defaultdict[str, list[int]] = defaultdict(list)
    for position, image in enumerate(chain(train, test)):
        positions[_sha256(image)].append(position)
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
