"""Images that are nearly equal, or hardly images at all, as cleanvision finds them."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from cifar_lab.config.data_config import DatasetConfig
from cifar_lab.datasets import ImageArrays
from cifar_lab.errors import listing, missing_extra, shorten

_SHOWN = 160  # characters of names in a line


class _Images:
    """The images of both sets as cleanvision takes them: a sequence of (PIL image, label)."""

    def __init__(self, arrays: ImageArrays) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays.train_labels) + len(self.arrays.test_labels)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        from PIL import Image

        if position >= len(self):  # what ends a loop over a sequence
            raise IndexError(position)
        rest = position - len(self.arrays.train_labels)
        images = self.arrays.train_images if rest < 0 else self.arrays.test_images
        pixels = np.asarray(images[position if rest < 0 else rest]).transpose(1, 2, 0)
        return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), 0


def check_images(dataset: DatasetConfig, arrays: ImageArrays) -> list[str]:
    """Return lines on near duplicates, and on dark, light, blurred, empty and odd images.

    Near duplicates have the same perceptual hash. Pictures from files are judged as they are there,
    so that odd sizes are seen. Raises UsageError if cleanvision is not installed.
    """
    try:
        from cleanvision import Imagelab
    except ImportError:
        raise missing_extra("--check-data", "cleanvision", "check") from None
    if arrays.files:
        folder = Path(str(dataset.source["path"])).expanduser()
        lab = Imagelab(filepaths=[str(folder / name) for name in arrays.files])
    else:
        lab = Imagelab(torchvision_dataset=_Images(arrays))
    lab.find_issues(n_jobs=1, verbose=False)
    issues = lab.issues.reset_index(drop=True)  # by position, where they are by path
    positions = {path: i for i, path in enumerate(lab.issues.index)}
    first_test = len(arrays.train_labels)

    def name(position: int) -> str:
        if arrays.files:
            return shorten(arrays.files[position], 60)
        rest = position - first_test
        return f"training image {position}" if rest < 0 else f"test image {rest}"

    lines = [f"checked {len(issues):,} images with cleanvision"]
    groups = [[positions[path] for path in g] for g in lab.info["near_duplicates"]["sets"]]
    across = [g for g in groups if min(g) < first_test <= max(g)]
    if groups:
        examples = [" = ".join(name(i) for i in group[:3]) for group in across or groups]
        lines.append(
            f"near duplicates: {sum(map(len, groups)):,} images in {len(groups):,} groups, of "
            f"which {len(across):,} lie across training and test: {listing(examples, _SHOWN)}"
        )
    columns = [c for c in issues.columns if c.startswith("is_") and "duplicates" not in c]
    found = {c: np.flatnonzero(issues[c].to_numpy(dtype=bool)).tolist() for c in columns}
    # What all have in common, such as grey digits, is no news.
    counts = Counter({c: len(p) for c, p in found.items() if 0 < len(p) < len(issues)})
    for column, count in counts.most_common():
        what = column.removeprefix("is_").removesuffix("_issue").replace("_", " ")
        lines.append(f"{what}: {count:,}: {listing(map(name, found[column]), _SHOWN)}")
    return lines
