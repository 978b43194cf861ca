"""Batches of a split: an index, an augmentation and a normalisation.

Every random draw of an epoch is made at once by a CPU generator keyed by (seed, epoch), so the
batches are the same on every device and a resumed run continues exactly.
"""

import functools
import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from cifar_lab.config.data_config import AugmentationConfig
from cifar_lab.config.run_config import EvaluationConfig
from cifar_lab.training.augment import (
    EpochDraws,
    apply_policy,
    augment,
    draw_epoch,
    erase,
    mix,
    sample_augmentation,
)
from cifar_lab.training.device import derive_seed, memory_format
from cifar_lab.training.group import Group, Part
from cifar_lab.training.splits import Split

# Images that are cropped and flipped at once: on a GPU few kernel launches, on a CPU what stays in
# its cache.
_CHUNK = 2048
_CPU_CHUNK = 256
_SMALL_IMAGE = 3 * 32 * 32  # bytes up to which an image counts as one in these numbers


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
        numbers = 1 / (255 * spread), -torch.tensor(mean, dtype=torch.float64) / spread
        scale, shift = (n.to(device, torch.float32).view(-1, 1, 1) for n in numbers)
        return scale, shift


def batch_bounds(images: int, batch_size: int) -> list[tuple[int, int]]:
    """Return where the batches of an epoch begin and end.

    A last batch of one image, which batch norm cannot take, is merged into the batch before it.
    """
    starts = list(range(0, images, batch_size))
    if len(starts) > 1 and images - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], images], strict=True))


@dataclass(eq=False)
class Batches:
    """The training batches of each epoch: float images (B, C, H, W), labels (B,), on the device.

    Where images are mixed (mixup, CutMix), labels are the shares of the classes, (B, C).
    Every image comes once per epoch. In a `group` of processes each gets its part of every batch.
    """

    split: Split
    _: KW_ONLY
    batch_size: int
    seed: int
    normalisation: Normalisation
    augmentation: AugmentationConfig
    num_classes: int
    memory_format: torch.memory_format = torch.contiguous_format
    sampler: str = "permutation"
    group: Group = field(default_factory=Group)

    def __post_init__(self) -> None:
        if self.augmentation.policy is not None and self.split.device.type != "cpu":
            # A policy changes image after image, which would be a thousand launches a step.
            self.split = replace(self.split, images=self.split.images.cpu(), ahead=False)
        self.bounds = batch_bounds(len(self.split), self.batch_size)
        # What mixes images, or draws for one after another, needs the whole batch.
        changes = self.augmentation
        self._needs_whole = bool(changes.policy or changes.mixup or changes.cutmix)

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self.bounds)

    def part(self, batch: int) -> Part:
        """Return which rows of a batch this process computes."""
        begin, end = self.bounds[batch]
        return self.group.divide(end - begin)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of epoch `number`, from batch `start` on."""
        device, config = self.split.device, self.augmentation
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "data", number))
        # The order is drawn first and crops and flips next, from one generator: the bits of every
        # run depend on this order of draws.
        positions = self.split.indices[self.order(generator)]
        order, bounds = positions.to(device), self.bounds
        if not self._needs_whole:
            parts = [(begin, self.part(batch)) for batch, (begin, _) in enumerate(bounds)]
            bounds = [(begin + part.first, begin + part.last) for begin, part in parts]
        drawn = draw_epoch(
            config, self.split, positions, len(self), generator, seed=self.seed, epoch=number
        )
        at_once = self._batches_at_once()
        groups = [range(n, min(n + at_once, len(self))) for n in range(start, len(self), at_once)]
        chunks = [slice(bounds[group[0]][0], bounds[group[-1]][1]) for group in groups]
        read = read_images(self.split, positions, chunks)
        # In the order of torchvision's reference recipes: crop, flip and policy, then the rest.
        for group, chunk, chosen in zip(groups, chunks, read, strict=True):
            reflect = config.padding_mode == "reflect"
            images = augment(chosen, config.crop_padding, drawn.crops, chunk, reflect=reflect)
            places = {n: slice(*(edge - chunk.start for edge in bounds[n])) for n in group}
            if config.policy is not None:  # on the host
                seeds = {n: derive_seed(self.seed, "policy", number, n) for n in group}
                changed = [apply_policy(images[places[n]], config.policy, seeds[n]) for n in group]
                images = torch.cat(changed)
            images = images.to(device)
            # A GPU normalises a chunk at once, in a third of the launches; a CPU keeps a batch in
            # its cache.
            if device.type != "cpu":
                images = self.normalisation(images, self.memory_format)
            labels = self.split.labels.index_select(0, order[chunk])
            for batch, place in places.items():
                yield self._finish(images[place], labels[place], batch, bounds[batch], drawn)

    def _finish(
        self, images: Tensor, labels: Tensor, batch: int, bounds: tuple[int, int], drawn: EpochDraws
    ) -> tuple[Tensor, Tensor]:
        """Return a batch normalised, erased and mixed, and its labels or the shares of classes."""
        if images.dtype == torch.uint8:
            images = self.normalisation(images, self.memory_format)
        for boxes in drawn.boxes:
            images = erase(images, boxes[slice(*bounds)])
        if drawn.mixings:
            images, labels = mix(images, labels, drawn.mixings[batch], self.num_classes)
        if self._needs_whole:
            own = self.part(batch)
            images, labels = images[own.first : own.last], labels[own.first : own.last]
        return images, labels

    def _batches_at_once(self) -> int:
        """Return how many batches are read, cropped and flipped at once."""
        if self.group.world > 1:  # whose parts of the batches are not adjacent
            return 1
        size = _CPU_CHUNK if self.split.device.type == "cpu" else _CHUNK
        size = min(size, size * _SMALL_IMAGE // self.split.images[0].numel())
        return max(1, math.ceil(size / self.batch_size))

    def order(self, generator: torch.Generator) -> Tensor:
        """Return the positions within the split in the order of an epoch (a permutation)."""
        count = len(self.split)
        if self.sampler == "permutation":
            return torch.randperm(count, generator=generator)
        from torch.utils.data import SubsetRandomSampler, WeightedRandomSampler

        if self.sampler == "subset":
            return torch.tensor(list(SubsetRandomSampler(range(count), generator)))
        return torch.tensor(list(WeightedRandomSampler([1.0] * count, count, False, generator)))


def in_order(
    split: Split,
    evaluation: EvaluationConfig,
    normalisation: Normalisation,
    *,
    crop_seed: int = 0,
    every: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a split's batches in its order; with a `crop_padding` cropped at random, as S0 did.

    `every` (first, step) leaves out all batches but each `step`-th from the `first` on.
    """
    device = split.device
    layout = memory_format(str(device))
    padding, size = evaluation.crop_padding, evaluation.batch_size
    generator = torch.Generator().manual_seed(crop_seed)
    crop = AugmentationConfig(crop_padding=padding)
    params = sample_augmentation(len(split), crop, generator, device)
    indices = split.indices.to(device)
    parts = [slice(first, first + size) for first in range(0, len(split), size)]
    parts = parts[every[0] :: every[1]]
    for part, chosen in zip(parts, read_images(split, split.indices, parts), strict=True):
        images = augment(chosen, padding, params, part)
        yield normalisation(images, layout), split.labels.index_select(0, indices[part])


def read_images(
    split: Split, order: Tensor, parts: Sequence[slice]
) -> Generator[Tensor, None, None]:
    """Yield the images, uint8 (B, C, H, W) on the split's device, at each part of `order`.

    `order` are indices (M,) of the official set, on the CPU. Where the split's images are read
    ahead, a thread gathers the next part while the caller works on one; the images are the same.
    """
    if not split.ahead:
        on_device = order.to(split.images.device)
        for part in parts:
            yield split.images.index_select(0, on_device[part])
        return
    source, places = split.images.numpy(), order.numpy()
    pinned = split.device.type == "cuda"  # what is pinned is copied without waiting for it

    def gather(part: slice) -> Tensor:
        chosen = places[part]
        rows = torch.empty((len(chosen), *source.shape[1:]), dtype=torch.uint8, pin_memory=pinned)
        # numpy copies rows without further threads, which would take the training step's cores.
        np.take(source, chosen, axis=0, out=rows.numpy(), mode="clip")
        return rows

    with ThreadPoolExecutor(1, thread_name_prefix="images") as thread:
        coming = deque(thread.submit(gather, part) for part in parts[:1])
        for number in range(1, len(parts) + 1):
            if number < len(parts):
                coming.append(thread.submit(gather, parts[number]))
            # Here and not in the thread: copies to MPS from a second thread can abort the process
            # (pytorch/pytorch#197805), and a second CUDA stream needs waits of its own.
            yield coming.popleft().result().to(split.device, non_blocking=pinned)
