"""All settings, a row a key, for `describe --settings` and for docs/settings.

A setting's meaning, its range, and whether it is part of a run's address are those of its field;
where it is an argument of a target, its comment in conf/ says what it means.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cifar_lab.config.groups import config_folder, default_options, find_options
from cifar_lab.config.identity import TRANSPORT_ARGUMENTS
from cifar_lab.config.launch import LAUNCH_KEYS, LaunchOptions
from cifar_lab.config.run_config import RunConfig
from cifar_lab.config.schema import as_typed, describe_values, find_field
from cifar_lab.errors import UsageError, did_you_mean

_FREE_MAPPINGS = ("protocols", "dataset.checksums", "choices")  # the names below are the user's
_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
_KINDS |= {dict: "a group of settings", type(None): "depends on the target"}


@dataclass(frozen=True)
class Setting:
    """A setting: its key, default and values as text, and its meaning.

    `identity`: another value makes another run, with a folder of its own.
    """

    key: str
    default: str
    values: str
    meaning: str
    identity: bool


def find_settings(wanted: str = "") -> list[Setting]:
    """Return all settings, or those of a group, of a key, or below a key; each key once.

    The defaults are those of the default option of a group, or of the first that has the key.
    """
    rows: dict[str, Setting] = {}
    paths = [config_folder() / "config.yaml"]
    for group, files in find_options().items():
        if group != "experiment":
            first = default_options().get(group, "")
            paths += [*([files[first]] if first in files else []), *files.values()]
    for row in itertools.chain.from_iterable(map(read_settings, paths)):
        rows.setdefault(row.key, row)
    kept = [row for row in rows.values() if f"{row.key}.".startswith(f"{wanted}.") or not wanted]
    if not kept:
        raise UsageError(
            f"--settings {wanted} is wrong: there is no such group or setting"
            f"{did_you_mean(wanted, [*{key.partition('.')[0] for key in rows}, *rows])}"
        )
    return kept


def as_text(settings: list[Setting]) -> str:
    """Return settings for a terminal, a paragraph each."""
    return "\n".join(
        f"{row.key} = {row.default}\n    {row.meaning}\n    {row.values}; "
        f"{'part of' if row.identity else 'not part of'} the run's address"
        for row in settings
    )


def read_settings(path: Path) -> Iterator[Setting]:
    """Yield the settings of a file of conf/, without `_target_`, `defaults` and Hydra's own."""
    text = path.read_text(encoding="utf-8")
    loader, lines = yaml.SafeLoader(""), text.splitlines()

    def walk(node: Any, above: str) -> Iterator[Setting]:
        for name, value in node.value:
            key = f"{above}{name.value}"
            if name.value in ("_target_", "defaults", "hydra"):
                continue
            if isinstance(value, yaml.MappingNode) and value.value and key not in _FREE_MAPPINGS:
                yield from walk(value, f"{key}.")
            else:
                note = lines[name.start_mark.line].partition(" # ")[2].strip()
                yield _setting(key, loader.construct_document(value), note)

    group = path.parent.relative_to(config_folder()).as_posix()
    yield from walk(yaml.compose(text), "" if group == "." else f"{group.replace('/', '.')}.")


def _setting(key: str, default: Any, note: str) -> Setting:
    field = find_field(LaunchOptions if key.partition(".")[0] in LAUNCH_KEYS else RunConfig, key)
    values = describe_values(*field) if field else _KINDS.get(type(default), "text")
    meaning = field[0].metadata.get("description") if field else None
    return Setting(key, as_typed(default), values, meaning or note, _is_identity(key))


def _is_identity(key: str) -> bool:
    parts = key.split(".")
    if parts[0] in LAUNCH_KEYS or parts[0] in ("hydra", "protocols"):
        return False
    if key.startswith("dataset.source.") and parts[-1] in TRANSPORT_ARGUMENTS:
        return False
    above = [find_field(RunConfig, ".".join(parts[: i + 1])) for i in range(len(parts))]
    return all(field[0].metadata.get("identity", True) for field in above if field)
