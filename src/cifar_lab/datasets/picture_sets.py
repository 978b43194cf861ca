"""The pictures of a dataset of one's own: which files, with which labels, decoded how."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cifar_lab.datasets.decoding import Decoded, decode_files
from cifar_lab.datasets.pictures import Fit, cannot_be_read
from cifar_lab.errors import UsageError, listing, shorten

SETS = ("train", "test")


@dataclass(frozen=True)
class PictureSets:
    """The files and labels of the sets train and test, and how each file becomes an image.

    `test_fraction` is what was held out of a folder that is not divided. `skip_broken`: files that
    cannot be decoded are left out, at most `max_broken` of them.
    """

    folder: Path
    class_names: tuple[str, ...]
    paths: dict[str, Sequence[Path]]
    labels: dict[str, NDArray[np.int64]]
    image_shape: tuple[int, ...]
    fit: Fit
    test_fraction: float
    skip_broken: bool
    max_broken: int

    def __len__(self) -> int:
        """Return the number of files."""
        return sum(len(self.paths[name]) for name in SETS)

    @property
    def nbytes(self) -> int:
        """The bytes of all decoded images."""
        return len(self) * prod(self.image_shape)

    def decode(self, name: str, broken: "BrokenPictures") -> Iterator[Decoded]:
        """Yield the pictures of a set with a progress bar; those that are broken are noted."""
        paths = self.paths[name]
        decoded = decode_files(paths, self.image_shape, self.fit)
        bar = tqdm(decoded, f"decoding {name}", len(paths), unit="picture", disable=None)
        for position, picture in enumerate(bar):
            if picture.error is not None:
                broken.add(name, position, picture.error)
            yield picture

    def remaining_labels(self, name: str, broken: Collection[int]) -> NDArray[np.int64]:
        """Return the labels of a set's pictures that are not at the `broken` positions."""
        return np.delete(self.labels[name], sorted(broken))


class BrokenPictures:
    """The pictures that cannot be decoded: by set, their positions and the reasons."""

    def __init__(self, sets: PictureSets, found: dict[str, dict[int, str]] | None = None) -> None:
        self._sets = sets
        self.found = found or {name: {} for name in SETS}

    def __len__(self) -> int:
        return sum(len(positions) for positions in self.found.values())

    def add(self, name: str, position: int, reason: str) -> None:
        """Note a picture; UsageError if there are more than are listed or skipped."""
        self.found[name][position] = shorten(reason, 100)
        self._check_number()

    def check(self) -> tuple[str, ...]:
        """Return a warning if some are skipped.

        Raises UsageError if they must not be, or if they leave a class or the test set empty.
        """
        if not len(self):
            return ()
        self._check_number()  # those of a cache were found with another limit
        if not self._sets.skip_broken:
            remedy = "remove it, or set dataset.source.skip_broken=true"
            [(path, reason), *others] = self._listed()
            if not others:
                raise UsageError(f"{cannot_be_read(path, reason)}; {remedy}")
            raise UsageError(
                f"{len(self)} of the {len(self._sets):,} pictures in {self._sets.folder} cannot "
                f"be read: {self._names(100)}; {remedy.replace('it,', 'them,')}"
            )
        left = {name: self._sets.remaining_labels(name, self.found[name]) for name in SETS}
        classes = self._sets.class_names
        absent = sorted(set(range(len(classes))) - set(left["train"].tolist()))
        if absent or not len(left["test"]):
            what = f"training picture of {classes[absent[0]]}" if absent else "test picture"
            raise UsageError(
                f"without the {len(self)} broken pictures, {self._sets.folder} has no {what}"
            )
        return (
            f"skipped {len(self)} of {len(self._sets):,} pictures that cannot be read: "
            f"{self._names(120)}",
        )

    def _check_number(self) -> None:
        if len(self) > self._sets.max_broken:
            raise UsageError(
                f"more than {self._sets.max_broken} of the {len(self._sets):,} pictures in "
                f"{self._sets.folder} cannot be read, such as {self._names(60)}; remove them, or "
                "raise dataset.source.max_broken"
            )

    def _listed(self) -> list[tuple[Path, str]]:
        return sorted(
            (self._sets.paths[name][position], reason)
            for name in SETS
            for position, reason in self.found[name].items()
        )

    def _names(self, length: int) -> str:
        paths = (path.relative_to(self._sets.folder) for path, _ in self._listed())
        return listing((shorten(path.as_posix(), 60) for path in paths), length)
