"""What makes two runs the same run, and the address that follows from it."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from cifar_lab.config.run_config import RunConfig, to_plain
from cifar_lab.config.schema import default_of

TRANSPORT_ARGUMENTS = ("mirrors", "stall_seconds", "patience_minutes", "npm", "max_broken")
"""Arguments of a dataset's source that say how bytes travel, never which bytes."""

_ADDED_DEFAULTS = {"skip_broken": False}
"""Arguments of a dataset's source that came later, with the default that is left out."""

_MAX_NAME = 100
_FORBIDDEN_IN_NAMES = re.compile(r"[^\w.+\-]")


def identity(config: RunConfig, *, with_defaults: bool = False) -> dict[str, Any]:
    """Return what makes two runs the same run: identity fields that differ from their default.

    Defaults are left out, so that a new setting moves no folder that is already there; to show
    what differs between runs, they are wanted.
    """
    result = _identity_fields(config, with_defaults)
    if "device" in result:
        result["device"] = result["device"].split(":")[0]
    source = {
        key: value
        for key, value in config.dataset.source.items()
        if key not in TRANSPORT_ARGUMENTS and value is not _ADDED_DEFAULTS.get(key, ...)
    }
    result["dataset"]["source"] = source
    if config.model.get("weights_sha256"):  # the content of the file counts, not its place
        result["model"] = {k: v for k, v in config.model.items() if k != "weights"}
    return result


def identity_hash(config: RunConfig) -> str:
    """Return the 8 hex digits of a run's identity, with which the name of its folder ends."""
    canonical = json.dumps(identity(config), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def address(config: RunConfig) -> Path:
    """Return the folder of a run: <output_dir>/<name>/<readable choices>-<8 hex of identity>.

    A pure function of a resolved config (device and precision no longer "auto").
    """
    parts = [config.dataset.name]
    parts += [
        config.choices[k] for k in ("model", "optimizer", "activation") if k in config.choices
    ]
    if "lr" in config.optimizer:
        parts.append(f"lr{config.optimizer['lr']:g}")
    parts.append(f"seed{config.seed}")
    if config.split.fold is not None:
        parts.append(f"fold{config.split.fold}")
    readable = _FORBIDDEN_IN_NAMES.sub("_", "-".join(parts))[:_MAX_NAME]
    readable = readable.encode()[: 2 * _MAX_NAME].decode(errors="ignore")  # file names are bytes
    return Path(config.output_dir) / config.name / f"{readable}-{identity_hash(config)}"


def _identity_fields(value: Any, with_defaults: bool) -> dict[str, Any]:
    """Return the identity fields of a dataclass as plain values."""
    result: dict[str, Any] = {}
    for spec in dataclasses.fields(value):
        item = getattr(value, spec.name)
        left_out = item == default_of(spec) and not with_defaults
        if left_out or not spec.metadata.get("identity", True):
            continue
        nested = dataclasses.is_dataclass(item)
        plain = _identity_fields(item, with_defaults) if nested else to_plain(item)
        if plain or not nested:
            result[spec.name] = plain
    return result
