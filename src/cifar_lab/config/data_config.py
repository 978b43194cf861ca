"""Settings of a run's images: the dataset, how it is split, and how training images are changed."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cifar_lab.config.schema import TargetConfig, setting, wrong
from cifar_lab.errors import UsageError


@dataclass(frozen=True)
class DatasetConfig:
    """Where the images come from, and what is known about them before anything is loaded.

    A `mean` or `std` of `auto` is replaced by the values of the training split before the run has
    an address: a run folder holds numbers, and `computed` names those that came so. A path of one's
    own data below the folder where the command was started is kept relative to it, `relative_to`.
    """

    name: str = setting(meaning="the name in run folders and figures")
    source: TargetConfig = setting(meaning="the function that loads the images")
    image_shape: list[int] = setting(meaning="channels (1 or 3), height and width")
    fit: Literal["crop", "resize", "pad"] = setting(
        "crop", "how a picture gets that size: cut off, distorted, or padded with black"
    )
    storage: Literal["auto", "memory", "mapped"] = setting(
        "auto", "where images are kept; auto maps above 1 GB or RAM / 4", identity=False
    )
    max_megapixels: float = setting(120.0, "larger pictures are refused", gt=0, identity=False)
    classes: list[str] | None = setting(None, "the names of label 0, 1, ...")
    relative_to: str | None = setting(None, "filled in: where source.path is", identity=False)
    limit: int | None = setting(None, "train on so many images, stratified", ge=2)
    train_size: int | None = setting(None, "images in the official training set", ge=1)
    test_size: int | None = setting(None, "images in the official test set", ge=1)
    mean: list[float] | Literal["auto"] | None = setting(
        None, "subtracted from pixels in [0, 1], per channel; null: 0; auto: computed"
    )
    std: list[float] | Literal["auto"] | None = setting(
        None, "what pixels are divided by, per channel; null: 1; auto: computed"
    )
    computed: list[Literal["mean", "std"]] = setting(
        factory=list, identity=False, meaning="filled in: which of mean and std came from auto"
    )
    checksums: dict[str, str] = setting(factory=dict, meaning="sha256 of the decoded arrays")
    display_names: list[str] | None = setting(None, "names that are shown instead", identity=False)
    licence: str | None = setting(None, "licence of the images", identity=False)

    @property
    def training_images(self) -> int | None:
        """How many images train and validate; None if that is known once they are loaded."""
        return self.train_size if self.limit is None else self.limit

    @property
    def located_source(self) -> TargetConfig:
        """The source, with the path of one's own data as it is found from any folder."""
        path, start = self.source.get("path"), self.relative_to
        if start is None or not isinstance(path, str) or not Path(start, path).exists():
            return self.source  # of somebody else's machine: as seen from here
        return {**self.source, "path": str(Path(start, path))}

    def check_limit(self, classes: int, size: int) -> None:
        """Refuse a limit that leaves out a class, or is above the `size` of the training set."""
        if self.limit is not None and not classes <= self.limit <= size:
            right = f"from {classes}, one for each class, to the {size:,} training images"
            raise wrong("dataset.limit", self.limit, right)

    def check(self, path: str) -> None:
        """Refuse an impossible shape, and statistics and names whose number does not match."""
        shape = self.image_shape
        if len(shape) != 3 or shape[0] not in (1, 3) or not all(1 <= n <= 4096 for n in shape):
            raise wrong(f"{path}.image_shape", shape, "[channels (1 or 3), height, width]")
        if self.limit is not None and self.train_size is not None:
            self.check_limit(len(self.classes or ()), self.train_size)
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            if isinstance(numbers, list) and len(numbers) != shape[0]:
                right = f"auto or {shape[0]} numbers, one per channel"
                raise wrong(f"{path}.{name}", numbers, right)
        if isinstance(self.std, list) and not all(s > 0 for s in self.std):
            raise wrong(f"{path}.std", self.std, "above 0")
        names = self.display_names
        if names is not None and self.classes and len(names) != len(self.classes):
            raise wrong(f"{path}.display_names", names, f"{len(self.classes)} names, one per class")


@dataclass(frozen=True)
class SplitConfig:
    """Which images validate: a fraction (below 1) or a number, from which official set, and how.

    With `folds`, `validation` is 1 / folds: over all folds each image validates once.
    `method`: `stratified` and `random` draw with `seed`; `tail` takes the last images (S1's
    published code); `numpy` permutes with numpy's RandomState(seed) (S0).
    `sampler`: how an epoch's order is drawn from the training indices; `weighted` and `subset`
    are torch's WeightedRandomSampler and SubsetRandomSampler (S1-06, S1-07).
    """

    validation: float = setting(0.1, "images that validate: a share below 1, or a number", ge=0)
    source: Literal["train", "test"] = setting("train", "the official set they are from (S0: test)")
    method: Literal["stratified", "random", "tail", "numpy"] = setting(
        "stratified", "how they are drawn; tail: the last ones; numpy: by its RandomState"
    )
    seed: int = setting(0, "draws the split, and nothing else", ge=0, le=2**32 - 1)
    folds: int | None = setting(None, "cross-validation: so many equal parts", ge=2, le=1000)
    fold: int | None = setting(None, "which part validates; split.fold=0,1,2 -m trains three", ge=0)
    sampler: Literal["permutation", "weighted", "subset"] = setting(
        "permutation", "how an epoch draws its images; weighted, subset: torch's samplers (S1)"
    )

    def held_out(self, size: int) -> int:
        """Return how many of the `size` images of the official set validate."""
        if self.folds is not None and self.fold is not None:
            return len(range(self.fold, size, self.folds))
        return round(self.validation * size) if self.validation < 1 else int(self.validation)

    def check(self, path: str) -> None:
        """Refuse half an image, and folds that do not exist or contradict other settings."""
        if self.validation >= 1 and self.validation != int(self.validation):
            right = "a fraction below 1 or a whole number"
            raise wrong(f"{path}.validation", self.validation, right)
        folds, fold = self.folds, self.fold
        if folds is None:
            if fold is not None:
                raise UsageError(f"{path}.fold={fold} needs {path}.folds: the number of folds")
            return
        if fold is None:
            every = ",".join(map(str, range(folds))) if folds <= 10 else f"range({folds})"
            raise UsageError(
                f"{path}.folds={folds} needs the fold that validates: "
                f"'{path}.fold={every}' -m trains all of them"
            )
        if fold >= folds:
            raise wrong(f"{path}.fold", fold, f"from 0 to {folds - 1}: {path}.folds is {folds}")
        fitting: dict[str, Any] = {"source": ["train"], "method": ["stratified", "random"]}
        for name, values in {**fitting, "validation": [1 / folds]}.items():
            if getattr(self, name) not in values:
                right = f"{' or '.join(map(str, values))} with {path}.folds={folds}"
                raise wrong(f"{path}.{name}", getattr(self, name), right)

    def count(self, size: int, images: str) -> int:
        """Return how many of `size` images validate; UsageError if too few are left.

        `images` says of which set they are.
        """
        count = self.held_out(size)
        if count >= size:
            right = f"less than the {size} images of {images}"
            raise wrong("split.validation", f"{self.validation:g}", right)
        if self.source == "train" and size - count < 2:
            raise UsageError(
                f"split.validation={self.validation:g} is wrong: it leaves 1 training image; batch "
                "norm needs at least 2"
            )
        return count


@dataclass(frozen=True)
class AugmentationConfig:
    """Random changes of the training images: padding before a random crop, a flip, and others.

    `padding_mode`: the padding is black, or reflects the image. `flips`: each image is mirrored at
    random, or in every second epoch (Jordan 2024, arXiv:2404.00498).
    """

    crop_padding: int = setting(0, "pixels around an image before a random crop", ge=0, le=64)
    padding_mode: Literal["zeros", "reflect"] = setting("zeros", "black or mirrored padding")
    horizontal_flip: bool = setting(False, "true mirrors every second image")
    flips: Literal["random", "alternating"] = setting("random", "by chance or every other epoch")
    policy: Literal["trivial_augment", "rand_augment"] | None = setting(None, "random changes")
    cutout: int = setting(0, "pixels: the side of a square that is erased", ge=0)
    erasing: float = setting(0.0, "share of images with an erased box", ge=0, le=1)
    mixup: float = setting(0.0, "add two images, with shares from Beta(mixup, mixup)", ge=0)
    cutmix: float = setting(0.0, "a box of another image, its area from Beta(cutmix, cutmix)", ge=0)


def keep_place(dataset: dict[str, Any]) -> None:
    """Write the path of one's own data in the one way in which it makes an address.

    Below the working directory it is relative to it, else absolute, however it was typed.
    """
    source = dataset.get("source")
    path = source.get("path") if isinstance(source, dict) else None
    if not isinstance(source, dict) or not isinstance(path, str) or not path.strip():
        return
    with contextlib.suppress(RuntimeError, FileNotFoundError):  # no such user, or no folder is here
        whole = Path(os.path.normpath(Path(path).expanduser().absolute()))
        source["path"], dataset["relative_to"] = str(whole), None
        if whole.is_relative_to(here := Path.cwd()):
            source["path"], dataset["relative_to"] = str(whole.relative_to(here)), str(here)
