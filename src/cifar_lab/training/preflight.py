"""The dry check of a request: whether its runs can start, before anything is read or written."""

import contextlib
import dataclasses
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from cifar_lab.config import targets
from cifar_lab.config.compose import compose
from cifar_lab.config.data_config import DatasetConfig
from cifar_lab.config.identity import address, identity
from cifar_lab.config.launch import LAUNCH_KEYS, Request
from cifar_lab.config.run_config import DropoutConfig, RunConfig, to_plain
from cifar_lab.config.schema import OptimizerConfig, default_of
from cifar_lab.errors import Damaged, UsageError, first_line, log
from cifar_lab.optimizers import build_optimizer, classifier_of
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training import build
from cifar_lab.training.device import check_compiler, seeded, select_device, select_precision
from cifar_lab.training.step import check_class_weights


def compose_checked(argv: Sequence[str]) -> Request:
    """Turn a command line into a Request whose runs can start here; UsageError if one cannot."""
    return check_request(compose(argv))


def check_request(request: Request) -> Request:
    """Return the request with every run as `check` returns it; UsageError if one cannot start.

    For `dataset.mean=auto` the data are loaded, since the numbers are part of a run's address; but
    not for a request that only shows a config.
    """
    where: Any = {"elsewhere": "cluster" in request.launcher, "rerun": request.options.rerun}
    configs = [check(run.config, run.asked_keys, **where) for run in request.runs]
    if request.shown is None:
        configs = [build.with_numbers(config) for config in configs]
    pairs = zip(request.runs, configs, strict=True)
    runs = [dataclasses.replace(run, config=config) for run, config in pairs]
    return dataclasses.replace(request, runs=runs)


def run_folder(request: Request) -> Path:
    """Return the folder of a single run: its address, or the past run that the request names.

    A named folder is meant itself, wherever it lies, if the request changes nothing that makes
    another run; otherwise the past run is only where the settings come from.
    """
    run = request.runs[0]
    if request.folder is None:
        return address(run.config)
    past = RunDir(request.folder)
    stored = past.read_config()
    changed = run.asked_keys - LAUNCH_KEYS
    same_run = not changed or identity(stored) == identity(run.config)
    if past.holds_other_config(stored):
        why = "its config.yaml was edited and"
    elif not same_run or changed & {"output_dir", "name"}:
        why = "with these changes it"
    else:
        return request.folder
    new = address(run.config)
    log.info("%s: %s is another run, in %s", request.folder, why, new)
    return new


_FOR_PICTURES = ("fit", "storage", "max_megapixels")
"""Settings of a dataset that only a source of picture files takes."""


def on_this_machine(config: RunConfig) -> RunConfig:
    """Return a config with the device and the precision that `auto` means here.

    Raises UsageError for a device that is not there.
    """
    device = select_device(config.device)
    precision = select_precision(config.precision, device)
    return dataclasses.replace(config, device=device, precision=precision)


def check(
    config: RunConfig, asked: Collection[str] = (), *, elsewhere: bool = False, rerun: bool = False
) -> RunConfig:
    """Return a config as it runs here; UsageError if it cannot. Nothing is loaded or written.

    The model is built and trained on two images for one step, with the optimizer and the scheduler;
    device and precision are resolved. Injected settings that the model does not take (dropout, the
    activation) are emptied, and refused if they are among the keys that the user `asked` for. The
    run that a kept run continued from may be elsewhere by now. What runs `elsewhere`, on a cluster,
    keeps `auto`: the node decides, and the address is the same wherever it is sent from. A run that
    is finished, and not to be `rerun`, trains no step: it has shown that it can.
    """
    config = _without_unused_settings(config, asked)
    config = _with_settings_of_weights(config, asked)
    if not elsewhere:
        config = on_this_machine(config)
        if config.training.compile:
            check_compiler(config.device)
    if config.dataset.classes is not None:
        check_class_weights(config.training.class_weights, len(config.dataset.classes))
    if "training.monitor" in asked and config.split.validation == 0:
        raise UsageError(
            f"training.monitor={config.training.monitor} is wrong: split.validation is 0, so there "
            "is no validation score; hold out a validation split"
        )
    source = config.dataset.source
    defaults: dict[str, Any] = {
        field.name: default_of(field)
        for field in dataclasses.fields(DatasetConfig)
        if field.name in _FOR_PICTURES
    }
    targets.bind(source, "dataset.source", {"root": None, "checksums": None, **defaults})
    for name, default in defaults.items():
        value = getattr(config.dataset, name)
        if value != default and not targets.takes(source, "dataset.source", name):
            raise UsageError(
                f"dataset.{name}={value} is wrong: the images of {config.dataset.name} are not "
                "read from picture files; it is for dataset=image_folder"
            )
    for name, figure in config.figures.items():
        if figure is not None:
            targets.bind(figure, f"figures.{name}", {"run": None})
    if config.tracker is not None:
        from cifar_lab.trackers import build_tracker

        build_tracker(config.tracker)
    if config.continue_from is not None:
        start = Path(config.continue_from)
        if "continue_from" in asked or start.exists():
            from cifar_lab.training.resume import check_source

            check_source(config, start)
    if not rerun:
        with contextlib.suppress(Damaged, UsageError, ValueError, TypeError):  # a trial refuses it
            run = RunDir(address(config))
            if run.summary_file.exists() and run.status == "finished":
                return config
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them wait for each other on two images
    try:
        optimizer = _try_to_train(config)
    finally:
        torch.set_num_threads(threads)
    if config.scheduler is not None:
        build.check_scheduler(config, config.scheduler, optimizer)
    return config


_NOT_DETERMINISTIC = {"cuda": "AdaptiveMaxPool2d", "mps": "MaxPool2d"}
"""Layers of our models whose backward pass torch refuses with deterministic algorithms."""

_TRIED: dict[str, Any] = {}
"""Models of which a training step was tried, by what the step depends on: a sweep asks again."""


def _try_to_train(config: RunConfig) -> Any:
    """Build model and optimizer, and train on two random images for a step; return the optimizer.

    The step is taken once per kind of model and optimizer; the learning rate makes no other kind.
    It is taken on the CPU: the first operation on the meta device imports torch's decompositions
    for two seconds, and a step of two small images takes milliseconds.
    """
    # On the CPU, capturable=true is refused; on a GPU it is right.
    on_cpu = {k: v for k, v in config.optimizer.items() if k != "capturable"}
    described = config.optimizer if config.device == "cpu" else OptimizerConfig(on_cpu)
    num_classes = len(config.dataset.classes or range(10))
    count = min(config.training.batch_size, 2)
    kind = [
        *(to_plain(part) for part in (config.model, config.activation, config.dropout)),
        {name: value for name, value in described.items() if name != "lr"},
        [count, *config.dataset.image_shape, num_classes],
    ]
    key = json.dumps(kind, sort_keys=True)
    model, logits = _TRIED.get(key), None
    with seeded(0):
        if model is None:
            model = build.build_model(config, num_classes)
            build.load_initial_weights(model, config, download=False)
            logits = _try_model(model, config, count, len(config.dataset.classes or ()) or None)
    if config.training.frozen_epochs:
        classifier_of(model, "training.frozen_epochs")
    unfit = _NOT_DETERMINISTIC.get(config.device.split(":")[0])
    if config.deterministic and any(type(m).__name__ == unfit for m in model.modules()):
        raise UsageError(
            f"deterministic=true is wrong: the model has an nn.{unfit}, whose gradients torch "
            f"cannot compute deterministically on device={config.device}"
        )
    optimizer = build_optimizer(described, model)
    if logits is not None:
        logits.logsumexp(1).sum().backward()
        try:
            optimizer.step()
        except Exception as error:  # an optimizer may refuse a step in any way
            raise UsageError(
                f"optimizer ({described['_target_']}) cannot take a training step: "
                f"{first_line(error)}"
            ) from None
        optimizer.zero_grad()
        _TRIED[key] = model
    return optimizer


def _try_model(model: Any, config: RunConfig, count: int, num_classes: int | None) -> Any:
    """Return the logits of a few random images."""
    shape = list(config.dataset.image_shape)
    try:
        logits = model(torch.rand(count, *shape))
    except SystemExit:
        raise UsageError("model ends the process: it calls sys.exit") from None
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        if count == 1:
            raise UsageError("training.batch_size=1 is wrong: batch norm needs 2 images") from None
        raise UsageError(f"model cannot take images of {shape}: {first_line(error)}") from None
    build.check_logits(logits, count, num_classes)
    return logits


def _without_unused_settings(config: RunConfig, asked: Collection[str]) -> RunConfig:
    """Empty the injected settings that the model does not use; refuse those that were asked for."""
    values = {
        "conv_dropout": ("dropout.conv", config.dropout.conv),
        "dense_dropout": ("dropout.dense", config.dropout.dense),
        "activation": ("activation", config.activation),
    }
    taken: dict[str, Any] = {}
    for name, (key, value) in values.items():
        has_place = targets.takes(config.model, "model", name)
        wanted = any(a == key or a == key.split(".")[0] or a.startswith(f"{key}.") for a in asked)
        if wanted and not has_place and value:
            model = config.choices.get("model") or config.model["_target_"].rpartition(".")[2]
            neutral = "leave activation out" if key == "activation" else "use dropout=none"
            raise UsageError(f"{key} was asked for, but model {model} does not use it; {neutral}")
        taken[name] = value if has_place else None
    dropout = DropoutConfig(taken["conv_dropout"], taken["dense_dropout"])
    return dataclasses.replace(config, dropout=dropout, activation=taken["activation"])


def _with_settings_of_weights(config: RunConfig, asked: Collection[str]) -> RunConfig:
    """Let a model that starts from given weights complete its settings and the normalisation.

    Those of other packages have a function `complete_settings` for that, which downloads nothing;
    any other model gets the digest of its file.
    """
    model = targets.resolve(config.model["_target_"], "model")
    complete = getattr(model, "complete_settings", None)
    if complete is None:
        target = build.target_of_model(config.model)
        if config.model.get("weights") is None or target == config.model:
            return dataclasses.replace(config, model=target)
        from cifar_lab.models.pretrained import complete_file_settings

        digested = complete_file_settings(config.model, "a file of torch.save or safetensors")
        return dataclasses.replace(config, model=digested)
    targets.bind(config.model, "model", {"image_shape": None, "num_classes": None})
    settings, statistics = complete(config.model)
    if statistics is None:
        return dataclasses.replace(config, model=settings)
    for key in ("dataset.mean", "dataset.std"):
        if key in asked:
            raise UsageError(
                f"{key} was asked for, but model.normalisation=weights sets it; add "
                "model.normalisation=dataset"
            )
    channels = config.dataset.image_shape[0]
    mean, std = (
        numbers if channels == len(numbers) else [sum(numbers) / len(numbers)] * channels
        for numbers in statistics
    )
    dataset = dataclasses.replace(config.dataset, mean=mean, std=std)
    return dataclasses.replace(config, model=settings, dataset=dataset)
