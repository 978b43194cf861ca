"""FashionMNIST: 60,000 and 10,000 pictures of clothes of 1x28x28 in ten classes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cifar_lab.datasets import ImageArrays, idx
from cifar_lab.datasets.download import check_options
from cifar_lab.datasets.store import Source, obtain


def load(
    *,
    root: Path,
    checksums: Mapping[str, str],
    mirrors: Sequence[str] = (),
    stall_seconds: float = 20.0,
    patience_minutes: float = 10.0,
) -> ImageArrays:
    """Return FashionMNIST from the data folder, torchvision's address or the mirrors.

    The options are those of mnist. Raises NotNow if no source has the data.
    """
    check_options(mirrors, stall_seconds, patience_minutes)

    def sources() -> list[Source]:
        from torchvision.datasets import FashionMNIST

        idx_set = idx.torchvision_set(FashionMNIST, "FashionMNIST/raw")
        return idx.sources(idx_set, root, checksums, mirrors, stall_seconds, patience_minutes)

    way_out = f"put the four idx files, as .gz, into {root / 'FashionMNIST' / 'raw'}, or "
    return obtain("fashion_mnist", root, checksums, sources, way_out)
