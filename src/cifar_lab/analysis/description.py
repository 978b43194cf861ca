"""What a dataset and a model consist of, and what they cost, for `describe`.

Multiply-adds are counted by torch's FlopCounterMode: matrix products and convolutions, one for two
floating-point operations.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from cifar_lab.config.run_config import RunConfig
from cifar_lab.datasets import ImageArrays
from cifar_lab.datasets.pixel_statistics import pixel_statistics
from cifar_lab.errors import UsageError, shorten
from cifar_lab.runs.text import align, class_name
from cifar_lab.training.batches import Batches
from cifar_lab.training.build import build_model, normalisation
from cifar_lab.training.device import derive_seed, seeded
from cifar_lab.training.splits import Splits

SHOWN_IMAGES = 4

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Layer:
    """A module without children, as one image passes through it.

    `shape` is that of its output without the batch; `note` is the size formula of a convolution.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    multiply_adds: int
    note: str = ""


def trace_layers(model: nn.Module, image_shape: Sequence[int]) -> list[Layer]:
    """Run a model on one image and return its layers in the order in which they ran."""
    layers: list[Layer] = []
    names = {module: name for name, module in model.named_modules()}
    counter = FlopCounterMode(display=False)
    started: list[int] = []

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        started.append(counter.get_total_flops())

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        source = inputs[0] if inputs else output
        layers.append(
            Layer(
                name=names[module] or "model",
                kind=type(module).__name__,
                shape=tuple(output.shape[1:]) if isinstance(output, torch.Tensor) else (),
                parameters=sum(p.numel() for p in module.parameters()),
                multiply_adds=(counter.get_total_flops() - started.pop()) // 2,
                note=size_formula(module, source.shape) if isinstance(module, nn.Conv2d) else "",
            )
        )

    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [module.register_forward_pre_hook(before) for module in leaves]
    hooks += [module.register_forward_hook(after) for module in leaves]
    try:
        model.eval()
        with torch.no_grad(), counter:
            model(torch.zeros(1, *image_shape))
    finally:
        for hook in hooks:
            hook.remove()
    return layers


def multiply_adds(config: RunConfig, num_classes: int, *, backward: bool = False) -> int:
    """Return a run's multiply-adds per image: of the forward pass, or of a training step."""
    model = _build(config, num_classes)
    batch = 2  # batch norm cannot train on one image
    images = torch.zeros(batch, *config.dataset.image_shape)
    labels = torch.zeros(batch, dtype=torch.int64)
    model.train(backward)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        loss = functional.cross_entropy(model(images), labels)
        if backward:
            loss.backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops()) // 2 // batch


def model_text(config: RunConfig, num_classes: int) -> str:
    """Return a model's layers with output shapes, parameters and multiply-adds, and the totals."""
    model = _build(config, num_classes)
    layers = trace_layers(model, config.dataset.image_shape)
    rows = [("layer", "kind", "output", "parameters", "multiply-adds", "")]
    for layer in layers:
        costs = f"{layer.parameters:,}", f"{layer.multiply_adds:,}"
        rows.append((layer.name, layer.kind, "x".join(map(str, layer.shape)), *costs, layer.note))
    parameters = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    buffers = sum(b.numel() for b in model.buffers())
    of_them = f", {frozen:,} of them frozen" if frozen else ""
    sizes = "x".join(map(str, config.dataset.image_shape))
    return "\n".join(
        [
            f"model {class_name(config.model)} on images of {sizes}, {num_classes} classes",
            "",
            *align(rows, right={3, 4}),
            "",
            f"parameters: {parameters:,}{of_them} (and {buffers:,} elements of buffers)",
            "multiply-adds of convolutions and matrix products, per image: "
            f"{sum(layer.multiply_adds for layer in layers):,}",
        ]
    )


def size_formula(conv: nn.Conv2d, shape: Sequence[int]) -> str:
    """Return how a convolution's output height comes about, as ((32-5+2*0)/1)+1 = 28 (S3-06)."""
    size, kernel, stride = int(shape[-2]), conv.kernel_size[0], conv.stride[0]
    reach = conv.dilation[0] * (kernel - 1) + 1
    if isinstance(conv.padding, str):
        total = reach - 1 if conv.padding == "same" else 0
    else:
        total = 2 * int(conv.padding[0])
    padding = f"2*{total // 2}" if total % 2 == 0 else str(total)
    result = (size - reach + total) // stride + 1
    return f"(({size}-{reach}+{padding})/{stride})+1 = {result}"


def _build(config: RunConfig, num_classes: int) -> nn.Module:
    with seeded(config.seed):
        model: nn.Module = build_model(config, num_classes)
    return model


def dataset_text(config: RunConfig, arrays: ImageArrays, splits: Splits) -> str:
    """Return counts, class balance, pixel statistics, splits and steps per epoch."""
    train, test = len(arrays.train_labels), len(arrays.test_labels)
    shape = "x".join(map(str, arrays.train_images.shape[1:]))
    lines = [
        f"dataset {config.dataset.name}: {train:,} training and {test:,} test images "
        f"({train + test:,} in total), {shape}, {len(splits.class_names)} classes",
        "",
        *_balance(arrays, splits),
        "",
        *_statistics(config, arrays),
        "",
        splits.checked,
        _steps(config, splits),
    ]
    return "\n".join(lines)


def _balance(arrays: ImageArrays, splits: Splits) -> list[str]:
    count = len(splits.class_names)
    columns = [np.bincount(arrays.train_labels, minlength=count)]
    columns.append(np.bincount(arrays.test_labels, minlength=count))
    rows = [["class", "train", "share", "test", "share"]]
    for label, name in enumerate(splits.class_names):
        row = [name]
        for column in columns:
            row += [f"{int(column[label]):,}", f"{column[label] / max(column.sum(), 1):.2%}"]
        rows.append(row)
    return align(rows, right=range(1, 5))


def _statistics(config: RunConfig, arrays: ImageArrays) -> list[str]:
    means, stds = pixel_statistics(arrays.train_images)
    configured = normalisation(config)
    mean, std = configured.mean, configured.std
    rows = [["channel", "computed mean", "configured", "computed std", "configured"]]
    for channel, (m, s) in enumerate(zip(means, stds, strict=True)):
        cells = [mean[channel] if mean else None, std[channel] if std else None]
        texts = ["none" if cell is None else f"{cell:g}" for cell in cells]
        rows.append([str(channel), f"{m:.8f}", texts[0], f"{s:.8f}", texts[1]])
    return align(rows, right=range(5))


def _steps(config: RunConfig, splits: Splits) -> str:
    size, evaluated = config.training.batch_size, config.evaluation.batch_size
    parts = [f"{-(-len(splits.train) // size):,} to train (batches of {size:,})"]
    if splits.validation is not None:
        parts.append(f"{-(-len(splits.validation) // evaluated):,} to validate")
    parts.append(f"{-(-len(splits.test) // evaluated):,} to test (batches of {evaluated:,})")
    return "steps of an epoch: " + ", ".join(parts)


def choose_images(asked: str | None, size: int, seed: int) -> list[int]:
    """Return the training images to draw: those asked for, else some at random by the seed."""
    if asked is None:
        order = np.random.default_rng(seed).permutation(size)
        return [int(index) for index in order[:SHOWN_IMAGES]]
    shown = shorten(asked)
    try:
        chosen = [int(word) for word in asked.split(",")]
    except ValueError:
        raise UsageError(f"--images={shown} is wrong: it must be numbers, as 5,27") from None
    wrong = [index for index in chosen if not 0 <= index < size]
    if wrong or len(chosen) > 100:
        raise UsageError(
            f"--images={shown} is wrong: it must be at most 100 indices from 0 to {size - 1}"
        )
    return chosen


def augmented_images(
    config: RunConfig, splits: Splits, chosen: Sequence[int], epochs: int
) -> list[list[Pixels]]:
    """Return for each epoch the chosen images (C, H, W) as training would augment them.

    The images are a batch of their own, so mixup and CutMix mix them with each other.
    """
    indices = torch.tensor(chosen, dtype=torch.int64)
    split = dataclasses.replace(splits.train, indices=indices)
    batches = Batches(
        split,
        batch_size=max(len(chosen), 1),
        seed=config.seed,
        normalisation=normalisation(config),
        augmentation=config.augmentation,
        num_classes=len(splits.class_names),
    )
    scaling = batches.normalisation
    mean, std = (
        torch.tensor(numbers or [default]).view(-1, 1, 1)
        for numbers, default in ((scaling.mean, 0.0), (scaling.std, 1.0))
    )
    rows = []
    for epoch in range(1, epochs + 1):
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "data", epoch))
        places = batches.order(generator).argsort()
        images = torch.cat([images for images, _ in batches.epoch(epoch)])[places]
        pixels = (255 * (images * std + mean)).round().clamp(0, 255).to(torch.uint8)
        rows.append(list(pixels.numpy()))
    return rows


def draw_chosen(
    arrays: ImageArrays,
    class_names: Sequence[str],
    chosen: Sequence[int],
    path: Path,
    augmented: Sequence[Sequence[Pixels]],
) -> None:
    """Draw training images, each under its class and index, into a .png (S1-02).

    Below them stand the `augmented` ones, a row for each epoch.
    """
    from cifar_lab.figures import style  # late: matplotlib
    from cifar_lab.figures.image_grid import draw_images

    labels = [class_names[int(arrays.train_labels[index])] for index in chosen]
    titles = [f"{label}\n{index}" for label, index in zip(labels, chosen, strict=True)]
    images = [arrays.train_images[index] for index in chosen]
    titles += [f"epoch {epoch}" for epoch, row in enumerate(augmented, start=1) for _ in row]
    images += [image for row in augmented for image in row]
    columns = len(chosen) if augmented else min(len(chosen), 8)
    style.save(draw_images(images, titles, columns), path)
