"""From a config to objects: splits on the device, the model, the state of training."""

from torch import nn

from cifar_lab import components, device
from cifar_lab.config import RunConfig
from cifar_lab.data import Batches, Normalisation, Splits, load_arrays, make_splits
from cifar_lab.datasets.store import data_root
from cifar_lab.training import TrainState, make_schedule


def load_splits(settings: RunConfig, where: str) -> Splits:
    """Load a run's dataset and divide it, on a device."""
    arrays = load_arrays(settings.dataset, data_root())
    return make_splits(arrays, settings.dataset, settings.split, where)


def build_state(settings: RunConfig, splits: Splits, where: str) -> tuple[TrainState, Batches]:
    """Build what training needs: the state at step 0 and the batches."""
    model = make_model(settings, splits, where)
    optimizer = components.build(settings.optimizer, "optimizer", params=model.parameters())
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
    state = TrainState(model, optimizer, schedule, settings.seed, where, settings.precision)
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


def normalisation(settings: RunConfig) -> Normalisation:
    """Return the normalisation that the dataset's config names."""
    return Normalisation(settings.dataset.mean, settings.dataset.std)
