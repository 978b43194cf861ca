"""The pipeline is torchvision's, image by image; its draws are fair, keyed and repeatable."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import RandomErasing, v2
from torchvision.transforms import functional as vision

from cifar_lab.config.data_config import AugmentationConfig, SplitConfig
from cifar_lab.config.run_config import EvaluationConfig
from cifar_lab.training.augment import (
    Mixing,
    apply_policy,
    augment,
    erase,
    mix,
    sample_augmentation,
    sample_cutout,
    sample_erasing,
    sample_mixings,
)
from cifar_lab.training.batches import Batches, Normalisation, in_order
from cifar_lab.training.splits import Split, split_indices
from cifar_lab.training.step import hits

CROP_FLIP = AugmentationConfig(crop_padding=4, horizontal_flip=True)
PLAIN = AugmentationConfig()
IDENTITY = Normalisation(None, None)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def split_of(count: int, channels: int = 3, size: int = 8, whole: int | None = None) -> Split:
    """Images that carry their label and their index in their pixels."""
    total = whole or count
    images = torch.arange(total).view(-1, 1, 1, 1).expand(total, channels, size, size)
    chosen = torch.randperm(total, generator=seeded(0))[:count].sort().values
    return Split("train", (images % 256).to(torch.uint8).clone(), torch.arange(total) % 7, chosen)


def batches(split: Split, **changes: Any) -> Batches:
    arguments: dict[str, Any] = {
        "batch_size": 16,
        "seed": 0,
        "normalisation": IDENTITY,
        "augmentation": PLAIN,
        "num_classes": 7,
    }
    return Batches(split, **{**arguments, **changes})


def labels_of(source: Batches, epoch: int) -> Tensor:
    return torch.cat([images[:, 0, 0, 0] * 255 for images, _ in source.epoch(epoch)]).round().long()


@pytest.mark.parametrize("mode", ["constant", "reflect"])
@pytest.mark.parametrize(
    ("padding", "shape"), [(4, (3, 32, 32)), (1, (1, 28, 28)), (7, (3, 8, 12))]
)
def test_crop_and_flip_are_torchvisions_image_by_image(
    padding: int, shape: tuple[int, int, int], mode: str
) -> None:
    generator = seeded(1)
    images = torch.randint(256, (40, *shape), generator=generator, dtype=torch.uint8)
    config = AugmentationConfig(crop_padding=padding, horizontal_flip=True)
    draws = sample_augmentation(40, config, generator, torch.device("cpu"))
    ours = augment(images, padding, draws, slice(0, 40), reflect=mode == "reflect")
    assert draws.top is not None
    assert draws.left is not None
    assert draws.flip is not None
    for i, image in enumerate(images):
        padded = vision.pad(image, [padding], padding_mode=mode)
        expected = vision.crop(padded, int(draws.top[i]), int(draws.left[i]), *shape[1:])
        expected = vision.hflip(expected) if draws.flip[i] else expected
        assert torch.equal(ours[i], expected)
    assert 0 < int(draws.flip.sum()) < 40


def test_alternating_flips_mirror_each_image_in_every_second_epoch() -> None:
    split = split_of(60, whole=100)
    split.images[..., 0] = 255  # a bright left edge
    source = batches(
        split, augmentation=AugmentationConfig(horizontal_flip=True, flips="alternating")
    )

    def mirrored(epoch: int) -> dict[int, bool]:
        images = torch.cat([images for images, _ in source.epoch(epoch)])
        pixels = (images[:, 0, 0, 3] * 255).round().long()
        return dict(zip(pixels.tolist(), (images[:, 0, 0, -1] == 1).tolist(), strict=True))

    first, second, third = (mirrored(epoch) for epoch in (1, 2, 3))
    assert len(first) == 60
    assert all(first[image] != second[image] for image in first)
    assert first == third
    assert 15 < sum(first.values()) < 45


def test_offsets_and_flips_are_uniform() -> None:
    """Chi-square with a fixed seed; 0.999 quantiles of 8, 80 and 1 degrees of freedom."""
    count = 40_500
    generator = seeded(3)
    draws = sample_augmentation(count, CROP_FLIP, generator, torch.device("cpu"))
    assert draws.top is not None
    assert draws.left is not None
    assert draws.flip is not None
    for values, cells, limit in (
        (draws.top, 9, 26.1),
        (draws.left, 9, 26.1),
        (draws.top * 9 + draws.left, 81, 124.8),
        (draws.flip.long(), 2, 10.8),
    ):
        observed = torch.bincount(values, minlength=cells).double()
        assert len(observed) == cells
        expected = count / cells
        assert float(((observed - expected) ** 2 / expected).sum()) < limit


@pytest.mark.parametrize("sampler", ["permutation", "weighted", "subset"])
def test_each_image_of_the_split_comes_once_and_no_other(sampler: str) -> None:
    split = split_of(100, whole=200)
    source = batches(split, sampler=sampler)
    for epoch in (1, 2):
        seen = labels_of(source, epoch)
        assert sorted(seen.tolist()) == split.indices.tolist()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_labels_follow_their_images(layout: torch.memory_format) -> None:
    flip = AugmentationConfig(horizontal_flip=True)
    for images, labels in batches(split_of(200), augmentation=flip, memory_format=layout).epoch(1):
        pixels = (images * 255).round().long()
        assert torch.equal(pixels.amin((1, 2, 3)), pixels.amax((1, 2, 3)))
        assert torch.equal(pixels[:, 0, 0, 0] % 7, labels)


def test_epochs_and_seeds_differ_and_the_same_seed_repeats_without_the_global_generator() -> None:
    split = split_of(100)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = labels_of(batches(split, augmentation=CROP_FLIP), 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(first, labels_of(batches(split, augmentation=CROP_FLIP), 1))
    first = labels_of(batches(split), 1)
    assert torch.equal(first, labels_of(batches(split), 1))
    assert not torch.equal(first, labels_of(batches(split), 2))
    assert not torch.equal(first, labels_of(batches(split, seed=1), 1))


@pytest.mark.parametrize(
    ("count", "sizes"), [(33, [16, 17]), (32, [16, 16]), (34, [16, 16, 2]), (1, [1]), (17, [17])]
)
def test_a_last_batch_of_one_is_joined(count: int, sizes: list[int]) -> None:
    assert [len(labels) for _, labels in batches(split_of(count)).epoch(1)] == sizes


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_normalisation_is_torchvisions(channels: int, layout: torch.memory_format) -> None:
    images = torch.randint(256, (9, channels, 8, 8), dtype=torch.uint8)
    mean, std = [0.49, 0.48, 0.45][:channels], [0.25, 0.24, 0.26][:channels]
    ours = Normalisation(mean, std)(images, layout)
    expected = v2.functional.normalize(
        v2.functional.to_dtype(images, torch.float32, True), mean, std
    )
    assert ours.dtype == torch.float32
    assert ours.is_contiguous(memory_format=layout)
    assert torch.allclose(ours, expected, rtol=0, atol=1e-6)
    plain = IDENTITY(images, layout)
    assert torch.allclose(plain, images / 255, rtol=0, atol=1e-7)


def test_evaluation_goes_in_order_without_augmentation() -> None:
    split = split_of(50, whole=90)
    parts = list(in_order(split, EvaluationConfig(batch_size=16), IDENTITY))
    seen = torch.cat([images[:, 0, 0, 0] * 255 for images, _ in parts]).round().long()
    assert torch.equal(seen, split.indices)
    assert torch.equal(torch.cat([labels for _, labels in parts]), split.labels[split.indices])


def test_splits_are_stratified_numpys_and_the_tail_of_the_reports() -> None:
    labels = np.repeat(np.arange(4), [10, 20, 31, 40])
    _, validation, _ = split_indices(SplitConfig(validation=0.1), labels, labels)
    assert Counter(labels[validation].tolist()) == {0: 1, 1: 2, 2: 3, 3: 4}
    train, test = (np.arange(size) % 10 for size in (50_000, 10_000))
    s0 = SplitConfig(validation=0.5, source="test", method="numpy", seed=42)
    _, validation, _ = split_indices(s0, train, test)
    expected = np.random.RandomState(42).permutation(10_000)[:5_000]
    assert np.array_equal(validation, np.sort(expected))
    _, tail, _ = split_indices(SplitConfig(validation=0.2, method="tail"), train, test)
    assert np.array_equal(tail, np.arange(40_000, 50_000))


# --- augmentations beyond crop and flip -----------------------------------------------------------

EVERYTHING = AugmentationConfig(
    crop_padding=2,
    horizontal_flip=True,
    policy="trivial_augment",
    cutout=3,
    erasing=0.5,
    mixup=0.2,
    cutmix=1.0,
)


def pictures(count: int, channels: int = 3, size: int = 16) -> Tensor:
    shape = (count, channels, size, size)
    return torch.randint(256, shape, generator=seeded(0), dtype=torch.uint8)


def noisy(augmentation: AugmentationConfig, count: int = 50, **changes: Any) -> Batches:
    split = Split("train", pictures(count), torch.arange(count) % 7, torch.arange(count))
    normalisation = Normalisation([0.4] * 3, [0.2] * 3)
    return batches(split, normalisation=normalisation, augmentation=augmentation, **changes)


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
    source = noisy(EVERYTHING)
    whole = list(source.epoch(3))
    for start in range(len(whole) + 1):
        rest = list(noisy(EVERYTHING).epoch(3, start=start))
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
        noisy(plain, memory_format=layout).epoch(1),
        noisy(changed, memory_format=layout).epoch(1),
        strict=True,
    ):
        kept = erased != 0
        assert torch.equal(labels, same)
        assert torch.equal(images[kept], erased[kept])
        assert 0 < int((~kept).sum()) <= 25 * 3 * len(images)
        assert erased.is_contiguous(memory_format=layout)
    for images, _ in noisy(EVERYTHING, memory_format=layout).epoch(1):
        assert images.is_contiguous(memory_format=layout)
