"""From plain containers to typed dataclasses: unknown keys, wrong types and ranges are refused.

A setting is described once, by a field of a dataclass: type, range, meaning, and whether it is part
of a run's identity. pydantic reads such a field, and is imported when the first config is parsed.
Each refusal is a UsageError of one line: the setting, its value, and what it must be.
"""

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from cifar_lab.errors import UsageError, did_you_mean, listing, shorten

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

TargetConfig = dict[str, Any]
"""A `_target_` (dotted name of a class or function) and its keyword arguments."""


def setting(
    default: Any = dataclasses.MISSING,
    meaning: str = "",
    *,
    identity: bool = True,
    factory: Any = dataclasses.MISSING,
    **bounds: float,
) -> Any:
    """Declare a field: its meaning, its range, and whether it is part of the address of a run.

    `bounds` are some of ge, gt, le and lt: >=, >, <=, <.
    """
    metadata = {**bounds, "description": meaning, "identity": identity}
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_as(kind: type[T], value: Any, path: str, *, finite: bool = True) -> T:
    """Return `value` as `kind`, a dataclass or any type hint; UsageError if it is something else.

    This is the one type checker of the package: for configs, for the arguments of targets, and for
    files that a run left. A whole number counts as a float, and 2.0 as a whole number. `path` is
    where the value stands. A dataclass may have a method `check(path)`, which raises UsageError
    where its values contradict each other. `finite`: numbers must not be nan or infinite.
    """
    from pydantic import ValidationError

    try:
        parsed: T
        (parsed,) = _adapter(typing.cast(Any, kind), finite).validate_python([value])
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        raise _explain(kind, value, path, problem["type"], problem["loc"][1:]) from None
    _verify(kind, value, parsed, path, finite)
    return parsed


@functools.cache  # building one takes longer than reading a config with it
def _adapter(kind: Any, finite: bool = True) -> "TypeAdapter[Any]":
    """Return pydantic's reader of a list of `kind`: a dataclass alone would not take a config."""
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(list[kind], config=ConfigDict(extra="forbid", allow_inf_nan=not finite))


def json_schema(cls: type) -> dict[str, Any]:
    """Return the JSON schema of a dataclass; targets are free, since any code may be one."""
    definitions = _adapter(cls).json_schema()["$defs"]
    return {**definitions.pop(cls.__name__), "$defs": definitions}


_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def _explain(kind: Any, value: Any, path: str, problem: str, keys: Sequence[Any]) -> UsageError:
    """Turn an error of pydantic, of a type and at a place, into the one line that a user sees."""
    bounds = ""
    for depth, key in enumerate(keys):
        kind = _without_none(kind)
        if _is_union(kind):  # what follows names its members
            break
        here = path
        path = _join(path, key)
        if problem == "missing" and depth == len(keys) - 1:
            return UsageError(f"{path} is missing")
        if dataclasses.is_dataclass(kind):
            fields = hints(typing.cast(type, kind))
            if key not in fields:
                where = here or "a run"
                guess = did_you_mean(str(key), fields) or f"; {where} has {listing(fields)}"
                return UsageError(f"there is no setting {shorten(path)}{guess}")
            bounds, kind = describe_range(kind.__dataclass_fields__[key]), fields[key]
        elif keys[depth + 1 : depth + 2] == ("[key]",):
            return wrong(here, value, "a group of settings")
        else:
            kind = typing.get_args(kind)[-1]
        value = value[key]
    kind = _without_none(kind)
    if dataclasses.is_dataclass(kind):
        right = f"a group of settings: {listing(kind.__dataclass_fields__)}"
        return wrong(path or "a run", value, right)
    if problem.startswith(("greater_than", "less_than")):
        return wrong(path, kind(value) if kind in (int, float) else value, bounds)
    if problem == "finite_number":
        return wrong(path, value, "a finite number")
    guess = ""
    if isinstance(value, list) and len(value) > 1 and kind in (int, float, str):
        guess = f"; several values are {path}={','.join(map(as_typed, value))} with -m"
    if typing.get_origin(kind) is Literal:
        guess = did_you_mean(str(value), map(str, typing.get_args(kind)))
    if kind is str and isinstance(value, bool | int | float):  # a folder called 2024, or 1e3
        typed = "..." if isinstance(value, float) else as_typed(value)
        guess = f"""; on a command line in quotes: '{path}="{typed}"'"""
    return wrong(path, value, _describe(kind), guess)


def _verify(kind: Any, given: Any, parsed: Any, path: str, finite: bool) -> None:
    """Refuse what pydantic lets pass: "1" or true for 1, and in free settings what is not plain."""
    kind = _without_none(kind)
    if dataclasses.is_dataclass(parsed):
        fields = hints(typing.cast(type, type(parsed)))
        for name in fields:
            if name in given:
                inner = getattr(parsed, name)
                _verify(fields[name], given[name], inner, _join(path, name), finite)
    elif isinstance(parsed, list | tuple | dict):
        pairs = parsed.items() if isinstance(parsed, dict) else enumerate(parsed)
        inner_kind = (typing.get_args(kind) or (Any,))[-1] if not _is_union(kind) else Any
        for key, item in pairs:
            if isinstance(parsed, dict) and not isinstance(key, str):
                raise UsageError(f"{path} has the key {_show(key)}; keys must be text")
            _verify(inner_kind, given[key], item, _join(path, key), finite)
    elif finite and isinstance(parsed, float) and not math.isfinite(parsed):
        raise wrong(path, given, "a finite number")
    elif parsed is not None and not isinstance(parsed, bool | int | float | str):
        raise wrong(path, given, "text, a number, a list or a group of settings")
    elif type(parsed) is not type(given) and not (_is_number(parsed) and _is_number(given)):
        raise wrong(path, json.dumps(given) if isinstance(given, str) else given, _describe(kind))
    if hasattr(parsed, "check"):
        parsed.check(path)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _join(path: str, key: Any) -> str:
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else str(key)


def describe_range(spec: "dataclasses.Field[Any]") -> str:
    """Return a field's range in words; "" if it has none."""
    return " and ".join(f"{_BOUNDS[k]} {spec.metadata[k]}" for k in _BOUNDS if k in spec.metadata)


def find_field(cls: Any, key: str) -> "tuple[dataclasses.Field[Any], Any] | None":
    """Return the field and the type of the setting at a dotted key; None in free settings."""
    field: dataclasses.Field[Any] | None = None
    kind = cls
    for name in key.split("."):
        if not dataclasses.is_dataclass(kind) or name not in kind.__dataclass_fields__:
            return None
        field, kind = kind.__dataclass_fields__[name], hints(typing.cast(type, kind))[name]
    return (field, kind) if field else None


def describe_values(field: "dataclasses.Field[Any]", kind: Any) -> str:
    """Return which values a setting takes."""
    text = _describe(_without_none(kind))
    text += f", {bounds}" if (bounds := describe_range(field)) else ""
    return f"{text}, or null" if type(None) in typing.get_args(kind) else text


def _without_none(kind: Any) -> Any:
    """Return a type hint without its `| None`."""
    if not _is_union(kind):
        return kind
    kinds = [part for part in typing.get_args(kind) if part is not type(None)]
    return typing.Union[tuple(kinds)]  # noqa: UP007


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def default_of(spec: "dataclasses.Field[Any]") -> Any:
    """Return a field's default, or dataclasses.MISSING."""
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    return spec.default


hints = functools.cache(typing.get_type_hints)  # half of the time of reading a config


def _describe(kind: Any) -> str:
    if _is_union(kind):
        return " or ".join(map(_describe, typing.get_args(kind)))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    names[type(None)] = "null"
    if kind in names:
        return names[kind]
    origin = typing.get_origin(kind) or kind
    if origin in (list, tuple):
        return "a list"
    if origin is Literal:
        options = [str(option) for option in typing.get_args(kind)]
        return options[0] if len(options) == 1 else "one of " + ", ".join(options)
    return "a group of settings" if origin is dict else str(getattr(kind, "__name__", kind))


def wrong(path: str, value: Any, right: str, guess: str = "") -> UsageError:
    """Return the error that names a setting, its wrong value, and what it must be."""
    return UsageError(f"{path}={_show(value)} is wrong: it must be {right}{guess}")


def as_typed(value: Any) -> str:
    """Return a value of a YAML file as one types it on a command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _show(value: Any) -> str:
    try:
        text = as_typed(value)
    except (TypeError, ValueError):
        text = type(value).__name__
    return shorten(text)


# --- the optimizer and the scheduler of a run -----------------------------------------------------


class _Component(TargetConfig):
    """A `_target_` and its arguments, and beside them settings that the program reads itself.

    A mapping in the order of config.yaml, so that configs and addresses of earlier runs hold.
    """

    own: ClassVar[dict[str, Any]] = {}
    """The type of each setting that the target does not take."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(cls, handler(TargetConfig))

    @property
    def target(self) -> TargetConfig:
        """What builds the component: `_target_` and its arguments."""
        return {key: value for key, value in self.items() if key not in self.own}

    def check(self, path: str) -> None:
        """Refuse wrong values of our own settings; those of the arguments need the target."""
        for name, kind in self.own.items():
            if name in self:
                parse_as(kind, self[name], f"{path}.{name}")


class OptimizerConfig(_Component):
    """An optimizer; `backbone_lr` is the learning rate of all but the model's classifier."""

    own: ClassVar[dict[str, Any]] = {"backbone_lr": float | None}

    @property
    def backbone_lr(self) -> float | None:
        """The learning rate of all but the model's classifier; None: that of the classifier."""
        return self.get("backbone_lr")

    def check(self, path: str) -> None:
        """Refuse a rate that is no number, or below 0."""
        super().check(path)
        if (self.backbone_lr or 0) < 0:
            raise wrong(f"{path}.backbone_lr", self.backbone_lr, "at least 0")


class SchedulerConfig(_Component):
    """A scheduler: it steps after each batch or epoch, and may watch a column of metrics.csv."""

    own: ClassVar[dict[str, Any]] = {"step": Literal["batch", "epoch"], "monitor": str | None}

    @property
    def step(self) -> str:
        """After what the scheduler steps."""
        return str(self.get("step", "epoch"))

    @property
    def monitor(self) -> str | None:
        """The column of metrics.csv that the scheduler watches."""
        return self.get("monitor")
