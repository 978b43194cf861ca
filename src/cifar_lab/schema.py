"""Plain containers into typed dataclasses, strictly: unknown keys, types and ranges are refused.

Each refusal is a RequestError of one line: which setting has which value, and what would be right.
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

from cifar_lab.errors import RequestError, did_you_mean

T = TypeVar("T")


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


def parse_as(cls: type[T], data: Any, path: str) -> T:
    """Turn plain containers into a dataclass of settings; `path` is where they stand.

    A dataclass may have a method `check(path)`, which raises RequestError where its values do not
    fit each other.
    """
    where = path or "the config"
    if not isinstance(data, Mapping):
        raise RequestError(f"{where} is {_show(data)}; it must be a group of settings")
    specs = {spec.name: spec for spec in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in specs:
            full = f"{path}.{key}" if path else str(key)
            raise RequestError(
                f"there is no setting {shorten(full)}{did_you_mean(str(key), specs)}; "
                f"{where} has {', '.join(specs)}"
            )
    hints = _hints(typing.cast(type, cls))
    values: dict[str, Any] = {}
    for name, spec in specs.items():
        full = f"{path}.{name}" if path else name
        if name not in data:
            if default_of(spec) is dataclasses.MISSING:
                raise RequestError(f"{full} is missing; a run needs one")
            continue
        values[name] = convert(hints[name], data[name], full)
        _check_range(spec, values[name], full)
    parsed = cls(**values)
    check = getattr(parsed, "check", None)
    if check is not None:
        check(path)
    return parsed


def convert(kind: Any, value: Any, path: str) -> Any:
    """Return `value` as `kind` (a type hint of the schema or of a component's signature)."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        _check_plain(value, path)
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [k for k in arguments if k is not type(None)]
        for option in kinds:
            try:
                return convert(option, value, path)
            except RequestError as error:
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
    if dataclasses.is_dataclass(kind):
        return parse_as(typing.cast(type, kind), value, path)
    if origin in (list, tuple) or kind in (list, tuple):
        if not isinstance(value, list | tuple):
            raise wrong(path, value, "a list")
        inner = arguments[0] if arguments else Any
        return [convert(inner, item, f"{path}[{i}]") for i, item in enumerate(value)]
    if origin is dict or kind is dict:
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise wrong(path, value, "a group of settings")
        inner = arguments[1] if arguments else Any
        return {k: convert(inner, item, f"{path}.{k}") for k, item in value.items()}
    return _convert_scalar(kind, value, path)


def _convert_scalar(kind: Any, value: Any, path: str) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number:
        try:
            converted = float(value)
        except OverflowError:
            raise wrong(path, value, "a number that a float can hold") from None
        if not math.isfinite(converted):
            raise wrong(path, value, "a finite number")
        return converted
    if kind is int and number and (isinstance(value, int) or value.is_integer()):
        return int(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    raise wrong(path, value, _describe(kind))


def _check_plain(value: Any, path: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise wrong(path, value, "a finite number")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise RequestError(f"{path} has the key {_show(key)}; keys must be text")
            _check_plain(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{path}[{i}]")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise wrong(path, value, "text, a number, a list or a group of settings")


def _check_range(spec: "dataclasses.Field[Any]", value: Any, path: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    bounds = {k: spec.metadata[k] for k in words if spec.metadata.get(k) is not None}
    kept = {
        "ge": lambda b: value >= b,
        "gt": lambda b: value > b,
        "le": lambda b: value <= b,
        "lt": lambda b: value < b,
    }
    if not all(kept[k](bound) for k, bound in bounds.items()):
        rule = " and ".join(f"{words[k]} {bound}" for k, bound in bounds.items())
        raise wrong(path, value, rule)


def default_of(spec: "dataclasses.Field[Any]") -> Any:
    """Return a field's default, or dataclasses.MISSING."""
    if spec.default is not dataclasses.MISSING:
        return spec.default
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    return dataclasses.MISSING


@functools.cache  # half of the time of reading a config
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _describe(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if kind in names:
        return names[kind]
    origin = typing.get_origin(kind) or kind
    if origin in (list, tuple):
        return "a list"
    if origin is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    return "a group of settings" if origin is dict else str(getattr(kind, "__name__", kind))


def wrong(path: str, value: Any, right: str, guess: str = "") -> RequestError:
    """Return the error that says which setting has which wrong value, and what would be right."""
    return RequestError(f"{path}={_show(value)} is wrong: it must be {right}{guess}")


def _show(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    except (TypeError, ValueError):
        text = type(value).__name__
    return shorten(text)


def shorten(text: str, length: int = 80) -> str:
    """Return `text` on one line, cut in the middle where it is longer than `length`."""
    printable = "".join(c if c.isprintable() else "?" for c in text)
    if len(printable) <= length:
        return printable
    return f"{printable[: length - 20]}...({len(printable)} characters)"
