"""What is measured: a run's training loop without its files, parts of it, and two baselines.

Each loop never ends; it yields the number of images since it yielded last: those of a step, or, in
a run's loop, of the steps of half a second. All of them run in one process, so that the baselines
have the run's threads and allocator as well.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from cifar_lab.config.run_config import RunConfig
from cifar_lab.config.schema import OptimizerConfig
from cifar_lab.optimizers import build_optimizer
from cifar_lab.training.build import build_state, make_model, normalisation
from cifar_lab.training.device import autocast, memory_format
from cifar_lab.training.loop import fit
from cifar_lab.training.splits import Split, Splits
from cifar_lab.training.step import Step, make_criterion

Steps = Iterator[int]


# --- ours -----------------------------------------------------------------------------------------


def train(config: RunConfig, splits: Splits) -> Steps:
    """Train as a run does, by `fit`, without validation."""
    endless = dataclasses.replace(config.training, epochs=1_000_000, patience=None)
    config = dataclasses.replace(config, training=endless, scheduler=None)
    state, batches = build_state(config, splits, config.device)
    ends = [0, *(end for _, end in batches.bounds)]
    done = 0
    for progress in fit(state, batches, None, config.training):
        if progress.kind == "epoch":
            done = 0
        else:
            yield ends[progress.step] - done
            done = ends[progress.step]


def train_on_one_batch(config: RunConfig, splits: Splits) -> Steps:
    """Repeat a run's step on a batch that is ready: no data, no metrics, no reading of results."""
    state, batches = build_state(config, splits, config.device)
    images, labels = next(batches.epoch(1))
    if state.compiled:
        state.model.compile(dynamic=False)
    state.train_mode(head_only=False)
    criterion = make_criterion(config.training, splits.train, len(splits.class_names))
    step = Step(state, criterion, config.training)
    while True:
        step.passes(images, labels)
        step.update()
        yield len(labels)


def read(config: RunConfig, splits: Splits) -> Steps:
    """Make the batches of one epoch after the other."""
    _, batches = build_state(config, splits, config.device)
    for epoch in itertools.count(1):
        for _, labels in batches.epoch(epoch):
            yield len(labels)


def multiply_matrices(config: RunConfig, splits: Splits) -> Steps:
    """Multiply two large matrices in the run's precision; yield multiply-adds."""
    size = 2048 if config.device == "cpu" else 8192
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    a, b = torch.rand(2, size, size, device=config.device).to(kinds[config.precision])
    out = torch.empty_like(a)
    while True:
        torch.mm(a, b, out=out)
        yield size**3


# --- the baselines --------------------------------------------------------------------------------


class PictureDataset(Dataset[tuple[Any, int]]):
    """One image at a time, as torchvision's CIFAR10 and MNIST give it: array, PIL, transforms."""

    def __init__(self, split: Split, transform: Any) -> None:
        pixels = split.images.cpu().permute(0, 2, 3, 1)
        # As torchvision keeps them; those that are mapped from a file may not fit into memory.
        pixels = pixels if split.ahead else pixels.contiguous()
        self.images = (pixels[..., 0] if pixels.shape[-1] == 1 else pixels).numpy()
        self.labels = split.labels.tolist()
        self.indices = split.indices.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self.indices[index]
        return self.transform(Image.fromarray(np.asarray(self.images[row]))), self.labels[row]


def make_loader(config: RunConfig, split: Split, workers: int) -> DataLoader[tuple[Any, int]]:
    """Return the tutorials' loader: RandomCrop, RandomHorizontalFlip, ToTensor, Normalize."""
    from torchvision import transforms  # slow to import

    augmentation, pixels, steps = config.augmentation, normalisation(config), []
    if padding := augmentation.crop_padding:
        mode = "reflect" if augmentation.padding_mode == "reflect" else "constant"
        size = config.dataset.image_shape[1:]
        steps.append(transforms.RandomCrop(size, padding=padding, padding_mode=mode))
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
        pin_memory=config.device.startswith("cuda"),
    )


def train_plainly(config: RunConfig, splits: Splits, workers: int, *, data_only: bool) -> Steps:
    """Train as the tutorials do: PIL, a DataLoader, fp32, and `loss.item()` in every step."""
    device, loader = config.device, make_loader(config, splits.train, workers)
    model = make_model(config, len(splits.class_names), device).to(
        memory_format=torch.contiguous_format
    )
    optimizer = build_optimizer(config.optimizer, model)
    criterion = make_criterion(config.training, splits.train, len(splits.class_names))
    running_loss, correct = 0.0, 0
    model.train()
    while True:
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            if not data_only:
                optimizer.zero_grad()
                logits = model(images)
                loss = criterion(logits, labels)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                running_loss += loss.item() * len(labels)
                correct += (logits.argmax(1) == labels).sum().item()
            yield len(labels)


def train_carefully(config: RunConfig, splits: Splits) -> Steps:
    """Train as well as some lines of PyTorch can, by somebody who knows it.

    The images are in memory, cropped and flipped by the batch; autocast in the run's precision,
    channels last, a fused optimizer, sums that stay on the device.
    """
    device, split = config.device, splits.train
    model = make_model(config, len(splits.class_names), device)
    settings = config.optimizer
    if settings.get("fused", "") is None:  # the optimizer has the option
        settings = OptimizerConfig({**settings, "fused": True})
    optimizer = build_optimizer(settings, model)
    criterion = make_criterion(config.training, split, len(splits.class_names))
    scaler = torch.amp.GradScaler(device.split(":")[0], enabled=config.precision == "fp16")
    normalise, sums = normalisation(config), torch.zeros(2, device=device)
    model.train()
    while True:
        order = split.indices[torch.randperm(len(split))]
        for rows in torch.split(order, config.training.batch_size):
            images = split.images[rows.to(split.images.device)].to(device)
            labels = split.labels[rows.to(device)]
            images = normalise(crop_and_flip(images, config), memory_format(device))
            with autocast(device, config.precision):
                logits = model(images)
                loss = criterion(logits.float(), labels)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            correct = (logits.argmax(1) == labels).sum()
            sums += torch.stack([loss.detach() * len(labels), correct])
            yield len(labels)


def crop_and_flip(images: Tensor, config: RunConfig) -> Tensor:
    """Return the batch (N, C, H, W), cropped and flipped at random, as a run of the config does."""
    count, (height, width) = len(images), images.shape[2:]
    if padding := config.augmentation.crop_padding:
        windows = functional.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
        tops, lefts = torch.randint(2 * padding + 1, (2, count), device=images.device)
        images = windows[torch.arange(count, device=images.device), :, tops, lefts]
    if config.augmentation.horizontal_flip:
        flipped = torch.rand(count, 1, 1, 1, device=images.device) < 0.5
        images = torch.where(flipped, images.flip(3), images)
    return images
