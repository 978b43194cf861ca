"""From a config to objects: splits on the device, the model, the state of training."""

import json
from typing import Any

import torch
from torch import nn

from cifar_lab import components, device
from cifar_lab.config import DatasetConfig, RunConfig, to_plain
from cifar_lab.data import (
    Batches,
    Normalisation,
    Split,
    Splits,
    load_arrays,
    make_splits,
    split_indices,
)
from cifar_lab.datasets import ImageArrays
from cifar_lab.datasets.store import data_root
from cifar_lab.training import TrainState, make_schedule

_SHOWN = 5000  # training images that a model may look at before its first step
_LOADED: dict[str, ImageArrays] = {}


def load_dataset(dataset: DatasetConfig) -> ImageArrays:
    """Return a dataset's arrays; the last one is kept, since a request looks before a run loads."""
    key = json.dumps(to_plain(dataset), sort_keys=True)
    if key not in _LOADED:
        _LOADED.clear()
        _LOADED[key] = load_arrays(dataset, data_root())
    return _LOADED[key]


def check_data(settings: RunConfig) -> None:
    """Load a run's dataset and divide it, before anything is written; RequestError or NotNow."""
    arrays = load_dataset(settings.dataset)
    split_indices(settings.split, arrays.train_labels, arrays.test_labels)


def load_splits(settings: RunConfig, where: str) -> Splits:
    """Load a run's dataset and divide it, on a device."""
    arrays = load_dataset(settings.dataset)
    return make_splits(arrays, settings.dataset, settings.split, where)


def build_state(settings: RunConfig, splits: Splits, where: str) -> tuple[TrainState, Batches]:
    """Build what training needs: the state at step 0 and the batches."""
    model = make_model(settings, splits, where)
    _initialize(model, settings, splits.train)
    component = optimizer_settings(settings.optimizer, where)
    optimizer = components.build(component, "optimizer", params=model.parameters())
    batches = Batches(
        splits.train,
        batch_size=settings.training.batch_size,
        seed=settings.seed,
        normalisation=normalisation(settings),
        augmentation=settings.augmentation,
        memory_format=device.memory_format(where),
        sampler=settings.split.sampler,
    )
    schedule = make_schedule(settings.scheduler, optimizer, settings.training.epochs, len(batches))
    state = TrainState(
        model,
        optimizer,
        schedule,
        settings.seed,
        where,
        settings.precision,
        compiled=settings.training.compile,
    )
    return state, batches


def make_model(settings: RunConfig, splits: Splits, where: str) -> nn.Module:
    """Build the model with the initial weights of the run's seed, on a device.

    The weights are drawn on the CPU, so that every device starts from the same ones.
    """
    with device.seeded(device.derive_seed(settings.seed, "weights")):
        model: nn.Module = components.build_model(settings, len(splits.class_names))
    model.to(where)
    model.to(memory_format=device.memory_format(where))
    return model


def _initialize(model: nn.Module, settings: RunConfig, train: Split) -> None:
    """Give a model that has a method `initialize_from_images` some training images first."""
    initialize = getattr(model, "initialize_from_images", None)
    if initialize is not None:
        images = train.images[train.indices[:_SHOWN].to(train.images.device)].cpu()
        initialize(normalisation(settings)(images, torch.contiguous_format))


def normalisation(settings: RunConfig) -> Normalisation:
    """Return the normalisation that the dataset's config names."""
    return Normalisation(settings.dataset.mean, settings.dataset.std)


def optimizer_settings(component: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the optimizer's settings, with foreach=true where null leaves the choice on a CPU.

    torch chooses it on GPUs only. On a CPU it halves Adam's update and gives the same bits.
    """
    left_open = all(component.get(name, ...) is None for name in ("foreach", "fused"))
    if where == "cpu" and left_open and not component.get("differentiable"):
        return {**component, "foreach": True}
    return component
