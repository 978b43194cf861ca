"""JSON schemas of a run's config and of the files of conf/, for editors and other programs.

pydantic makes them from the dataclasses of the settings and the signatures of the shipped targets.
A target of the user's own may have any arguments.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cifar_lab.config import targets
from cifar_lab.config.components import OptimizerConfig, SchedulerConfig
from cifar_lab.config.groups import find_options
from cifar_lab.config.launch import LaunchOptions, SearchOptions
from cifar_lab.config.reference import find_sections
from cifar_lab.config.reports import Report
from cifar_lab.config.run_config import RunConfig
from cifar_lab.config.schema import adapter, hints

Schema = dict[str, Any]

_DRAFT = "http://json-schema.org/draft-07/schema#"
_COMPONENTS = ("model", "optimizer", "activation", "scheduler", "tracker")
_OPTIONAL = ("activation", "scheduler", "tracker")
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
_OWN_SETTINGS = {"optimizer": OptimizerConfig.own, "scheduler": SchedulerConfig.own}
# Null for a number of steps: the whole run.
_STEPS_OF_SCHEDULERS = ("T_max", "total_steps", "total_iters")


def run_schema() -> Schema:
    """Return the schema of the config.yaml of a run folder."""
    definitions = _definitions(partial=False)
    run = definitions.pop("RunConfig")
    head = {"$schema": _DRAFT, "title": "config.yaml of a run of cifar_lab"}
    return {**head, **run, "$defs": definitions}


def file_schemas() -> dict[str, Schema]:
    """Return the schemas of the files of conf/, by the name of a group; `config` for the others.

    Their settings are all optional, since a run composes several files, and their values may be
    interpolations such as ${optimizer.lr}.
    """
    definitions = _definitions(partial=True)
    schemas = {"config": _composition(definitions), "report": {"$ref": "#/$defs/Report"}}
    for group in find_options():
        if group != "experiment":
            schemas[group.rpartition("/")[2]] = _option(group, definitions)
    return {
        name: {"$schema": _DRAFT, "title": f"conf: {name}", **schema, "$defs": definitions}
        for name, schema in schemas.items()
    }


def write_file_schemas(folder: Path) -> None:
    """Write the schemas of the files of conf/ into a folder, as GROUP.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, schema in file_schemas().items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(schema, indent=1) + "\n", encoding="utf-8")


def _definitions(*, partial: bool) -> dict[str, Schema]:
    """Return the schema of each dataclass and of each role of targets, by its name.

    `partial`: every setting is optional and may be an interpolation.
    """
    definitions: dict[str, Schema] = {}
    for cls in (RunConfig, LaunchOptions, Report):
        definitions |= adapter(cls).json_schema()["$defs"]
    run, dataset = definitions["RunConfig"]["properties"], definitions["DatasetConfig"]
    null = {"type": "null"}
    for role in _COMPONENTS:
        run[role] = {"anyOf": [{"$ref": f"#/$defs/{role}"}, *([null] if role in _OPTIONAL else [])]}
    figure = {"anyOf": [{"$ref": "#/$defs/figures"}, null]}
    run["figures"] = {"type": "object", "additionalProperties": figure}
    dataset["properties"]["source"] = {"$ref": "#/$defs/dataset.source"}
    if partial:
        for schema in definitions.values():
            schema.pop("required", None)
            schema["properties"] = {k: _partial(v) for k, v in schema["properties"].items()}
    meanings = {s.key: s.meaning for section in find_sections() for s in section.settings}
    for role in (*_COMPONENTS, "figures", "dataset.source"):
        definitions[role] = _target(role, meanings, partial=partial)
    return definitions


def _partial(schema: Schema) -> Schema:
    """Let a value be an interpolation, too; groups of settings stay as they are."""
    if "$ref" in json.dumps(schema) and schema.get("type") != "array":
        return schema
    described = {"description": schema.pop("description")} if "description" in schema else {}
    return {**described, "anyOf": [schema, _INTERPOLATION]}


def _composition(definitions: dict[str, Schema]) -> Schema:
    """Return the schema of conf/config.yaml and of experiments."""
    protocols = {name: {"$ref": "#/$defs/RunConfig"} for name in ("sound", "report")}
    own: dict[str, Schema] = {
        "defaults": {"type": "array"},
        "hydra": {"type": "object"},
        "protocols": _object(protocols),
    }
    run, launching = definitions["RunConfig"], definitions["LaunchOptions"]
    return _object({**run["properties"], **launching["properties"], **own})


def _option(group: str, definitions: dict[str, Schema]) -> Schema:
    """Return the schema of an option of a group."""
    defaults = {"defaults": {"type": "array"}}
    if group in _COMPONENTS:
        return {"$ref": f"#/$defs/{group}"}
    if group == "figures":
        figures = definitions["RunConfig"]["properties"]["figures"]
        return {**figures, "properties": defaults}
    if group == "hydra/launcher":
        keys = {key for path in find_options()[group].values() for key in _read(path)}
        return _object({key: {} for key in sorted(keys)})
    kind = SearchOptions if group == "search" else hints(RunConfig)[group]
    return _object({**definitions[kind.__name__]["properties"], **defaults})


def _target(role: str, meanings: Mapping[str, str], *, partial: bool) -> Schema:
    """Return the schema of a `_target_` with its arguments, each kind of target by itself."""
    known = _shipped_targets(role)
    arguments = {
        target: {
            name: _argument(kind, meanings.get(f"{role}.{name}"), partial=partial)
            for name, kind in _argument_kinds(target, role).items()
        }
        for target in known
    }
    target_name = {"type": ["string", "null"], "examples": known}
    chosen = [
        {
            "if": {"properties": {"_target_": {"const": name}}, "required": ["_target_"]},
            "then": _object({"_target_": {}, **properties}),
        }
        for name, properties in arguments.items()
    ]
    if partial:  # without a _target_, the settings belong to some shipped target
        every: dict[str, Schema] = {n: {} for properties in arguments.values() for n in properties}
        named = {"properties": {"_target_": {"type": "string"}}, "required": ["_target_"]}
        chosen.append({"if": {"not": named}, "then": _object({"_target_": {}, **every})})
    schema: Schema = {"type": "object", "properties": {"_target_": target_name}, "allOf": chosen}
    return schema if partial else {**schema, "required": ["_target_"]}


def _argument_kinds(target: str, role: str) -> dict[str, Any]:
    checked = "figures.any" if role == "figures" else role
    kinds = {**targets.argument_kinds(target, checked), **_OWN_SETTINGS.get(role, {})}
    if role == "scheduler":
        kinds |= {name: int | None for name in _STEPS_OF_SCHEDULERS if name in kinds}
    return {name: kind for name, kind in kinds.items() if name not in _INJECTED.get(role, ())}


def _argument(kind: Any, meaning: str | None, *, partial: bool) -> Schema:
    schema = adapter(kind).json_schema()["items"]
    described = {"description": meaning} if meaning is not None else {}
    return {**described, **(_partial(schema) if partial and schema else schema)}


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
