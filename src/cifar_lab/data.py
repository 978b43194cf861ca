"""Images as uint8 tensors where the model lives: splits, batches, augmentation.

A batch is an index, a crop, a flip and a normalisation. Every random draw of an epoch is made at
once by a CPU generator keyed by (seed, epoch), so the batches are the same on every device and a
resumed run continues exactly.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cifar_lab.components import build
from cifar_lab.config import AugmentationConfig, DatasetConfig, SplitConfig
from cifar_lab.datasets import ImageArrays
from cifar_lab.device import derive_seed
from cifar_lab.errors import RequestError

# Images that are cropped and flipped at once: on a GPU few kernel launches, on a CPU what stays in
# its cache.
_CHUNK = 2048
_CPU_CHUNK = 256


@dataclass(frozen=True)
class Split:
    """Some images of an official set: `images` uint8 (N, C, H, W) and `labels` int64 (N,) of the
    whole set on the device, and the `indices` int64 (M,) of those that belong to the split.

    The whole set is kept, not a copy of the part: parallel runs share its pages.
    """

    name: str
    images: Tensor
    labels: Tensor
    indices: Tensor

    def __len__(self) -> int:
        """Return M, the number of images."""
        return len(self.indices)


@dataclass(frozen=True)
class Splits:
    """What a run trains, validates and tests on; `validation` is None if nothing is held out."""

    train: Split
    validation: Split | None
    test: Split
    official_test: Split
    class_names: tuple[str, ...]
    checked: str


@dataclass(frozen=True)
class Normalisation:
    """Turns uint8 into float: x / 255, then (x - mean) / std per channel where these are given."""

    mean: Sequence[float] | None
    std: Sequence[float] | None

    def __call__(self, images: Tensor, memory_format: torch.memory_format) -> Tensor:
        """Return float32 (B, C, H, W) in the given layout."""
        mean = tuple(self.mean or [0.0] * images.shape[1])
        std = tuple(self.std or [1.0] * images.shape[1])
        scale, shift = _scale_and_shift(mean, std, images.device)
        scaled = images.to(torch.float32).mul_(scale)
        # The addition changes the layout too: another pass, or a pass over pixels of three
        # channels each, costs as much as all the rest.
        normalised = torch.empty_like(scaled, memory_format=memory_format)
        return torch.add(scaled, shift, out=normalised)


@functools.lru_cache(maxsize=16)
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        spread = torch.tensor(std, dtype=torch.float64)
        scale = 1 / (255 * spread)
        shift = -torch.tensor(mean, dtype=torch.float64) / spread
        return (
            scale.to(device, torch.float32).view(-1, 1, 1),
            shift.to(device, torch.float32).view(-1, 1, 1),
        )


def load_arrays(dataset: DatasetConfig, root: Path) -> ImageArrays:
    """Return a dataset's arrays, checked against the facts in its config.

    Images smaller than `image_shape` are zero-padded around (MNIST at 32x32, S2's reading R2).
    """
    arrays: ImageArrays = build(
        dataset.source, "dataset.source", root=root, checksums=dataset.checksums
    )
    channels, height, width = dataset.image_shape
    for name in ("train", "test"):
        images = getattr(arrays, f"{name}_images")
        expected = getattr(dataset, f"{name}_size")
        if expected is not None and len(images) != expected:
            raise RequestError(
                f"dataset.{name}_size={expected} is wrong: {dataset.name} has {len(images)} images"
            )
        if images.shape[1] != channels or images.shape[2] > height or images.shape[3] > width:
            raise RequestError(
                f"dataset.image_shape={dataset.image_shape}, but the images of {dataset.name} are "
                f"{list(images.shape[1:])}; set dataset.image_shape={list(images.shape[1:])}"
            )
    for name in ("classes", "display_names"):
        names = getattr(dataset, name)
        if names is not None and len(names) != len(arrays.class_names):
            raise RequestError(
                f"dataset.{name} has {len(names)} names, but {dataset.name} has "
                f"{len(arrays.class_names)} classes: {', '.join(arrays.class_names[:20])}"
            )
    return arrays


def make_splits(
    arrays: ImageArrays, dataset: DatasetConfig, split: SplitConfig, device: str
) -> Splits:
    """Divide the official sets and move them to the device; the parts are checked disjoint."""
    train, validation, test = split_indices(split, arrays.train_labels, arrays.test_labels)
    official = {
        name: (
            _to_device(getattr(arrays, f"{name}_images"), dataset.image_shape, device),
            torch.from_numpy(np.array(getattr(arrays, f"{name}_labels"), dtype=np.int64)).to(
                device
            ),
        )
        for name in ("train", "test")
    }

    def part(
        name: str, origin: str, indices: "np.ndarray[tuple[int], np.dtype[np.int64]]"
    ) -> Split:
        return Split(name, *official[origin], torch.from_numpy(indices))

    checked = check_disjoint(
        {
            "train": ("train", train),
            "validation": (split.source, validation),
            "test": ("test", test),
        }
    )
    return Splits(
        train=part("train", "train", train),
        validation=part("validation", split.source, validation) if len(validation) else None,
        test=part("test", "test", test),
        official_test=part("test", "test", np.arange(len(arrays.test_labels))),
        class_names=tuple(dataset.classes or arrays.class_names),
        checked=checked,
    )


def split_indices(
    split: SplitConfig,
    train_labels: "np.ndarray[tuple[int], np.dtype[np.integer]]",
    test_labels: "np.ndarray[tuple[int], np.dtype[np.integer]]",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the sorted indices of the training, validation and test images.

    Training and validation indices count within the official training set, unless `source` is
    "test": then validation and test divide the official test set (S0) and all the rest trains.
    """
    labels = train_labels if split.source == "train" else test_labels
    size = len(labels)
    count = round(split.validation * size) if split.validation < 1 else int(split.validation)
    if count >= size:
        raise RequestError(
            f"split.validation={split.validation:g} is wrong: it must be less than the {size} "
            f"images of the {split.source} set"
        )
    validation = _choose(split, labels, count)
    rest = np.setdiff1d(np.arange(size), validation)
    if split.source == "train":
        return rest, validation, np.arange(len(test_labels))
    return np.arange(len(train_labels)), validation, rest


def check_disjoint(parts: dict[str, tuple[str, np.ndarray]]) -> str:
    """Return a line that says the parts are disjoint; ValueError where two share an image.

    Parts are {name: (official set, indices)}; only those of one official set can overlap.
    """
    names = list(parts)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            (origin, a), (other, b) = parts[first], parts[second]
            shared = len(np.intersect1d(a, b)) if origin == other else 0
            if shared:
                raise ValueError(f"{shared} images are in both the {first} and the {second} split")
    sizes = ", ".join(f"{name} {len(indices):,}" for name, (_, indices) in parts.items())
    return f"splits verified disjoint: {sizes}"


class Batches:
    """The training batches of each epoch: float images (B, C, H, W), labels (B,), on the device.

    Every image comes once an epoch. A last batch of one image, which batch norm cannot take, is
    joined to the one before it.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        normalisation: Normalisation,
        augmentation: AugmentationConfig,
        memory_format: torch.memory_format = torch.contiguous_format,
        sampler: str = "permutation",
    ) -> None:
        self.split = split
        self.seed = seed
        self.normalisation = normalisation
        self.augmentation = augmentation
        self.memory_format = memory_format
        self.sampler = sampler
        starts = list(range(0, len(split), batch_size))
        if len(starts) > 1 and len(split) - starts[-1] == 1:
            starts.pop()
        self.bounds = list(zip(starts, [*starts[1:], len(split)], strict=True))

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self.bounds)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of epoch `number`, from batch `start` on."""
        device = self.split.images.device
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "data", number))
        order = self.split.indices[self._order(generator)].to(device)
        draws = draw(len(order), self.augmentation, generator, device)
        if self.augmentation.flips == "alternating" and draws.flip is not None:
            mirrored = self._alternating_flips(number).to(device)
            draws = dataclasses.replace(draws, flip=mirrored[order])
        size = _CPU_CHUNK if device.type == "cpu" else _CHUNK
        position = start
        while position < len(self.bounds):
            first = self.bounds[position][0]
            batches = [self.bounds[position]]
            while batches[-1][1] - first < size and position + len(batches) < len(self.bounds):
                batches.append(self.bounds[position + len(batches)])
            chunk = slice(first, batches[-1][1])
            images = self.split.images.index_select(0, order[chunk])
            images = augment(
                images,
                self.augmentation.crop_padding,
                draws,
                chunk,
                reflect=self.augmentation.padding_mode == "reflect",
            )
            labels = self.split.labels.index_select(0, order[chunk])
            for begin, end in batches:
                part = slice(begin - first, end - first)
                yield self.normalisation(images[part], self.memory_format), labels[part]
            position += len(batches)

    def _alternating_flips(self, number: int) -> Tensor:
        """Return which images of the official set (N,) epoch `number` mirrors: not two in a row."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "flips"))
        first = torch.randint(2, (len(self.split.images),), generator=generator)
        return (first + number) % 2 == 1

    def _order(self, generator: torch.Generator) -> Tensor:
        """Return the positions within the split in the order of an epoch (a permutation)."""
        count = len(self.split)
        if self.sampler == "permutation":
            return torch.randperm(count, generator=generator)
        from torch.utils.data import SubsetRandomSampler, WeightedRandomSampler

        if self.sampler == "subset":
            positions = range(count)
            return torch.tensor(list(SubsetRandomSampler(positions, generator=generator)))
        weights = [1.0] * count
        weighted = WeightedRandomSampler(weights, count, replacement=False, generator=generator)
        return torch.tensor(list(weighted))


@dataclass(frozen=True)
class Draws:
    """The random numbers of a pass over N images: crop offsets (N,) and flips (N,), or None."""

    top: Tensor | None
    left: Tensor | None
    flip: Tensor | None


def draw(
    count: int, augmentation: AugmentationConfig, generator: torch.Generator, device: torch.device
) -> Draws:
    """Draw the augmentation of `count` images: offsets uniform in 0..2*padding, flips fair."""
    span = 2 * augmentation.crop_padding + 1
    top = left = flip = None
    if span > 1:
        top = torch.randint(span, (count,), generator=generator).to(device)
        left = torch.randint(span, (count,), generator=generator).to(device)
    if augmentation.horizontal_flip:
        flip = torch.randint(2, (count,), generator=generator).bool().to(device)
    return Draws(top, left, flip)


def augment(
    images: Tensor, padding: int, draws: Draws, part: slice, *, reflect: bool = False
) -> Tensor:
    """Return uint8 images (B, C, H, W) cropped from their padded selves, and flipped.

    The same as torchvision's `crop(pad(image, padding), top, left, H, W)`, then `hflip`; the
    padding is 0, or with `reflect` the mirrored image (padding_mode="reflect").
    """
    if draws.top is None and draws.flip is None:
        return images
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device).expand(len(images), -1)
    columns = torch.arange(width, device=images.device).expand(len(images), -1)
    if draws.flip is not None:
        columns = torch.where(draws.flip[part, None], width - 1 - columns, columns)
    if draws.top is not None and draws.left is not None:
        rows = rows + draws.top[part, None]
        columns = columns + draws.left[part, None]
        if reflect:
            rows = _reflected(rows - padding, height)
            columns = _reflected(columns - padding, width)
        else:
            images = functional.pad(images, [padding] * 4)
    pixels = rows[:, :, None] * images.shape[3] + columns[:, None, :]
    wanted = pixels.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    cropped = images.flatten(2).gather(2, wanted)
    return cropped.view(*images.shape[:2], height, width)


def in_order(
    split: Split,
    *,
    batch_size: int,
    normalisation: Normalisation,
    memory_format: torch.memory_format = torch.contiguous_format,
    crop_padding: int = 0,
    crop_seed: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a split's batches in its order, for evaluation; cropped at random only for S0-06."""
    device = split.images.device
    generator = torch.Generator().manual_seed(crop_seed)
    draws = draw(len(split), AugmentationConfig(crop_padding=crop_padding), generator, device)
    indices = split.indices.to(device)
    for first in range(0, len(split), batch_size):
        part = slice(first, first + batch_size)
        images = split.images.index_select(0, indices[part])
        images = augment(images, crop_padding, draws, part)
        yield normalisation(images, memory_format), split.labels.index_select(0, indices[part])


def _reflected(positions: Tensor, size: int) -> Tensor:
    """Return positions outside 0..size-1 mirrored at the first and the last pixel."""
    last = size - 1
    return last - (last - positions.abs()).abs()


def _choose(split: SplitConfig, labels: np.ndarray, count: int) -> np.ndarray:
    size = len(labels)
    if split.method == "tail":
        return np.arange(size - count, size)
    if split.method == "numpy":
        return np.sort(np.random.RandomState(split.seed).permutation(size)[:count])
    generator = np.random.default_rng(split.seed)
    if split.method == "random":
        return np.sort(generator.permutation(size)[:count])
    classes, totals = np.unique(labels, return_counts=True)
    exact = totals * count / size
    quota = np.floor(exact).astype(int)
    for index in np.argsort(quota - exact, kind="stable")[: count - quota.sum()]:
        quota[index] += 1
    chosen = [
        generator.permutation(np.flatnonzero(labels == label))[:n]
        for label, n in zip(classes, quota, strict=True)
    ]
    return np.sort(np.concatenate(chosen)) if chosen else np.arange(0)


def _to_device(images: np.ndarray, shape: Sequence[int], device: str) -> Tensor:
    tensor = torch.from_numpy(images).to(device)
    missing = [shape[1] - images.shape[2], shape[2] - images.shape[3]]
    if any(missing):
        (above, before) = (n // 2 for n in missing)
        tensor = functional.pad(tensor, [before, missing[1] - before, above, missing[0] - above])
    return tensor
