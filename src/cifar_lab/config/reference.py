"""A reference of all settings: a row a key, and beside them what each option of a group sets.

A setting's meaning, its range, and whether it is part of a run's identity are those of its field;
where it is an argument of a target, its comment in conf/ says what it means.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
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
_FREE_MAPPINGS = ("protocols", "dataset.checksums", "choices")  # the names below are the user's

_PAGE_INTRODUCTION = """\
# Settings

Every setting that a command line can change, by `key=value`, and the options that `group=option`
chooses, with the values that they bring. `python -m cifar_lab.describe --settings [GROUP]` prints
the same on a terminal. Settings marked "yes" under *identity* are part of a run's identity: another
value makes another run, in a folder of its own.

`scripts/update_settings` writes this page from the dataclasses of the settings and from the
comments in `conf/`; do not edit it."""


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
class Preset:
    """An option of a group, and the values that it sets to something else than the defaults."""

    choice: str
    about: str
    values: str


@dataclass(frozen=True)
class Section:
    """The settings of a group of conf/, or of a part of conf/config.yaml, which has no presets."""

    name: str
    about: str
    settings: tuple[Setting, ...]
    presets: tuple[Preset, ...] = ()


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
        for preset in section.presets:
            lines.append(f"  {preset.choice}")
            lines += [f"      {text}" for text in (preset.about, preset.values) if text]
        lines.append("")
    return "\n".join(lines).rstrip()


def settings_page() -> str:
    """Return docs/settings.md: an introduction, and a table or two for each section."""
    lines = [_PAGE_INTRODUCTION, ""]
    for section in find_sections():
        lines += [f"## {section.name}", ""]
        if section.about:
            lines += [section.about[:1].upper() + section.about[1:] + ".", ""]
        rows = [
            (f"`{s.key}`", f"`{s.default}`", s.values, "yes" if s.identity else "no", s.meaning)
            for s in section.settings
        ]
        lines += _table(("setting", "default", "values", "identity", "meaning"), rows)
        presets = [(f"`{p.choice}`", p.about, p.values) for p in section.presets]
        lines += _table(("option", "what it is", "sets"), presets)
    return "\n".join(lines).rstrip() + "\n"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    cells = [head, ("---",) * len(head), *rows]
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in cells]
    return [*lines, ""] if rows else []


_Entry = tuple[str, Any, str]
"""The key of a setting, its default and its comment."""


def _sections() -> Iterator[Section]:
    parts: dict[str, list[_Entry]] = {name: [] for name in ("run", *_PARTS, "launch")}
    for entry in _read_settings(config_folder() / "config.yaml", ""):
        head = entry[0].partition(".")[0]
        part = head if head in _PARTS else "launch" if head in LAUNCH_KEYS else "run"
        parts[part].append(entry)
    abouts = {name: _first_sentence(hints(RunConfig)[name].__doc__) for name in _PARTS}
    abouts["run"] = "single settings of a run"
    abouts["launch"] = "how runs are launched; none of it is part of a run"
    for name, entries in parts.items():
        yield Section(name, abouts[name], tuple(_setting(*entry) for entry in entries))
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
        presets.append(Preset(choice, _about_file(files[option]), ", ".join(values)))
    kind = hints(RunConfig).get(group)
    about = _first_sentence(kind.__doc__) if dataclasses.is_dataclass(kind) else ""
    return Section(group, about, tuple(settings.values()), tuple(presets))


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
    above = [line for line in head if not re.match(r"# (@package|yaml-language-server:)", line)]
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


def _first_sentence(text: str | None) -> str:
    paragraph = (text or "").strip().split("\n\n")[0]
    sentence = " ".join(paragraph.split()).rstrip(".")
    return sentence[:1].lower() + sentence[1:]
