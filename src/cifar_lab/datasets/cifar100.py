"""CIFAR-100: 50,000 and 10,000 images of 3x32x32 in a hundred (fine) classes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cifar_lab.datasets import ImageArrays, cifar_tree
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
    """Return CIFAR-100 from the data folder, torchvision's address or the mirrors.

    The options are those of cifar10. Raises NotNow if no source has the data.
    """
    check_options(mirrors, stall_seconds, patience_minutes)

    def sources() -> list[Source]:
        from torchvision.datasets import CIFAR100

        tree = cifar_tree.torchvision_tree(CIFAR100, "fine_labels")
        return cifar_tree.sources(tree, root, mirrors, stall_seconds, patience_minutes)

    way_out = f"put cifar-100-python.tar.gz into {root}, or "
    return obtain("cifar100", root, checksums, sources, way_out)
