"""The images that a benchmark reads: the run's own, or random ones of the same shape."""

import dataclasses

import numpy as np

from cifar_lab.config.run_config import RunConfig
from cifar_lab.datasets import ImageArrays
from cifar_lab.errors import Unavailable, first_line
from cifar_lab.training.build import load_splits
from cifar_lab.training.splits import Splits, make_splits

_SYNTHETIC_IMAGES = 10_000


def load_images(settings: RunConfig, device: str) -> tuple[Splits, str]:
    """Return the run's splits and "real"; random images and the reason if they are unavailable."""
    try:
        return load_splits(settings, device), "real"
    except Unavailable as error:
        reason = first_line(error)
    generator = np.random.default_rng(0)
    shape = (_SYNTHETIC_IMAGES, *settings.dataset.image_shape)
    classes = settings.dataset.classes or [str(i) for i in range(10)]
    images = generator.integers(0, 256, shape, dtype=np.uint8)
    labels = np.arange(len(images)) % len(classes)
    few = slice(len(classes) * 10)
    arrays = ImageArrays(images, labels, images[few], labels[few], tuple(classes))
    split = dataclasses.replace(settings.split, validation=0.0)
    return make_splits(arrays, settings.dataset, split, device), f"synthetic ({reason})"
