"""Augmentations beyond crop and flip, beside torchvision's and slow plain ones; exact on resume."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import RandomErasing, v2

from cifar_lab.config.data_config import AugmentationConfig
from cifar_lab.training.augment import (
    Mixing,
    apply_policy,
    erase,
    mix,
    sample_cutout,
    sample_erasing,
    sample_mixings,
)
from cifar_lab.training.batches import Batches, Normalisation
from cifar_lab.training.splits import Split
from cifar_lab.training.step import hits

EVERYTHING = AugmentationConfig(
    crop_padding=2,
    horizontal_flip=True,
    policy="trivial_augment",
    cutout=3,
    erasing=0.5,
    mixup=0.2,
    cutmix=1.0,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, channels: int = 3, size: int = 16) -> Tensor:
    shape = (count, channels, size, size)
    return torch.randint(256, shape, generator=seeded(0), dtype=torch.uint8)


def batches(augmentation: AugmentationConfig, count: int = 50, **changes: Any) -> Batches:
    split = Split("train", pictures(count), torch.arange(count) % 7, torch.arange(count))
    arguments: dict[str, Any] = {
        "batch_size": 16,
        "seed": 0,
        "normalisation": Normalisation([0.4] * 3, [0.2] * 3),
        "augmentation": augmentation,
        "num_classes": 7,
    }
    return Batches(split, **{**arguments, **changes})


def test_a_box_is_erased_as_torchvision_erases_it() -> None:
    images = pictures(40).float()
    boxes = sample_cutout(40, 7, (16, 16), seeded(1))
    erased = erase(images, boxes)
    for image, ours, box in zip(images, erased, boxes.tolist(), strict=True):
        top, bottom, left, right = box
        zeros = torch.zeros(3, bottom - top, right - left)
        expected = v2.functional.erase(image, top, left, bottom - top, right - left, zeros)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("side", [4, 5])
def test_the_square_of_cutout_is_centered_anywhere_and_cut_at_the_border(side: int) -> None:
    boxes = sample_cutout(20_000, side, (8, 12), seeded(2))
    heights, widths = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    plain = Counter(
        (max(y - side // 2, 0), min(y - side // 2 + side, 8)) for y in range(8) for _ in range(2500)
    )
    seen = Counter(map(tuple, boxes[:, :2].tolist()))
    assert set(seen) == set(plain)
    assert all(abs(seen[edge] - plain[edge]) < 5 * plain[edge] ** 0.5 for edge in plain)
    assert int(heights.max()) == int(widths.max()) == side
    assert int(heights.min()) > 0


def test_random_erasing_has_the_distribution_of_torchvision() -> None:
    """Sides, areas and places beside 4,000 calls of RandomErasing; means within 5 errors."""
    count, shape = 4000, (24, 32)
    ours = sample_erasing(count, 1.0, shape, seeded(3))
    torch.manual_seed(4)
    image = torch.zeros(1, *shape)
    theirs = []
    for _ in range(count):
        y, x, height, width, _ = RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])
        theirs.append([y, y + height, x, x + width])
    for one, other in zip(measures(ours), measures(torch.tensor(theirs)), strict=True):
        error = ((one.var() + other.var()) / count) ** 0.5
        assert abs(one.mean() - other.mean()) < 5 * error
        assert one.std() == pytest.approx(float(other.std()), rel=0.06)


def measures(boxes: Tensor) -> list[Tensor]:
    top, bottom, left, right = boxes.double().unbind(1)
    return [top, left, bottom - top, right - left, (bottom - top) * (right - left)]


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_batches_are_mixed_as_torchvision_mixes_them(kind: str) -> None:
    """The same draws from the same generator: images, labels, and the area of the box."""
    images, labels = torch.rand(6, 3, 16, 12, generator=seeded(0)), torch.tensor([0, 1, 2, 3, 1, 0])
    transform = {"mixup": v2.MixUp, "cutmix": v2.CutMix}[kind](alpha=0.8, num_classes=4)
    alphas: dict[str, Any] = {kind: 0.8}
    config = AugmentationConfig(**alphas)
    for seed in range(20):
        (mixing,) = sample_mixings(config, 1, (16, 12), seed)
        torch.manual_seed(seed)
        expected_images, expected_labels = transform(images, labels)
        mixed, shares = mix(images, labels, mixing, 4)
        assert torch.allclose(mixed, expected_images, atol=1e-6)
        assert torch.allclose(shares, expected_labels, atol=1e-6)


def test_accuracy_counts_the_share_of_the_recognised_class() -> None:
    logits = torch.eye(3)
    assert hits(logits, torch.tensor([0, 1, 1])) == 2
    shares = functional.one_hot(torch.tensor([0, 1, 1]), 3).float()
    assert hits(logits, shares) == 2
    mixed = mix(torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 1]), Mixing(0.75, None), 3)[1]
    assert hits(logits, mixed).item() == pytest.approx(0.75 + 0.75)


@pytest.mark.parametrize(("name", "channels"), [("trivial_augment", 1), ("rand_augment", 3)])
def test_a_policy_is_torchvisions_and_leaves_the_global_generator_alone(
    name: str, channels: int
) -> None:
    images = pictures(12, channels)
    transform = {"trivial_augment": v2.TrivialAugmentWide, "rand_augment": v2.RandAugment}[name]()
    torch.manual_seed(9)
    expected = torch.stack([transform(image) for image in images])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    ours = apply_policy(images, name, 9)
    assert torch.equal(ours, expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(ours, apply_policy(images, name, 10))


def test_an_epoch_continued_at_any_batch_is_the_same() -> None:
    source = batches(EVERYTHING)
    whole = list(source.epoch(3))
    for start in range(len(whole) + 1):
        rest = list(batches(EVERYTHING).epoch(3, start=start))
        assert len(rest) == len(whole) - start
        for (images, labels), (again, labels_again) in zip(whole[start:], rest, strict=True):
            assert torch.equal(images, again)
            assert torch.equal(labels, labels_again)
    assert not torch.equal(whole[0][0], next(source.epoch(4))[0])
    assert torch.allclose(whole[0][1].sum(1), torch.ones(16))


def test_layout_and_the_draws_of_crop_and_flip_stay_as_they_are() -> None:
    layout = torch.channels_last
    plain = AugmentationConfig(crop_padding=2, horizontal_flip=True)
    changed = AugmentationConfig(crop_padding=2, horizontal_flip=True, cutout=5)
    for (images, labels), (erased, same) in zip(
        batches(plain, memory_format=layout).epoch(1),
        batches(changed, memory_format=layout).epoch(1),
        strict=True,
    ):
        kept = erased != 0
        assert torch.equal(labels, same)
        assert torch.equal(images[kept], erased[kept])
        assert 0 < int((~kept).sum()) <= 25 * 3 * len(images)
        assert erased.is_contiguous(memory_format=layout)
    for images, _ in batches(EVERYTHING, memory_format=layout).epoch(1):
        assert images.is_contiguous(memory_format=layout)
