"""The pipeline is torchvision's, image by image; its draws are fair, keyed and repeatable."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as vision
from torchvision.transforms import v2

from cifar_lab.config.data_config import AugmentationConfig, SplitConfig
from cifar_lab.training.augment import augment, sample_augmentation
from cifar_lab.training.batches import Batches, Normalisation, in_order
from cifar_lab.training.splits import Split, split_indices

CROP_FLIP = AugmentationConfig(crop_padding=4, horizontal_flip=True)
PLAIN = AugmentationConfig()
IDENTITY = Normalisation(None, None)


def split_of(count: int, channels: int = 3, size: int = 8, whole: int | None = None) -> Split:
    """Images that carry their label and their index in their pixels."""
    total = whole or count
    images = torch.arange(total).view(-1, 1, 1, 1).expand(total, channels, size, size)
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count].sort().values
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
    generator = torch.Generator().manual_seed(1)
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
    generator = torch.Generator().manual_seed(3)
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


def test_epochs_and_seeds_differ_and_the_same_seed_repeats() -> None:
    split = split_of(100)
    first = labels_of(batches(split), 1)
    assert torch.equal(first, labels_of(batches(split), 1))
    assert not torch.equal(first, labels_of(batches(split), 2))
    assert not torch.equal(first, labels_of(batches(split, seed=1), 1))


def test_the_global_generator_is_neither_used_nor_moved() -> None:
    split = split_of(100)
    source = batches(split, augmentation=CROP_FLIP)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = torch.cat([images for images, _ in source.epoch(1)])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(first, torch.cat([images for images, _ in source.epoch(1)]))


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
    parts = list(in_order(split, batch_size=16, normalisation=IDENTITY))
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
