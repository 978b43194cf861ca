"""JSON schemas of a run's config and of the files of conf/, for editors and other programs.

They are generated from the dataclasses of the settings and the signatures of the shipped targets.
A target of the user's own may have any arguments.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from cifar_lab.config import targets
from cifar_lab.config.data_config import DatasetConfig
from cifar_lab.config.groups import find_options
from cifar_lab.config.launch import LaunchOptions, SearchOptions
from cifar_lab.config.reference import find_sections
from cifar_lab.config.reports import Report
from cifar_lab.config.run_config import RunConfig
from cifar_lab.config.schema import default_of, hints

Schema = dict[str, Any]

_DRAFT = "http://json-schema.org/draft-07/schema#"
_COMPONENTS = ("model", "optimizer", "activation", "scheduler", "tracker")
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_INTERPOLATION = {"type": "string", "pattern": r"^\$\{.+\}$"}
# The arguments that the program supplies, which no config sets.
_INJECTED = {
    "model": {"image_shape", "num_classes", "activation", "conv_dropout", "dense_dropout"},
    "optimizer": {"params"},
    "scheduler": {"optimizer"},
    "dataset.source": {"root", "checksums"},
    "figures": {"run"},
}
# Settings that the program reads itself; the target does not take them.
_OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "optimizer": {"backbone_lr": float | None},
    "scheduler": {"step": Literal["batch", "epoch"], "monitor": str | None},
}
# Null for a number of steps: the whole run.
_STEPS_OF_SCHEDULERS = ("T_max", "total_steps", "total_iters")


def run_schema() -> Schema:
    """Return the schema of the config.yaml of a run folder."""
    schema = _Generator(partial=False).dataclass(RunConfig, "")
    return {"$schema": _DRAFT, "title": "config.yaml of a run of cifar_lab", **schema}


def file_schemas() -> dict[str, Schema]:
    """Return the schemas of the files of conf/, by the name of a group; `config` for the others.

    Their settings are all optional, since a run composes several files, and their values may be
    interpolations such as ${optimizer.lr}.
    """
    make = _Generator(partial=True)
    found = {"config": _composition(make), "report": make.dataclass(Report, "")}
    for group in find_options():
        if group != "experiment":
            found[group.rpartition("/")[2]] = _option(make, group)
    return {
        name: {"$schema": _DRAFT, "title": f"conf: {name}", **schema}
        for name, schema in found.items()
    }


def write_file_schemas(folder: Path) -> None:
    """Write the schemas of the files of conf/ into a folder, as GROUP.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, schema in file_schemas().items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(schema, indent=1) + "\n", encoding="utf-8")


def _composition(make: "_Generator") -> Schema:
    """Return the schema of conf/config.yaml and of experiments."""
    settings = make.dataclass(RunConfig, "")["properties"]
    launching = make.dataclass(LaunchOptions, "")["properties"]
    protocols = {name: {"$ref": "#/definitions/settings"} for name in ("sound", "report")}
    own: dict[str, Schema] = {
        "defaults": {"type": "array"},
        "hydra": {"type": "object"},
        "protocols": {"type": "object", "properties": protocols, "additionalProperties": False},
    }
    shared = {name: {"$ref": f"#/definitions/settings/properties/{name}"} for name in settings}
    return {
        "definitions": {"settings": _object(settings)},
        **_object({**shared, **launching, **own}),
    }


def _option(make: "_Generator", group: str) -> Schema:
    """Return the schema of an option of a group."""
    defaults = {"defaults": {"type": "array"}}
    if group in _COMPONENTS:
        return make.target(group)
    if group == "figures":
        named = {"anyOf": [make.target("figures"), {"type": "null"}]}
        return {"type": "object", "properties": defaults, "additionalProperties": named}
    if group == "hydra/launcher":
        keys = {key for path in find_options()[group].values() for key in _read(path)}
        return _object({key: {} for key in sorted(keys)})
    kind = {"search": SearchOptions, "dataset": DatasetConfig}.get(group)
    schema = make.dataclass(kind or typing.cast(type, hints(RunConfig)[group]), group)
    return {**schema, "properties": {**schema["properties"], **defaults}}


class _Generator:
    """Makes schemas; `partial`: every setting is optional and may be an interpolation."""

    def __init__(self, *, partial: bool) -> None:
        self._partial = partial
        self._meanings: dict[str, str] = {}
        for section in find_sections():
            for setting in section.settings:
                self._meanings.setdefault(setting.key, setting.meaning)

    def dataclass(self, cls: type, prefix: str) -> Schema:
        """Return the schema of a dataclass whose settings stand below `prefix`."""
        properties, required = {}, []
        for spec in dataclasses.fields(cls):
            key = f"{prefix}.{spec.name}" if prefix else spec.name
            schema = self._field(hints(cls)[spec.name], key, spec.metadata)
            if key in self._meanings:
                schema = {"description": self._meanings[key], **schema}
            properties[spec.name] = schema
            if default_of(spec) is dataclasses.MISSING:
                required.append(spec.name)
        whole = _object(properties)
        return whole if self._partial or not required else {**whole, "required": required}

    def target(self, role: str) -> Schema:
        """Return the schema of a `_target_` with its arguments, each kind of target by itself."""
        known = _shipped_targets(role)
        arguments = {target: self._arguments(target, role) for target in known}
        every: dict[str, Schema] = {
            name: {} for properties in arguments.values() for name in properties
        }
        target = {"type": ["string", "null"], "examples": known}
        chosen = [
            {
                "if": {"properties": {"_target_": {"const": name}}, "required": ["_target_"]},
                "then": _object({"_target_": {}, **properties}),
            }
            for name, properties in arguments.items()
        ]
        if self._partial:  # without a _target_, the settings belong to some shipped target
            named = {"properties": {"_target_": {"type": "string"}}, "required": ["_target_"]}
            unnamed = {"if": {"not": named}, "then": _object({"_target_": {}, **every})}
            chosen.append(unnamed)
        schema: Schema = {"type": "object", "properties": {"_target_": target}, "allOf": chosen}
        return schema if self._partial else {**schema, "required": ["_target_"]}

    def _arguments(self, target: str, role: str) -> dict[str, Schema]:
        checked = "figures.any" if role == "figures" else role
        kinds = {**targets.argument_kinds(target, checked), **_OWN_SETTINGS.get(role, {})}
        if role == "scheduler":
            kinds |= {name: int | None for name in _STEPS_OF_SCHEDULERS if name in kinds}
        return {
            name: self._described(self._value(kind), f"{role}.{name}")
            for name, kind in kinds.items()
            if name not in _INJECTED.get(role, ())
        }

    def _described(self, schema: Schema, key: str) -> Schema:
        return {"description": self._meanings[key], **schema} if key in self._meanings else schema

    def _field(self, kind: Any, key: str, metadata: Mapping[str, Any]) -> Schema:
        if key in _COMPONENTS or key == "dataset.source":
            target = self.target(key)
            optional = type(None) in typing.get_args(kind)
            return {"anyOf": [target, {"type": "null"}]} if optional else target
        if key == "figures":
            named = {"anyOf": [self.target("figures"), {"type": "null"}]}
            return {"type": "object", "additionalProperties": named}
        if dataclasses.is_dataclass(kind):
            return self.dataclass(typing.cast(type, kind), key)
        bounds = {_BOUNDS[k]: metadata[k] for k in _BOUNDS if metadata.get(k) is not None}
        return self._value(kind, bounds)

    def _value(self, kind: Any, bounds: Mapping[str, Any] | None = None) -> Schema:
        """Return the schema of a plain value; `bounds` apply to numbers."""
        schema = _of_kind(kind, dict(bounds or {}), self)
        return {"anyOf": [schema, _INTERPOLATION]} if self._partial and schema else schema


def _of_kind(kind: Any, bounds: Schema, make: _Generator) -> Schema:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_of_kind(one, bounds, make) for one in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if dataclasses.is_dataclass(kind):
        return make.dataclass(typing.cast(type, kind), "")
    if kind in (int, float):
        return {"type": "integer" if kind is int else "number", **bounds}
    if origin in (list, tuple) or kind in (list, tuple):
        items = {"items": _of_kind(arguments[0], {}, make)} if arguments else {}
        return {"type": "array", **items}
    if origin is dict or kind is dict:
        values = _of_kind(arguments[1], {}, make) if arguments else {}
        return {"type": "object", "additionalProperties": values or True}
    names: dict[Any, str] = {bool: "boolean", str: "string", type(None): "null"}
    return {"type": names[kind]} if kind in names else {}


def _object(properties: Mapping[str, Schema]) -> Schema:
    return {"type": "object", "properties": dict(properties), "additionalProperties": False}


def _shipped_targets(role: str) -> list[str]:
    """Return the `_target_` names that the options of a group have, each once."""
    options = find_options()[role.partition(".")[0]].values()
    found = []
    for content in map(_read, options):
        targets = [content]
        if role == "figures":
            targets = [one for one in content.values() if isinstance(one, dict)]
        elif role == "dataset.source":
            targets = [content["source"]]
        found += [one["_target_"] for one in targets if one.get("_target_")]
    return list(dict.fromkeys(found))


def _read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
