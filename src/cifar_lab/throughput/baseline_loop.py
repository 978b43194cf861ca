"""The baseline: a training loop as most people write it, to measure against.

PIL transforms, a DataLoader, fp32, contiguous tensors and `loss.item()` in every step, on the same
images. It runs in a process of its own, because a run changes settings of its process, such as
those of the allocator, that most people leave as they are.
"""

import functools
import multiprocessing
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from cifar_lab.config.data_config import AugmentationConfig
from cifar_lab.config.run_config import RunConfig
from cifar_lab.throughput.images import load_images
from cifar_lab.training.batches import Normalisation
from cifar_lab.training.build import make_model, normalisation
from cifar_lab.training.splits import Split
from cifar_lab.training.state import build_optimizer


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
        return self.transform(
            Image.fromarray(np.asarray(self.images[self.rows[index]]))
        ), self.labels[index]


def make_loader(
    split: Split,
    augmentation: AugmentationConfig,
    normalisation: Normalisation,
    *,
    batch_size: int,
    workers: int,
) -> DataLoader[tuple[Any, int]]:
    """Return the loader of a split: RandomCrop, RandomHorizontalFlip, ToTensor, Normalize."""
    from torchvision import transforms  # slow to import, and needed in this process only

    steps: list[Any] = []
    if augmentation.crop_padding:
        size = tuple(split.images.shape[2:])
        mode = "reflect" if augmentation.padding_mode == "reflect" else "constant"
        crop = transforms.RandomCrop(size, padding=augmentation.crop_padding, padding_mode=mode)
        steps.append(crop)
    if augmentation.horizontal_flip:
        steps.append(transforms.RandomHorizontalFlip())
    steps.append(transforms.ToTensor())
    if normalisation.mean is not None and normalisation.std is not None:
        steps.append(transforms.Normalize(normalisation.mean, normalisation.std))
    return DataLoader(
        PictureDataset(split, transforms.Compose(steps)),
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        pin_memory=split.device.type == "cuda",
    )


def read(loader: DataLoader[tuple[Any, int]], device: str) -> Iterator[int]:
    """Read batches without end; yield the number of images of each."""
    while True:
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            yield len(labels)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[tuple[Any, int]],
    device: str,
) -> Iterator[int]:
    """Train without end; yield the number of images of each step."""
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


class BaselineProcess:
    """The process of a run's baseline loops; the first step that is asked of it starts it."""

    def __init__(self, settings: RunConfig, device: str) -> None:
        self._settings = settings
        self._device = device
        self._connection: Connection | None = None

    def steps(self, kind: str, workers: int) -> Iterator[int]:
        """Do a step (`train`) or read a batch (`read`) each time; yield its number of images."""
        try:
            while True:
                yield self._ask(kind, workers, more=True)
        finally:
            self._ask(kind, workers, more=False)

    def stop(self) -> None:
        """End the process, if it has started."""
        if self._connection is not None:
            self._connection.send(None)
            self._connection.close()
            self._connection = None

    def _ask(self, kind: str, workers: int, *, more: bool) -> int:
        if self._connection is None:
            context = multiprocessing.get_context("spawn")
            self._connection, other = context.Pipe()
            arguments = (other, self._settings, self._device, multiprocessing.get_start_method())
            context.Process(target=_serve, args=arguments).start()
            other.close()
        try:
            self._connection.send((kind, workers, more))
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError("the process of the baseline loop ended") from error
        if isinstance(answer, Exception):
            raise answer
        return int(answer)


def _serve(connection: Connection, settings: RunConfig, device: str, start_method: str) -> None:
    """Answer the requests of `BaselineProcess` until it ends."""
    # Otherwise a DataLoader would start its workers as this process was started: by spawning.
    multiprocessing.set_start_method(start_method, force=True)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    splits, _ = load_images(settings, device)

    @functools.cache
    def loader(workers: int) -> DataLoader[tuple[Any, int]]:
        return make_loader(
            splits.train,
            settings.augmentation,
            normalisation(settings),
            batch_size=settings.training.batch_size,
            workers=workers,
        )

    def start(kind: str, workers: int) -> Iterator[int]:
        if kind == "read":
            return read(loader(workers), device)
        model = make_model(settings, splits, device).to(memory_format=torch.contiguous_format)
        optimizer = build_optimizer(settings.optimizer, model)
        return train(model, optimizer, loader(workers), device)

    running: dict[tuple[str, int], Iterator[int]] = {}
    while (asked := _received(connection)) is not None:
        kind, workers, more = asked
        try:
            if more and (kind, workers) not in running:
                running[kind, workers] = start(kind, workers)
            done = next(running[kind, workers]) if more else 0
            if not more:
                running.pop((kind, workers)).close()  # type: ignore[attr-defined]
            connection.send(done)
        except Exception as error:
            connection.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _received(connection: Connection) -> Any:
    """Return the next request, or None if the other end is closed."""
    try:
        return connection.recv()
    except EOFError:
        return None
