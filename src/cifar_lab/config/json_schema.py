"""JSON schemas of a run's config and of the files of conf/, for editors and other programs.

pydantic makes them from the dataclasses of the settings and the signatures of the shipped targets.
A target of the user's own may have any arguments.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from cifar_lab.config import targets
from cifar_lab.config.components import OptimizerConfig, SchedulerConfig
from cifar_lab.config.groups import find_options
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
# The arguments that the program supplies, which no config sets.
_INJECTED = {
    *("num_classes", "activation", "conv_dropout", "dense_dropout"),
    *("params", "optimizer", "root", "checksums", "run"),
}
# Settings that the program reads itself; the target does not take them.
_OWN_SETTINGS = {
    "model": ("weights", "weights_sha256"),
    "optimizer": tuple(OptimizerConfig.own),
    "scheduler": tuple(SchedulerConfig.own),
}


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
    own: Schema = {"defaults": {}, "hydra": {"type": "object"}, "protocols": protocols}
    schemas = {"config": _object({**run, **launching, **own}), "report": _refer("Report")}
    for group, files in find_options().items():
        schema = definitions.get(f"{group.capitalize()}Config", _refer(group))
        if group == "search":
            schema = definitions["SearchOptions"]
        elif group == "figures":
            schema = {**run[group], "properties": {"defaults": {}}}
        elif group == "hydra/launcher":
            schema = _object({key: {} for path in files.values() for key in _read(path)})
        elif group not in _COMPONENTS:
            schema = _object({**schema.get("properties", {}), "defaults": {}})
        if group != "experiment":
            schemas[group.rpartition("/")[2]] = schema
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
    run["figures"] = {"type": "object", "additionalProperties": figure}
    dataset["source"] = _refer("dataset.source")
    if partial:
        for schema in definitions.values():
            schema.pop("required", None)
            schema["properties"] = {k: _partial(v) for k, v in schema["properties"].items()}
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
    """Return the schema of a `_target_` with the arguments of all shipped targets of a role."""
    group = role.partition(".")[0]
    shipped = {name for path in find_options()[group].values() for name in _names(_read(path))}
    kinds: dict[str, list[Schema]] = {name: [] for name in _OWN_SETTINGS.get(role, ())}
    for target in sorted(shipped):
        checked = "figures.any" if role == "figures" else role
        for name, kind in targets.argument_kinds(target, checked).items():
            kinds.setdefault(name, []).append(adapter(kind).json_schema()["items"])
    # null is what the program fills in, as the number of a scheduler's steps
    extra = [_NULL, *([_INTERPOLATION] if partial else [])]
    meanings = {s.key: {"description": s.meaning} for x in find_sections() for s in x.settings}
    arguments = {
        name: {
            **meanings.get(f"{role}.{name}", {}),
            **({"anyOf": [*any_of, *extra]} if any_of else {}),
        }
        for name, any_of in kinds.items()
        if name not in _INJECTED
    }
    ours = {"properties": {"_target_": {"enum": [*sorted(shipped), None]}}}
    return {
        "type": "object",
        "properties": {"_target_": {"type": ["string", "null"], "examples": sorted(shipped)}},
        **({} if partial else {"required": ["_target_"]}),
        "if": ours,  # so it is without a _target_, in a file that changes one of ours
        "then": _object({"_target_": {}, **arguments}),
    }


def _names(content: Any) -> Iterator[str]:
    """Yield the `_target_` names in a file of conf/."""
    for key, value in content.items():
        if key == "_target_" and value is not None:
            yield value
        elif isinstance(value, dict):
            yield from _names(value)


def _refer(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _object(properties: Mapping[str, Schema]) -> Schema:
    return {"type": "object", "properties": dict(properties), "additionalProperties": False}


def _read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
