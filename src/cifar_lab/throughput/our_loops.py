"""A run's training loop without its files, and the parts of a step alone.

Each loop never ends; it yields the number of images of each step.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch

from cifar_lab.config.run_config import RunConfig
from cifar_lab.datasets import ImageArrays
from cifar_lab.errors import Unavailable, first_line
from cifar_lab.training.build import build_state
from cifar_lab.training.criterion import make_criterion
from cifar_lab.training.data import load_splits
from cifar_lab.training.loop import fit
from cifar_lab.training.splits import Splits, make_splits
from cifar_lab.training.step import Step

OurLoop = Callable[[RunConfig, Splits, str], Iterator[int]]
"""Takes the config, the splits and the device."""

_SYNTHETIC_IMAGES = 10_000


def load_images(config: RunConfig, device: str) -> tuple[Splits, str]:
    """Return the run's splits and "real"; random images and the reason if they are unavailable."""
    try:
        return load_splits(config, device), "real"
    except Unavailable as error:
        reason = first_line(error)
    generator = np.random.default_rng(0)
    shape = (_SYNTHETIC_IMAGES, *config.dataset.image_shape)
    classes = config.dataset.classes or [str(i) for i in range(10)]
    images = generator.integers(0, 256, shape, dtype=np.uint8)
    labels = np.arange(len(images)) % len(classes)
    few = slice(len(classes) * 10)
    arrays = ImageArrays(images, labels, images[few], labels[few], tuple(classes))
    split = dataclasses.replace(config.split, validation=0.0)
    return make_splits(arrays, config.dataset, split, device), f"synthetic ({reason})"


def train(config: RunConfig, splits: Splits, device: str) -> Iterator[int]:
    """Train as a run does, by `fit`, without validation."""
    endless = dataclasses.replace(config.training, epochs=1_000_000, patience=None)
    config = dataclasses.replace(config, training=endless, scheduler=None)
    state, batches = build_state(config, splits, device)
    ends = [0, *(end for _, end in batches.bounds)]
    done = 0
    for progress in fit(state, batches, None, config.training):
        if progress.kind == "epoch":
            done = 0
        else:
            yield ends[progress.step] - done
            done = ends[progress.step]


def train_on_one_batch(config: RunConfig, splits: Splits, device: str) -> Iterator[int]:
    """Repeat a run's step on a batch that is ready: no data, no metrics, no reading of results."""
    state, batches = build_state(config, splits, device)
    images, labels = next(batches.epoch(1))
    if state.compiled:
        state.model.compile(dynamic=False)
    state.train_mode(head_only=False)
    criterion = make_criterion(config.training, splits.train, len(splits.class_names))
    step = Step(state, criterion, config.training)
    while True:
        step(images, labels)
        yield len(labels)


def read(config: RunConfig, splits: Splits, device: str) -> Iterator[int]:
    """Make the batches of one epoch after the other."""
    _, batches = build_state(config, splits, device)
    for epoch in itertools.count(1):
        for _, labels in batches.epoch(epoch):
            yield len(labels)


def multiply_matrices(config: RunConfig, splits: Splits, device: str) -> Iterator[int]:
    """Multiply two large matrices in the run's precision; yield multiply-adds."""
    size = 2048 if device == "cpu" else 8192
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    a, b = (torch.rand(size, size, device=device, dtype=kinds[config.precision]) for _ in range(2))
    out = torch.empty_like(a)
    while True:
        torch.mm(a, b, out=out)
        yield size**3
