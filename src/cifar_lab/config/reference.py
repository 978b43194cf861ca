"""All settings, by groups: a row a key, and beside them what each option of a group sets.

A setting's meaning, its range, and whether it is part of a run's identity are those of its field;
where it is an argument of a target, its comment in conf/ says what it means.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cifar_lab.config.groups import config_folder, default_options, find_options
from cifar_lab.config.identity import TRANSPORT_ARGUMENTS
from cifar_lab.config.launch import LAUNCH_KEYS, LaunchOptions
from cifar_lab.config.run_config import RunConfig
from cifar_lab.config.schema import as_typed, describe_values, find_field, hints
from cifar_lab.errors import UsageError, did_you_mean, shorten

_PARTS = ("split", "training", "evaluation", "study")  # of conf/config.yaml
_ABOUT = {
    "run": "Single settings of a run",
    "launch": "How runs are launched; none of it is part of a run",
    "model": "The network, and what its constructor takes",
    "optimizer": "The optimizer, and what it takes",
    "activation": "The activation function of the models of this package",
    "scheduler": "How the learning rate changes during training",
    "figures": "What a run draws; `figures.NAME=null` leaves one out",
    "tracker": "Where a run is sent while it trains; its files stay where they are",
    "hydra/launcher": "Where the runs of a sweep are started; without one, on this machine",
}
_FREE_MAPPINGS = ("protocols", "dataset.checksums", "choices")  # the names below are the user's


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


@dataclass(frozen=True)
class Section:
    """The settings of a group of conf/, or of a part of conf/config.yaml, which has no presets.

    `presets`: each option, what it is, and the values that it sets to something else than the
    defaults.
    """

    name: str
    about: str
    settings: tuple[Setting, ...]
    presets: tuple[tuple[str, str, str], ...] = ()


def find_sections(wanted: str = "") -> list[Section]:
    """Return all settings, or those of a group, of a key, or below a key."""
    sections = list(_sections())
    if not wanted:
        return sections
    for section in sections:
        if wanted == section.name:
            return [section]
        kept = [s for s in section.settings if s.key == wanted or s.key.startswith(f"{wanted}.")]
        if kept:
            return [dataclasses.replace(section, settings=tuple(kept), presets=())]
    names = [section.name for section in sections]
    keys = [setting.key for section in sections for setting in section.settings]
    raise UsageError(
        f"--settings {wanted} is wrong: there is no such group or setting"
        f"{did_you_mean(wanted, [*names, *keys])}; the groups are {', '.join(names)}"
    )


def as_text(sections: list[Section]) -> str:
    """Return the sections for a terminal: a paragraph per setting."""
    lines = []
    for section in sections:
        lines += [f"{section.name}: {section.about}" if section.about else section.name, ""]
        for setting in section.settings:
            identity = "part of" if setting.identity else "not part of"
            lines.append(f"  {setting.key} = {setting.default}")
            lines.append(f"      {setting.meaning}")
            lines.append(f"      {setting.values}; {identity} the run's identity")
        for choice, *texts in section.presets:
            lines += [f"  {choice}", *(f"      {text}" for text in texts if text)]
        lines.append("")
    return "\n".join(lines).rstrip()


_Entry = tuple[str, Any, str]
"""The key of a setting, its default and its comment."""


def _sections() -> Iterator[Section]:
    parts: dict[str, list[_Entry]] = {name: [] for name in ("run", *_PARTS, "launch")}
    for entry in _read_settings(config_folder() / "config.yaml", ""):
        head = entry[0].partition(".")[0]
        part = head if head in _PARTS else "launch" if head in LAUNCH_KEYS else "run"
        parts[part].append(entry)
    for name, entries in parts.items():
        yield Section(name, _about(name), tuple(_setting(*entry) for entry in entries))
    for group, files in find_options().items():
        if group != "experiment":
            yield _group_section(group, files)


def _group_section(group: str, files: dict[str, Path]) -> Section:
    """Return a row for each key that any option has, by the default option where it has it."""
    settings: dict[str, Setting] = {}
    presets = []
    first = default_options().get(group)
    for option in sorted(files, key=lambda name: (name != first, name)):
        values = []
        for entry in _read_settings(files[option], group.replace("/", ".")):
            setting = _setting(*entry)
            if settings.setdefault(setting.key, setting).default != setting.default:
                values.append(f"{setting.key}={shorten(setting.default, 60)}")
        choice = f"{group}={option}" + (" (default)" if option == first else "")
        presets.append((choice, _about_file(files[option]), ", ".join(values)))
    return Section(group, _about(group), tuple(settings.values()), tuple(presets))


def _setting(key: str, default: Any, note: str) -> Setting:
    field = find_field(LaunchOptions if key.partition(".")[0] in LAUNCH_KEYS else RunConfig, key)
    meaning = field[0].metadata.get("description") if field else None
    if field:
        values = describe_values(*field)
    else:
        kinds: dict[type, str] = {bool: "true or false", int: "a number", float: "a number"}
        kinds |= {list: "a list", dict: "a group of settings", type(None): "depends on the target"}
        values = kinds.get(type(default), "text")
    return Setting(key, as_typed(default), values, meaning or note, _is_identity(key))


def _read_settings(path: Path, prefix: str) -> Iterator[_Entry]:
    """Yield the settings of a file of conf/, without `_target_`, `defaults` and Hydra's own."""
    text = path.read_text(encoding="utf-8")
    loader, lines = yaml.SafeLoader(""), text.splitlines()

    def walk(node: Any, above: str) -> Iterator[_Entry]:
        for name, value in node.value:
            key = f"{above}.{name.value}" if above else name.value
            is_group = isinstance(value, yaml.MappingNode) and value.value
            if name.value in ("_target_", "defaults", "hydra"):
                continue
            if is_group and key not in _FREE_MAPPINGS:
                yield from walk(value, key)
            else:
                comment = lines[name.start_mark.line].partition(" # ")[2].strip()
                yield key, loader.construct_document(value), comment

    yield from walk(yaml.compose(text), prefix)


def _about_file(path: Path) -> str:
    """Return the comments above a file's first setting, or the one beside its `_target_`."""
    text = path.read_text(encoding="utf-8")
    head = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    above = [line for line in head if not line.startswith("# @package")]
    target = re.search(r"^_target_:[^#\n]*#\s*(.*)$", text, re.MULTILINE)
    return " ".join(line.lstrip("# ") for line in above).rstrip(".") or (
        target[1] if target else ""
    )


def _is_identity(key: str) -> bool:
    parts = key.split(".")
    if parts[0] in LAUNCH_KEYS or parts[0] in ("hydra", "protocols"):
        return False
    if key.startswith("dataset.source.") and parts[-1] in TRANSPORT_ARGUMENTS:
        return False
    above = [find_field(RunConfig, ".".join(parts[: i + 1])) for i in range(len(parts))]
    return all(field[0].metadata.get("identity", True) for field in above if field)


def _about(name: str) -> str:
    """Return what a group of settings is about: the first sentence of its dataclass."""
    if name in _ABOUT:
        return _ABOUT[name]
    kinds = {**hints(RunConfig), **hints(LaunchOptions)}
    paragraph = (kinds[name].__doc__ or "").strip().split("\n\n")[0]
    return " ".join(paragraph.split()).rstrip(".")
