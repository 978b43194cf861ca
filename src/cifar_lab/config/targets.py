"""From `_target_` to object: which targets are allowed, and their arguments, checked and bound.

A run folder's config decides what is called, so a target is judged by what it resolves to, not by
its name alone: a subclass of nn.Module, Optimizer or LRScheduler, a `load` of our datasets, a
`draw` of our figures, or one of our trackers. `torch.load` and `torch.hub.load` are none of these.
"""

import functools
import importlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar_lab.config.schema import TargetConfig, parse_as
from cifar_lab.errors import CommandError, UsageError, did_you_mean, first_line, listing, shorten

_TRUSTED: set[str] = set()


def trust(modules: str | Sequence[str]) -> None:
    """Allow targets of these modules too; only the user's own command line or program may do so.

    `modules` are names, or one text that lists them as a command line does: `a` or `[a,b]`.
    """
    listed = modules if isinstance(modules, list | tuple) else str(modules).strip("[] ").split(",")
    names = [name for text in listed if (name := str(text).strip(" '\""))]
    for name in names:
        if not re.fullmatch(r"\w+(\.\w+)*", name) or name.endswith(".py"):
            right = "the name of a module, such as my_nets for my_nets.py"
            raise UsageError(f"trust={shorten(name)} is wrong: it must be {right}")
    _TRUSTED.update(name.partition(".")[0] for name in names)
    # A console script, unlike `python -m`, does not look for modules where it was started.
    if names and "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def look_in(folder: Path) -> None:
    """Find trusted modules in a run's folder too, which keeps those of notebooks."""
    kept = any((folder / f"{module}.py").is_file() for module in _TRUSTED if module[:4] == "own_")
    if kept and str(folder) not in sys.path:
        sys.path.append(str(folder))


def trusted() -> list[str]:
    """Return the modules that `trust` has allowed in this process."""
    return sorted(_TRUSTED)


def resolve(target: Any, role: str) -> Callable[..., Any]:
    """Return the class or function that `target` names; UsageError if it is not allowed as `role`.

    `role` is model, activation, optimizer, scheduler, tracker, dataset.source or figures.<name>.
    """
    if not isinstance(target, str):
        raise UsageError(f"{role}._target_ must be the dotted name of a class or function")
    module_name, _, attribute = target.rpartition(".")
    package = target.split(".")[0]
    if package not in {"cifar_lab", "torch", *_TRUSTED} or not module_name:
        raise UsageError(
            f"{role}._target_={shorten(target)} is not allowed: only classes of cifar_lab and "
            f"torch (torch.optim.Adam) are; for code of your own add --trust {shorten(package, 40)}"
        )
    try:
        resolved = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"{role}._target_={shorten(target)} cannot be found: {first_line(error)}"
        ) from None
    if package not in _TRUSTED and (right := _check_kind(resolved, role)):
        raise UsageError(f"{role}._target_={shorten(target)} is not allowed: it is not {right}")
    return resolved  # type: ignore[no-any-return]


def bind(target_config: TargetConfig, role: str, injected: Mapping[str, Any]) -> Callable[[], Any]:
    """Check the arguments of a target against its signature and bind them, without calling it.

    `injected` are the arguments that the program supplies; those the target does not take are left
    out. UsageError names the argument that is wrong.
    """
    target = resolve(target_config.get("_target_"), role)
    parameters = _parameters(target)
    arguments = {k: v for k, v in target_config.items() if k != "_target_"}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = [n for n in parameters if n not in injected]
    for name, value in arguments.items():
        full = f"{role}.{name}"
        if name not in known and not open_ended:
            takes = f"; {shorten(target_config['_target_'])} takes {listing(known)}"
            guess = did_you_mean(name, known) or takes
            raise UsageError(f"there is no setting {shorten(full)}{guess}")
        if name in parameters:
            arguments[name] = parse_as(_kind_of(parameters[name]), value, full)
    supplied = {k: v for k, v in injected.items() if k in parameters or open_ended}
    for name, p in parameters.items():
        needed = p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if needed and name not in {*arguments, *supplied}:
            raise UsageError(f"{role}.{name} is missing; {target_config['_target_']} needs it")
    return functools.partial(target, **arguments, **supplied)


def build(target_config: TargetConfig, role: str, **injected: Any) -> Any:
    """Build the object that a config describes; UsageError names the role if that fails."""
    call = bind(target_config, role, injected)
    try:
        return call()
    except CommandError:
        raise
    except (Exception, SystemExit) as error:  # a constructor may refuse its arguments in any way
        settings = ", ".join(f"{k}={v}" for k, v in target_config.items() if k != "_target_")
        raise UsageError(
            f"{role} ({target_config['_target_']}, {shorten(settings, 120)}) cannot be built: "
            f"{first_line(error)}"
        ) from None


def takes(target_config: TargetConfig, role: str, argument: str) -> bool:
    """Whether a target takes an injected argument."""
    parameters = _parameters(resolve(target_config.get("_target_"), role))
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@functools.lru_cache(maxsize=64)
def _parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return a target's parameters, their annotations evaluated where that is possible."""
    try:
        return inspect.signature(target, eval_str=True).parameters
    except Exception:  # an annotation may name what only a type checker imports
        return inspect.signature(target).parameters


_ROLES = {
    "model": ("an nn.Module", "torch.nn", "Module"),
    "activation": ("an nn.Module", "torch.nn", "Module"),
    "optimizer": ("a torch Optimizer", "torch.optim", "Optimizer"),
    "scheduler": ("a torch LRScheduler", "torch.optim.lr_scheduler", "LRScheduler"),
    "tracker": ("a tracker of cifar_lab.trackers", "cifar_lab.trackers.", "open"),
    "dataset.source": ("a `load` function of cifar_lab.datasets", "cifar_lab.datasets.", "load"),
    "figures": ("a `draw` function of cifar_lab.figures", "cifar_lab.figures.", "draw"),
}
"""What a target must be: in words, where it is, and its base class, name, or method."""


def _check_kind(resolved: Any, role: str) -> str | None:
    """Return what a target must be in a role, if it is not."""
    kind, package, name = _ROLES["figures" if role.startswith("figures.") else role]
    is_there = str(getattr(resolved, "__module__", "")).startswith(package)
    if role == "tracker":
        fits = inspect.isclass(resolved) and is_there and hasattr(resolved, name)
    elif package.startswith("cifar_lab."):
        fits = inspect.isfunction(resolved) and is_there and resolved.__name__ == name
    else:
        base = getattr(importlib.import_module(package), name)
        fits = inspect.isclass(resolved) and issubclass(resolved, base)
    return None if fits else kind


def _kind_of(parameter: inspect.Parameter) -> Any:
    """Return the type of an argument that a config can set.

    Of `float | Tensor` the float counts; without an annotation, the kind of the default does, and
    null is accepted too.
    """
    kind = _known_part(parameter.annotation)
    if kind is not None:
        return kind
    default = parameter.default
    if not isinstance(default, bool | int | float | str):
        return Any
    # torch writes weight_decay=0 where it means a float
    number = isinstance(default, int | float) and not isinstance(default, bool)
    return int | float | None if number else type(default) | None


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
