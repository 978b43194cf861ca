"""From plain containers to typed dataclasses: unknown keys, wrong types and ranges are refused.

Each refusal is a UsageError of one line: the setting, its value, and what it must be.
"""

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal, TypeVar

from cifar_lab.errors import UsageError, did_you_mean, listing, shorten

T = TypeVar("T")

TargetConfig = dict[str, Any]
"""A `_target_` (dotted name of a class or function) and its keyword arguments."""


def setting(
    default: Any = dataclasses.MISSING,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    identity: bool = True,
    factory: Any = dataclasses.MISSING,
) -> Any:
    """Declare a field with its range and whether it is part of the address of a run."""
    metadata = {"identity": identity, "ge": ge, "gt": gt, "le": le, "lt": lt}
    if factory is not dataclasses.MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def parse_as(cls: type[T], data: Any, path: str, *, finite: bool = True) -> T:
    """Turn plain containers into a dataclass; `path` is where they stand.

    A dataclass may have a method `check(path)`, which raises UsageError where its values
    contradict each other. `finite`: numbers must not be nan or infinite.
    """
    where = path or "a run"
    if not isinstance(data, Mapping):
        raise UsageError(f"{where} is {_show(data)}; it must be a group of settings")
    specs = {spec.name: spec for spec in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in specs:
            full = f"{path}.{key}" if path else str(key)
            guess = did_you_mean(str(key), specs) or f"; {where} has {listing(specs)}"
            raise UsageError(f"there is no setting {shorten(full)}{guess}")
    kinds = hints(typing.cast(type, cls))
    values: dict[str, Any] = {}
    for name, spec in specs.items():
        full = f"{path}.{name}" if path else name
        if name not in data:
            if default_of(spec) is dataclasses.MISSING:
                raise UsageError(f"{full} is missing")
            continue
        values[name] = convert(kinds[name], data[name], full, finite=finite)
        _check_range(spec, values[name], full)
    parsed = cls(**values)
    check = getattr(parsed, "check", None)
    if check is not None:
        check(path)
    return parsed


def convert(kind: Any, value: Any, path: str, *, finite: bool = True) -> Any:
    """Return `value` as `kind`, any type hint of plain values; UsageError if it is something else.

    This is the one type checker of the package: for configs, for the arguments of targets, and for
    files that a run left. A whole number counts as a float, and 2.0 as a whole number.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        _check_plain(value, path, finite=finite)
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [k for k in arguments if k is not type(None)]
        kinds.sort(key=lambda option: option is not type(value))  # 3 stays 3 as a float | int
        for option in kinds:
            try:
                return convert(option, value, path, finite=finite)
            except UsageError as error:
                problem = error
        if len(kinds) == 1:
            raise problem
        raise wrong(path, value, " or ".join(_describe(k) for k in kinds))
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            options = ", ".join(map(str, arguments))
            guess = did_you_mean(str(value), map(str, arguments))
            raise wrong(path, value, f"one of {options}", guess)
        return value
    if kind is type(None) and value is None:
        return None
    if dataclasses.is_dataclass(kind):
        return parse_as(typing.cast(type, kind), value, path, finite=finite)
    if origin in (list, tuple) or kind in (list, tuple):
        if not isinstance(value, list | tuple):
            raise wrong(path, value, "a list")
        inner = arguments[0] if arguments else Any
        return [convert(inner, item, f"{path}[{i}]", finite=finite) for i, item in enumerate(value)]
    if origin is dict or kind is dict:
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise wrong(path, value, "a group of settings")
        inner = arguments[1] if arguments else Any
        return {k: convert(inner, item, f"{path}.{k}", finite=finite) for k, item in value.items()}
    return _convert_scalar(kind, value, path, finite=finite)


def _convert_scalar(kind: Any, value: Any, path: str, *, finite: bool) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number:
        try:
            converted = float(value)
        except OverflowError:
            raise wrong(path, value, "a number that a float can hold") from None
        if finite and not math.isfinite(converted):
            raise wrong(path, value, "a finite number")
        return converted
    if kind is int and number and (isinstance(value, int) or value.is_integer()):
        return int(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    raise wrong(path, value, _describe(kind))


def _check_plain(value: Any, path: str, *, finite: bool) -> None:
    if finite and isinstance(value, float) and not math.isfinite(value):
        raise wrong(path, value, "a finite number")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise UsageError(f"{path} has the key {_show(key)}; keys must be text")
            _check_plain(item, f"{path}.{key}", finite=finite)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{path}[{i}]", finite=finite)
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise wrong(path, value, "text, a number, a list or a group of settings")


def _check_range(spec: "dataclasses.Field[Any]", value: Any, path: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    bounds = {k: spec.metadata[k] for k in _BOUNDS if spec.metadata.get(k) is not None}
    kept = {
        "ge": lambda b: value >= b,
        "gt": lambda b: value > b,
        "le": lambda b: value <= b,
        "lt": lambda b: value < b,
    }
    if not all(kept[k](bound) for k, bound in bounds.items()):
        raise wrong(path, value, describe_range(spec))


_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def describe_range(spec: "dataclasses.Field[Any]") -> str:
    """Return a field's range in words; "" if it has none."""
    bounds = {k: spec.metadata.get(k) for k in _BOUNDS}
    return " and ".join(f"{_BOUNDS[k]} {b}" for k, b in bounds.items() if b is not None)


def describe_field(cls: type, key: str) -> str | None:
    """Return which values the setting at a dotted key takes; None below a group of any settings."""
    name, _, rest = key.partition(".")
    spec = next((spec for spec in dataclasses.fields(cls) if spec.name == name), None)
    if spec is None:
        return None
    kind = hints(cls)[name]
    if rest:
        is_group = dataclasses.is_dataclass(kind)
        return describe_field(typing.cast(type, kind), rest) if is_group else None
    kinds = typing.get_args(kind) if _is_union(kind) else (kind,)
    words = [_describe(k) for k in kinds if k is not type(None)]
    text = " or ".join(words)
    text += f", {bounds}" if (bounds := describe_range(spec)) else ""
    return f"{text}, or null" if type(None) in kinds else text


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def default_of(spec: "dataclasses.Field[Any]") -> Any:
    """Return a field's default, or dataclasses.MISSING."""
    if spec.default is not dataclasses.MISSING:
        return spec.default
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    return dataclasses.MISSING


@functools.cache  # half of the time of reading a config
def hints(cls: type) -> dict[str, Any]:
    """Return the type of each field of a dataclass."""
    return typing.get_type_hints(cls)


def _describe(kind: Any) -> str:
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


def _show(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    except (TypeError, ValueError):
        text = type(value).__name__
    return shorten(text)
