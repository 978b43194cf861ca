"""Augmentations: crop and flip, policies of torchvision, erased boxes, mixed images.

All draws come from CPU generators keyed by (seed, epoch), each kind from one of its own: an
augmentation changes no draw of another one, and a resumed run continues exactly.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cifar_lab.config.data_config import AugmentationConfig
from cifar_lab.training.device import derive_seed, seeded
from cifar_lab.training.splits import Split

# Zhong et al. 2017 (arXiv:1708.04896), as torchvision.transforms.RandomErasing has it.
_ERASED_AREA = (0.02, 0.33)
_ERASED_RATIO = (0.3, 3.3)
_ERASING_TRIES = 10


@dataclass(frozen=True)
class Mixing:
    """How a batch is mixed with itself moved on by one image.

    `share` is that of the image itself; `box`, (top, bottom, left, right), is cut from the other
    image (CutMix), None where the images are added up (mixup).
    """

    share: float
    box: tuple[int, int, int, int] | None


@dataclass(frozen=True)
class AugmentationParams:
    """The random augmentation of N images: crop offsets (N,) and flips (N,), None where unused."""

    top: Tensor | None
    left: Tensor | None
    flip: Tensor | None


@dataclass(frozen=True)
class EpochDraws:
    """What is drawn at once for an epoch: for its N images in their order, and for its batches.

    `boxes` (N, 4) are erased; `mixings` has one for each batch, or none where nothing is mixed.
    """

    crops: AugmentationParams
    boxes: list[Tensor]
    mixings: list[Mixing]


def draw_epoch(
    config: AugmentationConfig,
    split: Split,
    order: Tensor,
    batches: int,
    generator: torch.Generator,
    *,
    seed: int,
    epoch: int,
) -> EpochDraws:
    """Draw the augmentations of an epoch of so many batches, for images of `split` in an order.

    The order is of indices (N,) on the CPU; `generator` draws crops and flips.
    """
    device, count = split.device, len(order)
    cropped_on = device if split.ahead else split.images.device
    crops = sample_augmentation(count, config, generator, cropped_on)
    if config.flips == "alternating" and config.horizontal_flip:
        # Each image in every second epoch, from a random one of the first two on (Jordan 2024,
        # arXiv:2404.00498).
        generator = torch.Generator().manual_seed(derive_seed(seed, "flips"))
        first = torch.randint(2, (len(split.images),), generator=generator)
        mirrored = (first + epoch) % 2 == 1
        crops = replace(crops, flip=mirrored[order].to(cropped_on))
    shape = (split.images.shape[2], split.images.shape[3])
    boxes = []
    if config.cutout:
        generator = torch.Generator().manual_seed(derive_seed(seed, "cutout", epoch))
        boxes.append(sample_cutout(count, config.cutout, shape, generator).to(device))
    if config.erasing:
        generator = torch.Generator().manual_seed(derive_seed(seed, "erasing", epoch))
        boxes.append(sample_erasing(count, config.erasing, shape, generator).to(device))
    mixings = sample_mixings(config, batches, shape, derive_seed(seed, "mixing", epoch))
    return EpochDraws(crops, boxes, mixings)


def sample_augmentation(
    count: int, augmentation: AugmentationConfig, generator: torch.Generator, device: torch.device
) -> AugmentationParams:
    """Draw the augmentation of `count` images: offsets uniform in 0..2*padding, flips fair."""
    span = 2 * augmentation.crop_padding + 1
    top = left = flip = None
    if span > 1:
        top = torch.randint(span, (count,), generator=generator).to(device)
        left = torch.randint(span, (count,), generator=generator).to(device)
    if augmentation.horizontal_flip:
        flip = torch.randint(2, (count,), generator=generator).bool().to(device)
    return AugmentationParams(top, left, flip)


def augment(
    images: Tensor, padding: int, params: AugmentationParams, part: slice, *, reflect: bool = False
) -> Tensor:
    """Return uint8 images (B, C, H, W), padded, cropped to their size again, and flipped.

    The same as torchvision's `crop(pad(image, padding), top, left, H, W)`, then `hflip`; the
    padding is 0, or with `reflect` the mirrored image (padding_mode="reflect").
    """
    if params.top is None and params.flip is None:
        return images
    height, width = images.shape[2:]
    # One gather for crop and flip, by computed positions: a loop over images would cost a launch
    # each on a GPU, and torchvision draws one crop for a whole batch.
    rows = torch.arange(height, device=images.device).expand(len(images), -1)
    columns = torch.arange(width, device=images.device).expand(len(images), -1)
    if params.flip is not None:
        columns = torch.where(params.flip[part, None], width - 1 - columns, columns)
    if params.top is not None and params.left is not None:
        rows = rows + params.top[part, None]
        columns = columns + params.left[part, None]
        if reflect:
            rows = _reflected(rows - padding, height)
            columns = _reflected(columns - padding, width)
        else:
            images = functional.pad(images, [padding] * 4)
    pixels = rows[:, :, None] * images.shape[3] + columns[:, None, :]
    wanted = pixels.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    cropped = images.flatten(2).gather(2, wanted)
    return cropped.view(*images.shape[:2], height, width)


def _reflected(positions: Tensor, size: int) -> Tensor:
    """Return positions outside 0..size-1 mirrored at the first and the last pixel."""
    last = size - 1
    return last - (last - positions.abs()).abs()


def apply_policy(images: Tensor, name: str, seed: int) -> Tensor:
    """Return uint8 images (B, C, H, W), each changed by torchvision's transform of this name.

    The transform draws from torch's global generator, which is seeded for this batch and has its
    own state again afterwards.
    """
    transform = _policy(name)
    with seeded(seed):
        # Image by image: for a batch, torchvision would draw one change for all of it.
        return torch.stack([transform(image) for image in images])


@functools.cache
def _policy(name: str) -> Any:
    from torchvision.transforms import v2  # slow to import, and needed by few runs

    return {"trivial_augment": v2.TrivialAugmentWide, "rand_augment": v2.RandAugment}[name]()


def sample_cutout(
    count: int, size: int, shape: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """Return boxes (count, 4) of [top, bottom, left, right]: squares of `size` pixels.

    Their centers are uniform over the image, and what lies outside of it is cut off (DeVries and
    Taylor 2017, arXiv:1708.04552).
    """
    edges = []
    for length in shape:
        center = torch.randint(length, (count,), generator=generator)
        first = center - size // 2
        edges += [first.clamp(min=0), (first + size).clamp(max=length)]
    return torch.stack(edges, dim=1)


def sample_erasing(
    count: int, probability: float, shape: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """Return boxes (count, 4) of [top, bottom, left, right], empty for images that stay whole.

    Distributed as in torchvision's RandomErasing: of ten boxes with a uniform area and a
    log-uniform aspect ratio, the first that is smaller than the image.
    """
    height, width = shape
    size = (count, _ERASING_TRIES)
    chosen = torch.rand(count, generator=generator) < probability
    low, high = _ERASED_AREA
    area = height * width * (low + (high - low) * torch.rand(size, generator=generator))
    low, high = torch.tensor(_ERASED_RATIO).log().tolist()
    ratio = torch.exp(low + (high - low) * torch.rand(size, generator=generator))
    heights, widths = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (heights < height) & (widths < width)
    first = fits.int().argmax(dim=1, keepdim=True)
    chosen &= fits.any(dim=1)
    edges = []
    for length, sides in ((height, heights), (width, widths)):
        side = sides.gather(1, first)[:, 0]
        place = torch.rand(count, generator=generator) * (length - side + 1)
        start = place.long().clamp(max=length - 1)
        edges += [start, torch.where(chosen, start + side, start)]
    return torch.stack(edges, dim=1)


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Return float images (B, C, H, W) that are 0 within their boxes (B, 4)."""
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    top, bottom, left, right = boxes[:, :, None].unbind(1)
    across = (rows >= top) & (rows < bottom)
    along = (columns >= left) & (columns < right)
    inside = across[:, :, None] & along[:, None, :]
    return images.clone().masked_fill_(inside[:, None], 0.0)  # a clone keeps the memory format


def sample_mixings(
    config: AugmentationConfig, batches: int, shape: tuple[int, int], seed: int
) -> list[Mixing]:
    """Draw how each batch is mixed; [] without mixup and CutMix, and with both a fair choice.

    The share is Beta(alpha, alpha) (Zhang et al. 2017, arXiv:1710.09412). The box of CutMix has
    the area 1 - share; what lies outside of the image is cut off, and the share adapted (Yun et
    al. 2019, arXiv:1905.04899). Both as in torchvision.transforms.v2.
    """
    if not config.mixup and not config.cutmix:
        return []
    mixings, (height, width) = [], shape
    with seeded(seed):
        cuts = [bool(config.cutmix)] * batches
        if config.mixup and config.cutmix:
            cuts = (torch.rand(batches) < 0.5).tolist()
        for cut in cuts:
            alpha = config.cutmix if cut else config.mixup
            share = float(torch.distributions.Beta(alpha, alpha).sample())
            box = None
            if cut:
                half = 0.5 * (1 - share) ** 0.5
                x, y = int(torch.randint(width, ())), int(torch.randint(height, ()))
                top, bottom = max(y - int(half * height), 0), min(y + int(half * height), height)
                left, right = max(x - int(half * width), 0), min(x + int(half * width), width)
                share = 1 - (bottom - top) * (right - left) / (height * width)
                box = (top, bottom, left, right)
            mixings.append(Mixing(share, box))
    return mixings


def mix(images: Tensor, labels: Tensor, mixing: Mixing, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return float images (B, C, H, W) mixed with those before them, and class shares (B, C)."""
    others = images.roll(1, 0)
    if mixing.box is None:
        mixed = torch.lerp(others, images, mixing.share, out=torch.empty_like(images))
    else:
        top, bottom, left, right = mixing.box
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    shares = functional.one_hot(labels, num_classes).to(images.dtype)
    return mixed, torch.lerp(shares.roll(1, 0), shares, mixing.share)
