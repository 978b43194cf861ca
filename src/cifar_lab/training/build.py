"""From a config to objects: the splits on the device, the model, the state of training.

The data are loaded once, known by their checksums, normalised by their own statistics.
"""

import dataclasses
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cifar_lab.config import targets
from cifar_lab.config.data_config import DatasetConfig
from cifar_lab.config.run_config import RunConfig, to_plain
from cifar_lab.config.schema import SchedulerConfig, TargetConfig, wrong
from cifar_lab.datasets import ARRAYS, ImageArrays, pixel_statistics
from cifar_lab.datasets.store import data_root, files_digest
from cifar_lab.errors import Unavailable, UsageError, did_you_mean, log, shorten
from cifar_lab.optimizers import build_optimizer, optimizer_settings
from cifar_lab.runs.files import check_entries, open_for_reading
from cifar_lab.runs.metrics import BY_CLASS, epoch_columns
from cifar_lab.training.batches import Batches, Normalisation, batch_bounds
from cifar_lab.training.device import derive_seed, memory_format, seeded
from cifar_lab.training.group import Group
from cifar_lab.training.splits import Splits, divide, load_arrays, make_splits
from cifar_lab.training.state import Schedule, TrainState
from cifar_lab.training.step import check_class_weights

STEPS_OF_THE_RUN = ("T_max", "total_steps", "total_iters")
"""Arguments of schedulers that, left null, are the number of steps of the whole run."""

_WEIGHTS = {"weights", "weights_sha256"}
_SHOWN = 5000  # training images that a model may see before its first step,
_SHOWN_BYTES = 1 << 30  # or fewer, if as floats they have more bytes than this
_LOADED: dict[str, ImageArrays] = {}
_FITTING: set[str] = set()  # models that are known to fit the data: a sweep asks for every cell
_COMPUTED: dict[tuple[str, bytes], tuple[list[float], list[float]]] = {}


def build_state(
    config: RunConfig,
    splits: Splits,
    device: str,
    *,
    initial_weights: bool = False,
    group: Group | None = None,
) -> tuple[TrainState, Batches]:
    """Build what training needs: the state at step 0 and the batches.

    `initial_weights`: a model that starts from given weights loads them, and may download them. One
    that has a method `initialize_from_images` is shown some training images.
    `group` are the processes that train together.
    """
    model = make_model(config, len(splits.class_names), device)
    if initial_weights:
        load_initial_weights(model, config, download=True)
    if (initialize := getattr(model, "initialize_from_images", None)) is not None:
        train = splits.train
        shown = train.indices[: min(_SHOWN, _SHOWN_BYTES // (4 * train.images[0].numel()))]
        images = train.images[shown.to(train.images.device)].cpu()
        initialize(normalisation(config)(images, torch.contiguous_format))
    group = group or Group()
    settings = optimizer_settings(config.optimizer, device, config.precision)
    optimizer = build_optimizer(settings, model)
    batches = Batches(
        splits.train,
        batch_size=config.training.batch_size,
        seed=config.seed,
        normalisation=normalisation(config),
        augmentation=config.augmentation,
        num_classes=len(splits.class_names),
        memory_format=memory_format(device),
        sampler=config.split.sampler,
        group=group,
    )
    schedule = make_schedule(config.scheduler, optimizer, config.training.epochs, len(batches))
    average = lookahead = None
    ema, slow = config.training.ema, config.training.lookahead
    if ema or slow.every:
        from cifar_lab.optimizers.averages import Lookahead, WeightAverage

        total = config.training.epochs * len(batches)
        average = WeightAverage(model, ema) if ema else None
        lookahead = Lookahead(model, slow.every, slow, total) if slow.every else None
    state = TrainState(
        model,
        optimizer,
        schedule,
        config.seed,
        device,
        config.precision,
        compiled=config.training.compile,
        average=average,
        lookahead=lookahead,
        group=group,
    )
    return state, batches


def build_model(config: RunConfig, num_classes: int) -> Any:
    """Build the model with what is injected into it: shape, classes, activation, dropout rates.

    Initial weights are drawn from torch's global generator; the caller seeds it (`seeded`).
    """
    shape = tuple(config.dataset.image_shape)
    injected: dict[str, Any] = {"image_shape": shape, "num_classes": num_classes}
    if config.activation is not None:
        injected["activation"] = targets.bind(config.activation, "activation", {})
    if config.dropout.conv is not None:
        injected["conv_dropout"] = config.dropout.conv
    if config.dropout.dense is not None:
        injected["dense_dropout"] = config.dropout.dense
    return targets.build(target_of_model(config.model), "model", **injected)


def target_of_model(model: TargetConfig) -> TargetConfig:
    """Return what builds a model, without the weights that any model may start from."""
    ours = {name for name in _WEIGHTS & model.keys() if not targets.takes(model, "model", name)}
    return {name: value for name, value in model.items() if name not in ours}


def load_initial_weights(model: Any, config: RunConfig, *, download: bool) -> None:
    """Let a model start from the weights that its config names, if any.

    A model with `load_initial_weights` does it itself, and may download them.
    """
    own, file = getattr(model, "load_initial_weights", None), config.model.get("weights")
    if file is not None and zipfile.is_zipfile(file):  # else an older form, or safetensors
        try:
            with open_for_reading(Path(file)) as handle:
                check_entries(handle)
        except ValueError as error:
            raise UsageError(f"model.weights={shorten(file)} cannot be read: {error}") from None
    if own is not None:
        own(download=download)
    elif file is not None and target_of_model(config.model) != config.model:
        from cifar_lab.models.pretrained import load_file

        if load_file(model, file, config.model.get("weights_sha256")) and download:
            log.info("model.weights=%s is of other classes: the classifier starts anew", file)


def make_model(config: RunConfig, num_classes: int, device: str) -> nn.Module:
    """Build the model with the initial weights of the run's seed, on a device.

    The weights are drawn on the CPU, so that every device starts from the same ones.
    """
    # A stream of its own: a model that draws more numbers changes no order and no dropout mask.
    with seeded(derive_seed(config.seed, "weights")):
        model: nn.Module = build_model(config, num_classes)
    model.to(device)
    model.to(memory_format=memory_format(device))
    return model


def normalisation(config: RunConfig) -> Normalisation:
    """Return the normalisation that the dataset's config states."""
    mean, std = config.dataset.mean, config.dataset.std
    if mean == "auto" or std == "auto":
        raise UsageError(
            "dataset.mean=auto and dataset.std=auto are for a command line; the config of a run "
            "has numbers"
        )
    return Normalisation(mean, std)


# --- the data -------------------------------------------------------------------------------------


def load_dataset(dataset: DatasetConfig) -> ImageArrays:
    """Return a dataset's arrays; the last dataset is kept for the run that follows its check."""
    key = json.dumps([to_plain(dataset), source_digest(dataset)], sort_keys=True)
    if key not in _LOADED:
        _LOADED.clear()
        _LOADED[key] = load_arrays(dataset, data_root())
    return _LOADED[key]


def source_digest(dataset: DatasetConfig) -> str | None:
    """Return a digest of the state of the user's files that the data come from, if any are there.

    It changes with names, sizes and times, and so without reading the files.
    """
    path = dataset.located_source.get("path")
    return files_digest(Path(path).expanduser()) if isinstance(path, str) else None


def check_data(config: RunConfig) -> None:
    """Load a run's dataset and divide it, before anything is written.

    Raises UsageError if the data are wrong, Unavailable if they cannot be fetched now.
    """
    arrays, shape = load_dataset(config.dataset), config.dataset.image_shape
    divide(arrays, config.split)
    num_classes = len(arrays.class_names)
    check_class_weights(config.training.class_weights, num_classes)
    key = json.dumps([to_plain(config.model), shape, num_classes], sort_keys=True)
    if config.dataset.classes is None and key not in _FITTING:  # the dry check knew no number
        with seeded(0), torch.no_grad():
            logits = build_model(config, num_classes).eval()(torch.zeros(2, *shape))
        check_logits(logits, 2, num_classes)
        _FITTING.add(key)


def check_logits(logits: Any, count: int, num_classes: int | None) -> None:
    """Refuse an output of a model that is no logit for each class (None: unknown) and image."""
    shape = list(logits.shape) if torch.is_tensor(logits) else type(logits).__name__
    if len(shape) != 2 or shape != [count, num_classes or shape[1]]:
        right = f"[{count}, {num_classes or 'classes'}], a logit for each class"
        raise UsageError(f"model returns {shape} for {count} images; it must be {right}")


def load_splits(config: RunConfig, device: str) -> Splits:
    """Load a run's dataset onto a device and divide it."""
    return make_splits(load_dataset(config.dataset), config.dataset, config.split, device)


# --- dataset.mean=auto and dataset.std=auto -------------------------------------------------------


def with_numbers(config: RunConfig) -> RunConfig:
    """Return the config with numbers in place of `auto`; this loads the data if there is one.

    They are computed on the training split alone, so that no held-out image decides, and rounded to
    four decimals: the same on every machine, so that the same command finds the same run. Raises
    UsageError for a channel whose pixels are all the same.
    """
    dataset = config.dataset
    if dataset.mean != "auto" and dataset.std != "auto":
        return config
    arrays = load_dataset(dataset)
    (indices, _, _), _, _ = divide(arrays, config.split)
    key = (arrays.checksums["train_images"], indices.tobytes())
    if key not in _COMPUTED:  # a sweep asks for every cell
        means, stds = pixel_statistics(arrays.train_images, indices)
        _COMPUTED[key] = ([round(m, 4) for m in means], [round(s, 4) for s in stds])
    means, stds = _COMPUTED[key]
    if dataset.std == "auto" and 0 in stds:
        raise UsageError(
            f"dataset.std=auto: the training pixels of channel {stds.index(0)} of {dataset.name} "
            "are all the same; set 'dataset.std=[...]'"
        )
    numbers: dict[Any, Any] = {"mean": means, "std": stds}
    computed = {name: n for name, n in numbers.items() if getattr(dataset, name) == "auto"}
    dataset = dataclasses.replace(dataset, computed=list(computed), **computed)
    return dataclasses.replace(config, dataset=dataset)


# --- whether they are still the same --------------------------------------------------------------


def data_record(dataset: DatasetConfig) -> dict[str, str]:
    """Return what a run records of its data: their name and the sha256 of each array.

    For data from a file or folder of the user, `files` is a digest of names, sizes and times.
    """
    files, arrays = source_digest(dataset), load_dataset(dataset)
    record = {"name": dataset.name, **arrays.checksums}
    return record if files is None else {**record, "files": files}


def check_same_data(dataset: DatasetConfig, then: Mapping[str, str], run: Path) -> None:
    """Raise Unavailable if the data are not those that `run` recorded in `then`.

    A record of earlier versions may lack checksums; what it lacks is not compared.
    """
    now = data_record(dataset)
    for array in ARRAYS:
        if array in then and then[array] != now[array]:
            raise Unavailable(
                f"the data of dataset={dataset.name} have changed since {run} "
                f"({array}: sha256 {str(then[array])[:8]} then, {now[array][:8]} now); "
                "restore them, or train it again with rerun=true"
            )


def check_finished(dataset: DatasetConfig, then: Mapping[str, str], run: Path) -> None:
    """Do the same for a finished run, which may be used without its data.

    The data are read only if they are the user's own files and these have changed.
    """
    files = source_digest(dataset)
    if files is not None and files != then.get("files"):
        check_same_data(dataset, then, run)


# --- the schedule of the learning rate ----------------------------------------------------------


def make_schedule(
    config: SchedulerConfig | None, optimizer: Any, epochs: int, steps: int
) -> Schedule:
    """Build the scheduler of `epochs` of so many `steps`; a length left null means all of it."""
    if config is None:
        return Schedule()
    length = max(epochs * (steps if config.step == "batch" else 1), 1)
    filled = {
        key: length if key in STEPS_OF_THE_RUN and value is None else value
        for key, value in config.target.items()
    }
    return Schedule(
        targets.build(filled, "scheduler", optimizer=optimizer), config.step, config.monitor
    )


def check_scheduler(config: RunConfig, scheduler: SchedulerConfig, optimizer: Any) -> None:
    """Raise UsageError for a scheduler that does not fit its run or its optimizer."""
    step, monitor = scheduler.step, scheduler.monitor
    by_class = config.training.monitor in BY_CLASS
    scores = epoch_columns([], watched=True, by_class=by_class)
    known = [name for name in scores if name.endswith(("loss", "accuracy", "f1"))]
    if monitor is not None and monitor not in known:
        right = f"one of {', '.join(known)}"
        raise wrong("scheduler.monitor", monitor, right, did_you_mean(monitor, known))
    if monitor is not None and monitor.startswith("test"):
        raise UsageError(f"scheduler.monitor={monitor} is wrong: nothing is chosen on the test set")
    if monitor is not None and step == "batch":
        raise UsageError("scheduler.step=batch is wrong: with a monitor it must be epoch")
    is_plateau = str(scheduler["_target_"]).endswith(".ReduceLROnPlateau")
    watched = monitor or ("val_accuracy" if is_plateau else "")
    if watched.startswith("val") and config.split.validation == 0:
        raise UsageError(
            f"scheduler.monitor={watched} is wrong: split.validation is 0; watch train_loss"
        )
    total, needed = scheduler.get("total_steps"), _steps(config, step)
    if total is not None and needed is not None and total < needed:
        raise UsageError(
            f"scheduler.total_steps={total} is wrong: the run takes {needed:,} steps; null counts "
            "them"
        )
    rates = {group["lr"] for group in optimizer.param_groups}
    make_schedule(scheduler, optimizer, 1, 1)
    if len({group["lr"] for group in optimizer.param_groups}) < len(rates):
        backbone = config.optimizer.backbone_lr
        cause = f"optimizer.backbone_lr={backbone}" if backbone is not None else "the scheduler"
        raise UsageError(
            f"{cause} is wrong: {scheduler['_target_']} sets one rate for all parameters, and "
            "the optimizer has two; choose another scheduler"
        )


def _steps(config: RunConfig, step: str) -> int | None:
    """Return how often a run's scheduler steps; None if the number of images is not known yet."""
    epochs, split, images = config.training.epochs, config.split, config.dataset.training_images
    if step == "epoch":
        return epochs
    if images is None:
        return None
    if split.source == "train":
        images -= split.held_out(images)
    return epochs * len(batch_bounds(images, config.training.batch_size))
