"""JSON schemas of a run's config and of the files of conf/, for editors and other programs.

pydantic makes them from the dataclasses of the settings; the arguments of targets are those in the
files of conf/. A target of the user's own may have any.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cifar_lab.config.groups import find_options, read_option
from cifar_lab.config.launch import LaunchOptions
from cifar_lab.config.reference import find_sections
from cifar_lab.config.reports import Report
from cifar_lab.config.run_config import RunConfig
from cifar_lab.config.schema import adapter

Schema = dict[str, Any]

_DRAFT = "http://json-schema.org/draft-07/schema#"
_NULL = {"type": "null"}
_INTERPOLATION = {"type": "string", "pattern": r"^\$\{.+\}$"}
_COMPONENTS = ("model", "optimizer", "activation", "scheduler", "tracker")


def run_schema() -> Schema:
    """Return the schema of the config.yaml of a run folder."""
    definitions = _definitions(partial=False)
    run = definitions.pop("RunConfig")
    head = {"$schema": _DRAFT, "title": "config.yaml of a run of cifar_lab"}
    return {**head, **run, "$defs": definitions}


def write_file_schemas(folder: Path) -> None:
    """Write the schemas of the files of conf/ into a folder: GROUP.json, and config.json.

    Their settings are all optional, since a run composes several files, and their values may be
    interpolations such as ${optimizer.lr}.
    """
    definitions = _definitions(partial=True)
    run, launching = (definitions[n]["properties"] for n in ("RunConfig", "LaunchOptions"))
    protocols = _object({name: _refer("RunConfig") for name in ("sound", "report")})
    config = {**run, **launching, "hydra": {"type": "object"}, "protocols": protocols}
    options = find_options()
    launchers = options.pop("hydra/launcher").values()
    schemas = {
        **{group: config[group] for group in options if group != "experiment"},
        "config": _object({**config, "defaults": {}}),  # of conf/config.yaml and experiments
        "launcher": _object({key: {} for path in launchers for key in read_option(path)}),
        "report": _refer("Report"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, schema in schemas.items():
        whole = {"$schema": _DRAFT, "title": f"conf: {name}", **schema, "$defs": definitions}
        path = folder / f"{name}.json"
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def _definitions(*, partial: bool) -> dict[str, Schema]:
    """Return the schema of each dataclass and of each role of targets, by its name.

    `partial`: every setting is optional and may be an interpolation.
    """
    definitions: dict[str, Schema] = {}
    for cls in (RunConfig, LaunchOptions, Report):
        definitions |= adapter(cls).json_schema()["$defs"]
    run, dataset = (definitions[n]["properties"] for n in ("RunConfig", "DatasetConfig"))
    for role in _COMPONENTS:
        run[role] = {"anyOf": [_refer(role), _NULL]}
    figure = {"anyOf": [_refer("figures"), _NULL]}
    run["figures"] = {
        "type": "object",
        "properties": {"defaults": {}} if partial else {},
        "additionalProperties": figure,
    }
    dataset["source"] = _refer("dataset.source")
    if partial:
        for schema in definitions.values():
            schema.pop("required", None)
            properties = {key: _partial(value) for key, value in schema["properties"].items()}
            schema["properties"] = {**properties, "defaults": {}}
    for role in (*_COMPONENTS, "figures", "dataset.source"):
        definitions[role] = _target(role, partial=partial)
    return definitions


def _partial(schema: Schema) -> Schema:
    """Let a value be an interpolation, too; groups of settings stay as they are."""
    if "$ref" in json.dumps(schema) and schema.get("type") != "array":
        return schema
    described = {"description": schema.pop("description")} if "description" in schema else {}
    return {**described, "anyOf": [schema, _INTERPOLATION]}


def _target(role: str, *, partial: bool) -> Schema:
    """Return the schema of a `_target_` with the arguments that the shipped ones have in conf/."""
    group, _, part = role.partition(".")
    (section,) = find_sections(group)
    depth = 2 if part or group == "figures" else 1
    arguments: dict[str, Schema] = {"_target_": {}}
    for setting in section.settings:
        if setting.key.startswith(role):
            name = setting.key.split(".", depth)[-1]
            arguments[name] = {"description": setting.meaning, **_like(setting.default, partial)}
    names = {name for path in find_options()[group].values() for name in _names(read_option(path))}
    return {
        "type": "object",
        **({} if partial else {"required": ["_target_"]}),
        # so it is without a _target_, in a file that changes one of ours
        "if": {"properties": {"_target_": {"enum": [*sorted(names), None]}}},
        "then": _object(arguments),
    }


def _like(default: str, partial: bool) -> Schema:
    """Return the schema of a value such as a default, or null; of any where that says nothing."""
    kinds = {bool: "boolean", int: "number", float: "number", list: "array"}
    try:
        kind = kinds.get(type(json.loads(default)))
    except ValueError:
        kind = None if default.startswith("${") else "string"
    if kind is None:
        return {}
    return {"anyOf": [{"type": [kind, "null"]}, *([_INTERPOLATION] if partial else [])]}


def _names(content: Any) -> Iterator[str]:
    """Yield the `_target_` names in a file of conf/."""
    for key, value in (content or {}).items():
        if key == "_target_" and value is not None:
            yield value
        elif isinstance(value, dict):
            yield from _names(value)


def _refer(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _object(properties: Mapping[str, Schema]) -> Schema:
    return {"type": "object", "properties": dict(properties), "additionalProperties": False}
