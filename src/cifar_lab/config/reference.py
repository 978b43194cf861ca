"""A reference of all settings, from the dataclasses and from the files of conf/.

A setting's meaning, its range, and whether it is part of a run's identity are those of its field;
its default, and what is particular to an option or an argument of a target, those of the file.
"""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cifar_lab.config.groups import config_folder, default_options, find_options
from cifar_lab.config.identity import TRANSPORT_ARGUMENTS
from cifar_lab.config.launch import LaunchOptions
from cifar_lab.config.run_config import RunConfig
from cifar_lab.config.schema import as_typed, describe_values, find_field, hints
from cifar_lab.errors import UsageError, did_you_mean

_LAUNCHING = frozenset(spec.name for spec in dataclasses.fields(LaunchOptions))
_SECTIONS = ("split", "training", "evaluation", "study")  # of conf/config.yaml
_FREE_MAPPINGS = ("protocols", "dataset.checksums", "choices")  # the names below are the user's
_ABOUT = {
    "run": "single settings of a run",
    "launch": "how runs are launched; none of it is part of a run",
}

_PAGE_INTRODUCTION = """\
# Settings

Every setting that a command line can change: `key=value` for single settings, `group=option` for a
whole file of `conf/`. `python -m cifar_lab.describe --settings [GROUP]` prints the same on a
terminal. Settings marked "yes" under *identity* are part of a run's identity: another value makes
another run, in a folder of its own.

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
class Section:
    """The settings of one file of conf/, or of one part of conf/config.yaml."""

    group: str
    option: str | None
    is_default: bool
    about: str
    settings: tuple[Setting, ...]

    @property
    def title(self) -> str:
        """What selects the section: a part of conf/config.yaml, or group=option."""
        if self.option is None:
            return self.group
        return f"{self.group}={self.option}" + (" (default)" if self.is_default else "")


def find_sections(wanted: str = "") -> list[Section]:
    """Return all settings, or those of a group, of a key, or below a key."""
    sections = list(_sections())
    if not wanted:
        return sections
    found = []
    for section in sections:
        kept = [s for s in section.settings if s.key == wanted or s.key.startswith(f"{wanted}.")]
        if wanted == section.group or (section.option and wanted == section.title.split(" ")[0]):
            found.append(section)
        elif kept:
            found.append(dataclasses.replace(section, settings=tuple(kept)))
    if not found:
        groups = list(dict.fromkeys(section.group for section in sections))
        keys = [setting.key for section in sections for setting in section.settings]
        raise UsageError(
            f"--settings {wanted} is wrong: there is no such group or setting"
            f"{did_you_mean(wanted, [*groups, *keys])}; the groups are {', '.join(groups)}"
        )
    return found


def as_text(sections: list[Section]) -> str:
    """Return the sections for a terminal: a paragraph per setting."""
    lines = []
    for section in sections:
        lines += [f"{section.title}: {section.about}" if section.about else section.title, ""]
        for setting in section.settings:
            identity = "part of" if setting.identity else "not part of"
            lines.append(f"  {setting.key} = {setting.default}")
            lines.append(f"      {setting.meaning}")
            lines.append(f"      {setting.values}; {identity} the run's identity")
        lines.append("")
    return "\n".join(lines).rstrip()


def settings_page() -> str:
    """Return docs/settings.md: an introduction, and a table for each section."""
    lines = [_PAGE_INTRODUCTION, ""]
    for section in find_sections():
        lines += [f"## {section.title}", ""]
        if section.about:
            lines += [_escape(section.about[:1].upper() + section.about[1:]) + ".", ""]
        if section.settings:
            lines += [
                "| setting | default | values | identity | meaning |",
                "|---|---|---|---|---|",
            ]
        for s in section.settings:
            identity = "yes" if s.identity else "no"
            lines.append(
                f"| `{s.key}` | `{s.default}` | {_escape(s.values)} | {identity} "
                f"| {_escape(s.meaning)} |"
            )
        if section.settings:
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _sections() -> Iterator[Section]:
    main = list(_read_settings(config_folder() / "config.yaml", ""))
    heads = {key.partition(".")[0] for key, *_ in main}
    single = [entry for entry in main if entry[0].partition(".")[0] not in _SECTIONS]
    run = [entry for entry in single if entry[0] not in _LAUNCHING]
    yield _section("run", None, run, _ABOUT["run"])
    for name in _SECTIONS:
        assert name in heads
        part = [entry for entry in main if entry[0].startswith(f"{name}.")]
        kind: Any = hints(RunConfig)[name]
        yield _section(name, None, part, _first_sentence(kind.__doc__))
    launching = [entry for entry in single if entry[0] in _LAUNCHING]
    yield _section("launch", None, launching, _ABOUT["launch"])
    defaults = default_options()
    for group, options in find_options().items():
        if group == "experiment":
            continue
        first = defaults.get(group)
        for option in sorted(options, key=lambda name: (name != first, name)):
            path = options[option]
            prefix = group.replace("/", ".")
            entries = list(_read_settings(path, prefix))
            yield _section(group, option, entries, _about_file(path), is_default=option == first)


_Entry = tuple[str, Any, str]
"""The key of a setting, its default and its comment."""


def _section(
    group: str, option: str | None, entries: list[_Entry], about: str, *, is_default: bool = False
) -> Section:
    settings = tuple(
        Setting(
            key, as_typed(default), _values(key, default), _meaning(key, note), _is_identity(key)
        )
        for key, default, note in entries
    )
    return Section(group, option, is_default, about, settings)


def _read_settings(path: Path, prefix: str) -> Iterator[_Entry]:
    """Yield the settings of a file of conf/, without `_target_`, `defaults` and Hydra's own."""
    text = path.read_text(encoding="utf-8")
    comments: dict[str, str] = {}
    parents: list[tuple[int, str]] = [(-1, prefix)]
    for line in text.splitlines():
        if entry := re.match(r"( *)(\w+):.*?(?:\s# *(.*))?$", line):
            indent, name, comment = len(entry[1]), entry[2], entry[3]
            parents = [parent for parent in parents if parent[0] < indent]
            parents.append((indent, f"{parents[-1][1]}.{name}".lstrip(".")))
            comments[parents[-1][1]] = (comment or "").strip()
    for key, value in _walk(yaml.safe_load(text) or {}, prefix):
        yield key, value, comments.get(key, "")


def _walk(content: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        key = f"{prefix}.{name}" if prefix else name
        if name in ("_target_", "defaults", "hydra"):
            continue
        if isinstance(value, dict) and value and key not in _FREE_MAPPINGS:
            yield from _walk(value, key)
        else:
            yield key, value


def _about_file(path: Path) -> str:
    """Return the comments above a file's first setting, or the one beside its `_target_`."""
    text = path.read_text(encoding="utf-8")
    above: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not re.match(r"# (@package|yaml-language-server:)", line):
            above.append(line.lstrip("# "))
    target = re.search(r"^_target_:[^#\n]*#\s*(.*)$", text, re.MULTILINE)
    return " ".join(above).rstrip(".") or (target[1] if target else "")


def _find_field(key: str) -> tuple[dataclasses.Field[Any], Any] | None:
    return find_field(LaunchOptions if key.partition(".")[0] in _LAUNCHING else RunConfig, key)


def _meaning(key: str, note: str) -> str:
    """Return the note in an option's file, which tells more of it, else what the field says."""
    found = _find_field(key)
    return note or (found[0].metadata.get("description", "") if found else "")


def _values(key: str, default: Any) -> str:
    """Return which values a setting takes, by its dataclass, else by its default."""
    if (found := _find_field(key)) is not None:
        return describe_values(*found)
    kinds: dict[type, str] = {bool: "true or false", int: "a number", float: "a number"}
    kinds |= {list: "a list", dict: "a group of settings", str: "text"}
    return kinds.get(type(default), "depends on the target" if default is None else "text")


def _is_identity(key: str) -> bool:
    parts = key.split(".")
    if parts[0] in _LAUNCHING or parts[0] in ("hydra", "protocols"):
        return False
    above = [find_field(RunConfig, ".".join(parts[: i + 1])) for i in range(len(parts))]
    if not all(found[0].metadata.get("identity", True) for found in above if found):
        return False
    return not (key.startswith("dataset.source.") and parts[-1] in TRANSPORT_ARGUMENTS)


def _first_sentence(text: str | None) -> str:
    paragraph = (text or "").strip().split("\n\n")[0]
    sentence = " ".join(paragraph.split()).rstrip(".")
    return sentence[:1].lower() + sentence[1:]


def _escape(text: str) -> str:
    return text.replace("|", r"\|")
