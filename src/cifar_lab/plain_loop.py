"""A training loop as most people write it: PIL transforms, DataLoader, fp32, `loss.item()`.

It is here to be measured against, in the same run and on the same images (`cifar_lab.benchmark`);
nothing else uses it.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from cifar_lab.config import AugmentationConfig
from cifar_lab.data import Normalisation, Split


class PictureDataset(Dataset[tuple[Any, int]]):
    """One image at a time, as torchvision's CIFAR10 and MNIST give it: array, PIL, transforms."""

    def __init__(self, split: Split, transform: Any) -> None:
        images = split.images.cpu()[split.indices].permute(0, 2, 3, 1).contiguous().numpy()
        self.images = images[..., 0] if images.shape[-1] == 1 else images
        self.labels = split.labels.cpu()[split.indices].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(np.asarray(self.images[index]))), self.labels[index]


def make_loader(
    split: Split,
    augmentation: AugmentationConfig,
    normalisation: Normalisation,
    *,
    batch_size: int,
    workers: int,
) -> DataLoader[tuple[Any, int]]:
    """Return the loader of a split: RandomCrop, RandomHorizontalFlip, ToTensor, Normalize."""
    steps: list[Any] = []
    if augmentation.crop_padding:
        size = tuple(split.images.shape[2:])
        steps.append(transforms.RandomCrop(size, padding=augmentation.crop_padding))
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
        pin_memory=split.images.device.type == "cuda",
    )


def read(loader: DataLoader[tuple[Any, int]], device: str) -> Iterator[int]:
    """Read epochs without end; yield the number of images after each batch."""
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
    """Train without end; yield the number of images after each step."""
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
