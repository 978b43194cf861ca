"""What `describe` tells of a dataset, a model and their learning rates."""

import contextlib
import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cifar_lab.config.data_config import DatasetConfig
from cifar_lab.config.run_config import RunConfig
from cifar_lab.datasets import ImageArrays, pixel_statistics
from cifar_lab.errors import RunFailed, UsageError, listing, shorten
from cifar_lab.figures.lr_range import HIGHEST, LOWEST, STEPS, WINDOW, RangeTest, advise, smooth
from cifar_lab.models.layers import trace_layers
from cifar_lab.runs.text import align, class_name
from cifar_lab.training.build import build_model, build_state, load_splits, normalisation
from cifar_lab.training.device import configure, select_device
from cifar_lab.training.loop import Diverged, fit
from cifar_lab.training.splits import Splits
from cifar_lab.training.state import Schedule

SHOWN_IMAGES = 4
_TOO_HIGH = 4.0  # times the lowest smoothed loss: the range test ends there, as in fastai
_SHOWN = 160  # characters of names in a line


def model_text(config: RunConfig, num_classes: int) -> str:
    """Return a model's layers with output shapes, parameters and multiply-adds, and the totals."""
    model: nn.Module = build_model(config, num_classes)
    layers = trace_layers(model, config.dataset.image_shape)
    rows = [("layer", "kind", "output", "parameters", "multiply-adds", "")]
    rows += [
        (name, kind, "x".join(map(str, shape)), f"{parameters:,}", f"{cost:,}", note)
        for name, kind, shape, parameters, cost, note in layers
    ]
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
            f"{sum(cost for *_, cost, _ in layers):,}",
        ]
    )


def dataset_text(config: RunConfig, arrays: ImageArrays, splits: Splits) -> str:
    """Return counts, class balance, pixel statistics, splits and steps per epoch."""
    train, test = len(arrays.train_labels), len(arrays.test_labels)
    shape, count = "x".join(map(str, arrays.train_images.shape[1:])), len(splits.class_names)
    balance = [["class", "train", "share", "test", "share"]]
    of_train = np.bincount(arrays.train_labels, minlength=count)
    of_test = np.bincount(arrays.test_labels, minlength=count)
    for name, a, b in zip(splits.class_names, of_train, of_test, strict=True):
        shares = f"{a / max(train, 1):.2%}", f"{b / max(test, 1):.2%}"
        balance.append([name, f"{a:,}", shares[0], f"{b:,}", shares[1]])
    rows = [["channel", "computed mean", "configured", "computed std", "configured"]]
    configured = normalisation(config)
    for channel, (mean, std) in enumerate(zip(*pixel_statistics(arrays.train_images), strict=True)):
        known = [
            f"{part[channel]:g}" if part else "none" for part in (configured.mean, configured.std)
        ]
        rows.append([str(channel), f"{mean:.8f}", known[0], f"{std:.8f}", known[1]])
    size = config.training.batch_size
    return "\n".join(
        [
            f"dataset {config.dataset.name}: {train:,} training and {test:,} test images "
            f"({train + test:,} in total), {shape}, {count} classes",
            "",
            *align(balance, right=range(1, 5)),
            "",
            *align(rows, right=range(5)),
            "",
            splits.checked,
            f"steps of an epoch: {-(-len(splits.train) // size):,} (batches of {size:,})",
        ]
    )


def choose_images(asked: str | None, size: int, seed: int) -> list[int]:
    """Return the training images to draw: those asked for, else some at random by the seed."""
    if asked is None:
        order = np.random.default_rng(seed).permutation(size)
        return [int(index) for index in order[:SHOWN_IMAGES]]
    words = asked.split(",")
    chosen = [int(word) for word in words if word.strip().isdecimal() and int(word) < size]
    if len(chosen) < len(words) or len(words) > 100:
        right = f"it must be at most 100 numbers from 0 to {size - 1}, as 5,27"
        raise UsageError(f"--images={shorten(asked)} is wrong: {right}")
    return chosen


def check_images(dataset: DatasetConfig, arrays: ImageArrays) -> list[str]:
    """Return lines on near duplicates, and on dark, light, blurred, empty and odd images.

    Near duplicates have the same perceptual hash. Pictures from files are judged as they are there,
    so that odd sizes are seen.
    """
    from cleanvision import Imagelab
    from PIL import Image

    if arrays.files:
        folder = Path(str(dataset.source["path"])).expanduser()
        lab = Imagelab(filepaths=[str(folder / name) for name in arrays.files])
    else:
        every = (*arrays.train_images, *arrays.test_images)
        pixels = [image[0] if len(image) == 1 else image.transpose(1, 2, 0) for image in every]
        lab = Imagelab(torchvision_dataset=[(Image.fromarray(image), 0) for image in pixels])
    lab.find_issues(n_jobs=1, verbose=False)
    flags = lab.issues.filter(regex="^is_(?!.*duplicates)").astype(bool).reset_index(drop=True)
    positions = {path: i for i, path in enumerate(lab.issues.index)}
    first_test = len(arrays.train_labels)

    def name(position: int) -> str:
        if arrays.files:
            return shorten(arrays.files[position], 60)
        rest = position - first_test
        return f"training image {position}" if rest < 0 else f"test image {rest}"

    lines = [f"checked {len(flags):,} images with cleanvision"]
    groups = [[positions[path] for path in g] for g in lab.info["near_duplicates"]["sets"]]
    across = [g for g in groups if min(g) < first_test <= max(g)]
    if groups:
        examples = [" = ".join(name(i) for i in group[:3]) for group in across or groups]
        lines.append(
            f"near duplicates: {sum(map(len, groups)):,} images in {len(groups):,} groups, of "
            f"which {len(across):,} lie across training and test: {listing(examples, _SHOWN)}"
        )
    for column, count in flags.sum().sort_values(ascending=False, kind="stable").items():
        if 0 < count < len(flags):  # what all have in common, such as grey digits, is no news
            what = column.removeprefix("is_").removesuffix("_issue").replace("_", " ")
            named = listing(map(name, flags.index[flags[column]]), _SHOWN)
            lines.append(f"{what}: {count:,}: {named}")
    return lines


def range_test(config: RunConfig, steps: int = STEPS) -> RangeTest:
    """Train for `steps` steps whose rate grows exponentially from LOWEST to HIGHEST (Smith 2017).

    Everything else is as the run has it, but for its scheduler; the rates of several groups of
    parameters grow together. The test ends early where the loss diverges; RunFailed if that is in
    the first step, UsageError if there is no rate to scale.
    """
    base = config.optimizer.get("lr")
    if not isinstance(base, int | float) or base <= 0:
        raise UsageError(
            f"--lr-range needs an optimizer.lr above 0 to scale, and it is {base}; choose "
            "optimizer=sgd, or set optimizer.lr"
        )
    device = select_device(config.device)
    configure(device, config.threads, config.deterministic)
    splits = load_splits(config, device)
    constant = dataclasses.replace(config, scheduler=None)
    state, batches = build_state(constant, splits, device, initial_weights=True)
    rates = np.geomspace(LOWEST, HIGHEST, steps)
    growing = torch.optim.lr_scheduler.LambdaLR(
        state.optimizer, lambda step: float(rates[min(step, steps - 1)] / base)
    )
    state.schedule = Schedule(growing, "batch")
    epochs = math.ceil(steps / len(batches))
    training = dataclasses.replace(config.training, epochs=epochs, patience=None)
    training = dataclasses.replace(training, step_history=True, print_every=1)
    losses: list[float] = []
    with contextlib.suppress(Diverged):  # a loss that is not finite has no place in a figure
        for progress in fit(state, batches, None, training):
            losses += [row.loss for row in progress.step_rows]
            recent = losses[-int(WINDOW) :]
            diverged = losses and np.mean(recent) > _TOO_HIGH * smooth(losses).min()
            if len(losses) >= steps or diverged:
                break
    if not losses:
        raise RunFailed(f"the loss is not finite in the first step, at a rate of {LOWEST:g}")
    rates, measured = rates[: len(losses)], np.array(losses[:steps])
    return RangeTest(rates, measured, smooth(measured), advise(rates, measured))
