"""CIFAR-10 and CIFAR-100 as their authors pack them: a tar.gz of pickles, or its unpacked tree."""

import hashlib
import pickle
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cifar_lab.datasets import ImageArrays
from cifar_lab.datasets.download import SourceFailed, fetch, put_aside, sound
from cifar_lab.datasets.store import Source


@dataclass(frozen=True)
class Tree:
    """The archive of a CIFAR set and the files in it, each pickle known by its md5."""

    folder: str
    archive: str
    archive_md5: str
    address: str
    train: Sequence[tuple[str, str]]
    test: Sequence[tuple[str, str]]
    meta: tuple[str, str]
    labels_key: str
    names_key: str


def torchvision_tree(dataset: Any, labels_key: str) -> Tree:
    """Read the addresses and checksums from torchvision's own class of a CIFAR dataset."""
    return Tree(
        folder=dataset.base_folder,
        archive=dataset.filename,
        archive_md5=dataset.tgz_md5,
        address=dataset.url,
        train=[(name, md5) for name, md5 in dataset.train_list],
        test=[(name, md5) for name, md5 in dataset.test_list],
        meta=(dataset.meta["filename"], dataset.meta["md5"]),
        labels_key=labels_key,
        names_key=dataset.meta["key"],
    )


def sources(
    tree: Tree,
    root: Path,
    mirrors: Sequence[str],
    stall_seconds: float,
    patience_minutes: float,
) -> list[Source]:
    """Return where the set may be: the tree and the archive on disk, then each address."""
    archive = root / tree.archive

    def from_address(address: str) -> Source:
        def get(patient: bool) -> ImageArrays:
            fetch(
                address,
                archive,
                tree.archive_md5,
                stall_seconds=stall_seconds,
                patience_seconds=None if patient else 60 * patience_minutes,
            )
            return _from_archive(tree, archive)

        return Source(address, get)

    return [
        Source(str(root / tree.folder), lambda _: _from_folder(tree, root / tree.folder), True),
        Source(
            str(archive),
            lambda _: _from_archive(tree, archive) if sound(archive, tree.archive_md5) else None,
            True,
        ),
        *map(from_address, dict.fromkeys([tree.address, *mirrors])),
    ]


def _from_folder(tree: Tree, folder: Path) -> ImageArrays | None:
    if not folder.is_dir():
        return None

    def read(name: str) -> bytes | None:
        path = folder / name
        return path.read_bytes() if path.is_file() else None

    return _decode(tree, read, lambda name, why: put_aside(folder / name, why))


def _from_archive(tree: Tree, archive: Path) -> ImageArrays:
    # Nothing is unpacked to disk: only the files that the tree names are read, from the stream.
    found: dict[str, bytes] = {}
    with tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            if member.isreg() and (file := tar.extractfile(member)):
                found[member.name] = file.read()
    return _decode(tree, lambda name: found.get(f"{tree.folder}/{name}"), lambda *_: None)


def _decode(
    tree: Tree, read: Callable[[str], bytes | None], damaged: Callable[[str, str], None]
) -> ImageArrays:
    files = {}
    for name, md5 in [*tree.train, *tree.test, tree.meta]:
        content = read(name)
        if content is None:
            raise SourceFailed(f"{name} is missing")
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != md5:
            damaged(name, f"md5 {found}, expected {md5}")
            raise SourceFailed(f"{name} is damaged")
        files[name] = content

    def stack(names: Sequence[tuple[str, str]]) -> tuple[Any, Any]:
        # A pickle can run code: these were opened by nobody before their md5 was found right.
        batches = [pickle.loads(files[name], encoding="latin1") for name, _ in names]
        images = np.concatenate([batch["data"] for batch in batches]).astype(np.uint8)
        labels = np.concatenate([batch[tree.labels_key] for batch in batches]).astype(np.uint8)
        return images.reshape(-1, 3, 32, 32), labels

    class_names = pickle.loads(files[tree.meta[0]], encoding="latin1")[tree.names_key]
    return ImageArrays(*stack(tree.train), *stack(tree.test), class_names=tuple(class_names))
