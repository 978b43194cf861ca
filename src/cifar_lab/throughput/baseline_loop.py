"""The baseline: a training loop as most people write it, to measure against.

PIL transforms, a DataLoader, fp32, contiguous tensors and `loss.item()` in every step, on the same
images. Its turns run in a process of their own, because a run changes settings of its process,
such as those of the allocator, that most people leave as they are.
"""

import contextlib
import functools
import multiprocessing
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from cifar_lab.config.run_config import RunConfig
from cifar_lab.throughput.our_loops import load_images
from cifar_lab.throughput.timing import rate
from cifar_lab.training.build import make_model, normalisation
from cifar_lab.training.device import wait_for
from cifar_lab.training.splits import Split, Splits
from cifar_lab.training.state import build_optimizer

Loader = DataLoader[tuple[Any, int]]
Steps = Generator[int, None, None]
"""Yields the number of images of each step, without end."""


class PictureDataset(Dataset[tuple[Any, int]]):
    """One image at a time, as torchvision's CIFAR10 and MNIST give it: array, PIL, transforms."""

    def __init__(self, split: Split, transform: Any) -> None:
        images = split.images.cpu()
        self.rows: Sequence[int] = range(len(split))
        if split.ahead:  # in a file, of which each image is read on its own
            self.rows = split.indices.tolist()
        else:
            images = images[split.indices]
        pixels = images.permute(0, 2, 3, 1)
        pixels = pixels if split.ahead else pixels.contiguous()
        self.images = (pixels[..., 0] if pixels.shape[-1] == 1 else pixels).numpy()
        self.labels = split.labels.cpu()[split.indices].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(np.asarray(self.images[self.rows[index]]))
        return self.transform(image), self.labels[index]


def make_loader(config: RunConfig, split: Split, workers: int, start_method: str) -> Loader:
    """Return the loader of a split: RandomCrop, RandomHorizontalFlip, ToTensor, Normalize."""
    from torchvision import transforms  # slow to import, and needed in this process only

    steps: list[Any] = []
    augmentation, pixels = config.augmentation, normalisation(config)
    if augmentation.crop_padding:
        size = tuple(split.images.shape[2:])
        mode = "reflect" if augmentation.padding_mode == "reflect" else "constant"
        crop = transforms.RandomCrop(size, padding=augmentation.crop_padding, padding_mode=mode)
        steps.append(crop)
    if augmentation.horizontal_flip:
        steps.append(transforms.RandomHorizontalFlip())
    steps.append(transforms.ToTensor())
    if pixels.mean is not None and pixels.std is not None:
        steps.append(transforms.Normalize(pixels.mean, pixels.std))
    return DataLoader(
        PictureDataset(split, transforms.Compose(steps)),
        batch_size=config.training.batch_size,
        shuffle=True,
        num_workers=workers,
        pin_memory=split.device.type == "cuda",
        # Otherwise workers would start as this process did, by spawning, which takes seconds.
        multiprocessing_context=start_method if workers else None,
    )


def train(config: RunConfig, splits: Splits, device: str, loader: Loader) -> Steps:
    """Train as the tutorials do."""
    model = make_model(config, splits, device).to(memory_format=torch.contiguous_format)
    optimizer = build_optimizer(config.optimizer, model)
    criterion = nn.CrossEntropyLoss()
    model.train()
    while True:
        running_loss, correct = 0.0, 0
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            logits = model(images)
            loss = criterion(logits, labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item() * len(labels)
            correct += (logits.argmax(1) == labels).sum().item()
            yield len(labels)


def read(config: RunConfig, splits: Splits, device: str, loader: Loader) -> Steps:
    """Read the batches alone."""
    while True:
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            yield len(labels)


BaselineLoop = Callable[[RunConfig, Splits, str, Loader], Steps]
"""Takes the config, the splits, the device and the loader of the training split."""


class BaselineProcess:
    """The process in which the turns of baseline loops run; the first turn starts it."""

    def __init__(self, config: RunConfig, device: str) -> None:
        arguments = (config, device, multiprocessing.get_start_method())
        self._pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), _prepare, arguments
        )

    def turn(self, loop: BaselineLoop, workers: int, seconds: float) -> float:
        """Let a loop work for so many seconds; return its images per second."""
        return self._pool.submit(_turn, loop, workers, seconds).result()

    def stop(self) -> None:
        """End the process, if it has started."""
        self._pool.shutdown()


_run: tuple[RunConfig, str, str]  # of this process: its config, device, how workers start


def _prepare(config: RunConfig, device: str, start_method: str) -> None:
    global _run
    _run = config, device, start_method
    if config.threads is not None:
        torch.set_num_threads(config.threads)


@functools.cache
def _splits() -> Splits:
    config, device, _ = _run
    return load_images(config, device)[0]


@functools.cache
def _loader(workers: int) -> Loader:
    config, _, start_method = _run
    return make_loader(config, _splits().train, workers, start_method)


def _turn(loop: BaselineLoop, workers: int, seconds: float) -> float:
    config, device, _ = _run
    # Closing the loop ends its workers, which would go on during the turns of other loops.
    with contextlib.closing(loop(config, _splits(), device, _loader(workers))) as steps:
        for _ in range(2 * workers + 1):  # batches that workers prepare before the turn
            next(steps)
        return rate(steps, seconds, lambda: wait_for(device))
