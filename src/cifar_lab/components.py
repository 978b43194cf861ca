"""From `_target_` to object: which names are allowed, whether their arguments fit, `build`.

A run folder's config is code in disguise, so a target is judged by what it *resolves to*, not by
its name alone: a subclass of nn.Module, Optimizer or LRScheduler, a `load` of our datasets, or a
`draw` of our figures. `torch.load` and `torch.hub.load` are none of these.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar_lab.config import Component, DropoutConfig, RunConfig, load, to_plain
from cifar_lab.device import check_compiler, seeded, select_device, select_precision
from cifar_lab.errors import NotNow, RequestError, RunFailed, Stopped, did_you_mean
from cifar_lab.metrics import EpochMetrics, columns
from cifar_lab.schema import convert, shorten

_TRUSTED: set[str] = set()
_SETTINGS_OF_SCHEDULERS = ("step", "monitor")


def trust(modules: list[str]) -> None:
    """Allow targets from these top-level modules too; only a user's own command line calls this."""
    _TRUSTED.update(modules)
    # A console script, unlike `python -m`, does not look for modules where it was started.
    if modules and "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def resolve(target: Any, role: str) -> Callable[..., Any]:
    """Return the class or function that `target` names, if it may stand at `role`.

    `role` is model, activation, optimizer, scheduler, dataset.source or figures.<name>.
    """
    if not isinstance(target, str):
        raise RequestError(f"{role}._target_ must be the dotted name of a class or function")
    module_name, _, attribute = target.rpartition(".")
    package = target.split(".")[0]
    if package not in {"cifar_lab", "torch", *_TRUSTED} or not module_name:
        raise RequestError(
            f"{role}._target_={shorten(target)} is not allowed: only classes of torch and "
            f"cifar_lab are; for code of your own add trust=[{shorten(package, 40)}] "
            f"(evaluate and predict: --trust {shorten(package, 40)})"
        )
    try:
        resolved = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise RequestError(
            f"{role}._target_={shorten(target)} cannot be found: {_one_line(error)}"
        ) from None
    if package not in _TRUSTED and not _fits(resolved, role):
        raise RequestError(
            f"{role}._target_={shorten(target)} is not allowed: it is no {_noun(role)}"
        )
    return resolved  # type: ignore[no-any-return]


def bind(component: Component, role: str, injected: Mapping[str, Any]) -> Callable[[], Any]:
    """Check a component's arguments against its target's signature; return the call, not yet made.

    `injected` are the arguments that the program supplies; those the target does not take are left
    out. RequestError names the argument that does not fit.
    """
    target = resolve(component.get("_target_"), role)
    parameters = inspect.signature(target).parameters
    arguments = {k: v for k, v in component.items() if k != "_target_"}
    if role == "scheduler":
        arguments = {k: v for k, v in arguments.items() if k not in _SETTINGS_OF_SCHEDULERS}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = [n for n in parameters if n not in injected]
    for name, value in arguments.items():
        full = f"{role}.{name}"
        if name in injected:
            raise RequestError(f"{full} is set by the program; it cannot stand in the config")
        if name not in parameters and not open_ended:
            raise RequestError(
                f"there is no setting {full}{did_you_mean(name, known)}; "
                f"{component['_target_']} takes {', '.join(known) or 'no settings'}"
            )
        if name in parameters:
            arguments[name] = _fit(parameters[name], value, full)
    supplied = {k: v for k, v in injected.items() if k in parameters or open_ended}
    missing = [
        n
        for n, p in parameters.items()
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and n not in {*arguments, *supplied}
    ]
    if missing:
        raise RequestError(f"{role}.{missing[0]} is missing; {component['_target_']} needs it")
    return functools.partial(target, **arguments, **supplied)


def build(component: Component, role: str, **injected: Any) -> Any:
    """Make the object that a component describes; a refusal of its constructor names the role."""
    call = bind(component, role, injected)
    try:
        return call()
    except (RequestError, NotNow, RunFailed, Stopped):
        raise
    except Exception as error:  # a constructor may refuse its arguments in any way
        settings = ", ".join(f"{k}={v}" for k, v in component.items() if k != "_target_")
        raise RequestError(
            f"{role} ({component['_target_']}, {shorten(settings, 120)}) cannot be built: "
            f"{_one_line(error)}"
        ) from None


def takes(component: Component, role: str, argument: str) -> bool:
    """Whether a component's target has a place for an injected argument."""
    parameters = inspect.signature(resolve(component.get("_target_"), role)).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def build_model(config: RunConfig, num_classes: int) -> Any:
    """Build the model with what is injected into it: shape, classes, activation, dropout rates.

    Initial weights are drawn from torch's global generator; the caller seeds it (`device.seeded`).
    """
    injected: dict[str, Any] = {
        "image_shape": tuple(config.dataset.image_shape),
        "num_classes": num_classes,
    }
    if config.activation is not None:
        injected["activation"] = bind(config.activation, "activation", {})
    if config.dropout.conv is not None:
        injected["conv_dropout"] = config.dropout.conv
    if config.dropout.dense is not None:
        injected["dense_dropout"] = config.dropout.dense
    return build(config.model, "model", **injected)


def build_scheduler(component: Component, optimizer: Any, length: int) -> Any:
    """Build a scheduler; its `T_max` or `total_steps` left null means `length`, the whole run."""
    filled = {
        key: max(length, 1) if key in ("T_max", "total_steps") and value is None else value
        for key, value in component.items()
    }
    return build(filled, "scheduler", optimizer=optimizer)


def check(config: RunConfig, asked: Collection[str] = ()) -> RunConfig:
    """Return a config that can run here, or say what cannot: nothing is loaded or written.

    The model is built and run on two images, the optimizer and the scheduler are built on it;
    device and precision are resolved; injected settings for which the model has no place are
    emptied, and refused if they are among the keys that the user `asked` for.
    """
    config = _without_homeless_settings(config, asked)
    device, _ = select_device(config.device)
    config = dataclasses.replace(
        config, device=device, precision=select_precision(config.precision, device)
    )
    if config.training.compile:
        check_compiler(device)
    bind(config.dataset.source, "dataset.source", {"root": None, "checksums": None})
    for name, figure in config.figures.items():
        if figure is not None:
            bind(figure, f"figures.{name}", {"run": None})
    if config.continue_from is not None:
        _check_source(config, Path(config.continue_from))
    parameters = _try_model(config)
    optimizer = build(config.optimizer, "optimizer", params=parameters)
    if config.scheduler is not None:
        _check_scheduler(config, config.scheduler, optimizer)
    return config


def _check_source(config: RunConfig, folder: Path) -> None:
    """Refuse to train on from a run that is no beginning of this one."""
    source = load(folder / "config.yaml")
    name = f"continue_from={shorten(str(folder))}"
    # with another split, images that were trained on would validate
    for role, mine, theirs in (
        ("dataset", config.dataset, source.dataset),
        ("split", config.split, source.split),
        ("model", config.model, source.model),
        ("optimizer._target_", config.optimizer["_target_"], source.optimizer["_target_"]),
    ):
        if to_plain(mine) != to_plain(theirs):
            raise RequestError(f"{name} has another {role}; train on with the same")
    if config.training.epochs <= source.training.epochs:
        raise RequestError(
            f"training.epochs={config.training.epochs} is wrong: {name} was to train "
            f"{source.training.epochs} epochs, and training on counts from there; ask for more"
        )


_TRIED: dict[str, Any] = {}


def _try_model(config: RunConfig) -> Any:
    """Build the model, run it on two random images, return its parameters; once a kind of model.

    On the CPU, not the meta device: the first meta operation imports torch's decompositions for
    two seconds, a forward pass of two small images takes milliseconds.
    """
    import torch

    num_classes = len(config.dataset.classes or range(10))
    shape, count = list(config.dataset.image_shape), min(config.training.batch_size, 2)
    parts = [config.model, config.activation, config.dropout, shape, num_classes, count]
    key = json.dumps([to_plain(part) for part in parts], sort_keys=True)
    if key in _TRIED:
        return _TRIED[key]
    with seeded(0), torch.no_grad():
        model = build_model(config, num_classes)
        try:
            logits = model(torch.rand(count, *shape))
        except (RuntimeError, ValueError, TypeError) as error:
            if count == 1:
                raise RequestError(
                    "training.batch_size=1 is wrong: batch norm needs at least 2 images a batch"
                ) from None
            raise RequestError(
                f"model cannot take images of shape {shape}: {_one_line(error)}"
            ) from None
    if tuple(logits.shape) != (count, num_classes):
        raise RequestError(
            f"model returns {list(logits.shape)} for {count} images; it must be "
            f"[{count}, {num_classes}], a logit for each class"
        )
    _TRIED[key] = list(model.parameters())
    return _TRIED[key]


def _without_homeless_settings(config: RunConfig, asked: Collection[str]) -> RunConfig:
    conv, dense = config.dropout.conv, config.dropout.dense
    places = {
        "dropout.conv": (takes(config.model, "model", "conv_dropout"), conv),
        "dropout.dense": (takes(config.model, "model", "dense_dropout"), dense),
        "activation": (takes(config.model, "model", "activation"), config.activation),
    }
    for key, (has_place, value) in places.items():
        wanted = any(a == key or a == key.split(".")[0] or a.startswith(f"{key}.") for a in asked)
        if wanted and not has_place and value:
            model = config.choices.get("model") or config.model["_target_"].rpartition(".")[2]
            neutral = "leave activation out" if key == "activation" else "use dropout=none"
            raise RequestError(
                f"{key} was asked for, but model {model} has no place for it; {neutral}"
            )
    dropout = DropoutConfig(
        conv if places["dropout.conv"][0] else None, dense if places["dropout.dense"][0] else None
    )
    activation = config.activation if places["activation"][0] else None
    return dataclasses.replace(config, dropout=dropout, activation=activation)


def _check_scheduler(config: RunConfig, component: Component, optimizer: Any) -> None:
    step, monitor = component.get("step", "epoch"), component.get("monitor")
    if step not in ("batch", "epoch"):
        raise RequestError(f"scheduler.step={step} is wrong: it must be batch or epoch")
    known = [name for name in columns(EpochMetrics) if "loss" in name or "accuracy" in name]
    if monitor is not None and monitor not in known:
        raise RequestError(
            f"scheduler.monitor={monitor} is wrong: it must be one of {', '.join(known)}"
            f"{did_you_mean(str(monitor), known)}"
        )
    if monitor is not None and monitor.startswith("test"):
        raise RequestError(
            f"scheduler.monitor={monitor} is wrong: nothing is chosen on the test set"
        )
    if monitor is not None and step == "batch":
        raise RequestError("scheduler.step=batch is wrong: a scheduler that watches steps by epoch")
    if str(monitor).startswith("val") and config.split.validation == 0:
        raise RequestError(
            f"scheduler.monitor={monitor} is wrong: split.validation is 0; watch train_loss"
        )
    build_scheduler(component, optimizer, 1)


def code_hash(config: RunConfig) -> str:
    """Return 12 hex digits of the sources that decide a result: our loop and data, the targets.

    A result whose code_hash differs from today's is never presented silently.
    """
    here = Path(__file__).parent
    names = ("data.py", "building.py", "training.py", "metrics.py", "device.py")
    sources = [here / name for name in names]
    for role in ("dataset.source", "model", "activation", "optimizer", "scheduler"):
        component = config.dataset.source if role == "dataset.source" else getattr(config, role)
        if component is None or component.get("_target_") is None:
            continue
        file = inspect.getsourcefile(resolve(component["_target_"], role))
        package = component["_target_"].split(".")[0]
        if file and package != "torch":
            sources.append(Path(file))
    digest = hashlib.sha256()
    for source in sources:
        digest.update(_meaning(source, source.stat().st_mtime_ns).encode())
    return digest.hexdigest()[:12]


@functools.lru_cache(maxsize=64)
def _meaning(source: Path, changed: int) -> str:
    """Return a Python file without comments, docstrings and layout, which change no result.

    `changed` is the time of its last change: a sweep asks for each cell, and the same is kept.
    """
    tree = ast.parse(source.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if (
            isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            first.value.value = ""
    return ast.unparse(tree)


def _fits(resolved: Any, role: str) -> bool:
    if role == "dataset.source":
        return _is_ours(resolved, "cifar_lab.datasets.", "load")
    if role.startswith("figures."):
        return _is_ours(resolved, "cifar_lab.figures.", "draw")
    if not inspect.isclass(resolved):
        return False
    import torch

    bases: dict[str, type] = {
        "model": torch.nn.Module,
        "activation": torch.nn.Module,
        "optimizer": torch.optim.Optimizer,
        "scheduler": torch.optim.lr_scheduler.LRScheduler,
    }
    return issubclass(resolved, bases[role])


def _is_ours(resolved: Any, package: str, name: str) -> bool:
    module = getattr(resolved, "__module__", "") or ""
    return inspect.isfunction(resolved) and module.startswith(package) and resolved.__name__ == name


def _noun(role: str) -> str:
    if role == "dataset.source":
        return "`load` function of cifar_lab.datasets"
    if role.startswith("figures."):
        return "`draw` function of cifar_lab.figures"
    return {"optimizer": "torch Optimizer", "scheduler": "torch LRScheduler"}.get(role, "nn.Module")


def _fit(parameter: inspect.Parameter, value: Any, path: str) -> Any:
    """Convert a value to the annotated kind, as far as the annotation is one that is known.

    Of `float | Tensor` the float counts; without an annotation, the kind of the default does.
    """
    kind = _known_part(parameter.annotation)
    if kind is None:
        default = parameter.default
        if value is None or not isinstance(default, bool | int | float | str):
            kind = Any
        else:
            # torch writes weight_decay=0 where it means a float
            number = isinstance(default, int | float) and not isinstance(default, bool)
            kind = int | float if number else type(default)
    return convert(kind, value, path)


def _known_part(kind: Any) -> Any:
    """Return the part of a type hint that a config value can be, or None."""
    if kind in (int, float, bool, str, type(None), list, tuple, dict):
        return kind
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return kind
    if origin in (typing.Union, types.UnionType):
        known = [part for part in map(_known_part, arguments) if part is not None]
        return typing.Union[tuple(known)] if known else None  # noqa: UP007
    if origin in (list, tuple, Sequence):
        inner = _known_part(arguments[0])
        return list[inner] if inner is not None else list  # type: ignore[valid-type]
    return dict if origin in (dict, Mapping) else None


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return shorten(lines[0], 200) if lines else type(error).__name__
