"""What pictures are beside what they show, where a network could learn that instead."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cifar_lab.datasets.pictures import Traits
from cifar_lab.errors import listing, shorten

_FEW = 5  # pictures: fewer of one size or format say nothing about their class
_TELLING = 0.1  # share of pictures whose class a trait tells beyond chance
_DARK = 1 / 8  # of the range of deep pictures: 12 bits in 16 use a sixteenth


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
    traits: Sequence[Traits], labels: Sequence[int], class_names: Sequence[str]
) -> list[str]:
    """Return warnings of deep pictures that are nearly black, and of traits that tell the class."""
    warnings = []
    deep = [picture for picture in traits if picture.bits > 8]
    highest = max((picture.highest for picture in deep), default=1.0)
    if highest <= _DARK:
        warnings.append(
            f"{len(deep):,} pictures of {deep[0].bits} bits are nearly black: they use "
            f"{highest:.1%} of their range; multiply their values"
        )
    sizes = [f"{width}x{height}" for width, height in (picture.size for picture in traits)]
    for what, values in (
        ("format", [picture.format for picture in traits]),
        ("depth", [f"{picture.bits} bits" for picture in traits]),
        ("size", sizes),
    ):
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
