"""All settings, a row a key, for `describe --settings` and docs/settings; the help page of `train`.

Both are read from conf/, without Hydra and without composing anything.

A setting's meaning, its range, and whether it is part of a run's address are those of its field;
where it is an argument of a target, its comment in conf/ says what it means.
"""

import argparse
import functools
import itertools
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cifar_lab.config.command_line import (
    config_folder,
    default_options,
    default_settings,
    find_options,
    make_parser,
    unknown_key,
)
from cifar_lab.config.identity import TRANSPORT_ARGUMENTS
from cifar_lab.config.launch import LAUNCH_KEYS, LaunchOptions
from cifar_lab.config.run_config import RunConfig
from cifar_lab.config.schema import as_typed, describe_values, find_field

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
            paths += sorted(files.values(), key=lambda p: p.stem != default_options().get(group))
    for row in itertools.chain.from_iterable(map(read_settings, paths)):
        rows.setdefault(row.key, row)
    kept = [row for row in rows.values() if f"{row.key}.".startswith(f"{wanted}.") or not wanted]
    if not kept:
        start = wanted[: wanted.rfind(".") + 1]
        beside = [key.removeprefix(start).split(".")[0] for key in rows if key.startswith(start)]
        raise unknown_key(wanted, dict.fromkeys(beside), rows)
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
                default = loader.construct_document(value)
                schema = LaunchOptions if key.partition(".")[0] in LAUNCH_KEYS else RunConfig
                field = find_field(schema, key)
                values = describe_values(*field) if field else _KINDS.get(type(default), "text")
                meaning = field[0].metadata.get("description") if field else None
                yield Setting(key, as_typed(default), values, meaning or note, _is_identity(key))

    group = path.parent.relative_to(config_folder()).as_posix()
    yield from walk(yaml.compose(text), "" if group == "." else f"{group.replace('/', '.')}.")


def _is_identity(key: str) -> bool:
    parts = key.split(".")
    if parts[0] in LAUNCH_KEYS or parts[0] in ("hydra", "protocols"):
        return False
    if key.startswith("dataset.source.") and parts[-1] in TRANSPORT_ARGUMENTS:
        return False
    above = [find_field(RunConfig, ".".join(parts[: i + 1])) for i in range(len(parts))]
    return all(field[0].metadata.get("identity", True) for field in above if field)


# --- the help page ------------------------------------------------------------------------------

_WIDTH = 100

_USAGE = "python -m cifar_lab.train [RUN_DIR | FILE.yaml] [GROUP=OPTION ...] [KEY=VALUE ...] [-m]"

_INTRODUCTION = """\
Trains and evaluates one run, or with -m (or an experiment that is a grid) many. A run is one option
of each group and single values that are changed. RUN_DIR is the folder of a past run: it continues,
or with changes it is the start of another run. FILE.yaml is the config.yaml of somebody's run."""

_MOST_USED = (
    *("optimizer.lr", "training.epochs", "training.batch_size", "training.patience", "seed"),
    *("device", "output_dir", "name", "plan", "rerun"),
)

_EXAMPLES = """
Examples:
  one small run, without a download
    python -m cifar_lab.train dataset=digits
  choices of your own
    python -m cifar_lab.train model=convnet_deep optimizer=sgd optimizer.lr=0.01 training.epochs=30
  a grid of six runs
    python -m cifar_lab.train optimizer=adam,sgd seed=0,1,2 -m"""


def help_page(config_dir: str | None = None) -> str:
    """Return the page: flags, groups with their options, the settings used most and examples."""
    options = find_options(config_dir)
    groups = dict.fromkeys(["dataset", *default_options(), *sorted(options)])
    parser = make_parser()
    shell = "print shell completion, to be evaluated (also zsh, fish)"
    parser.add_argument("-sc", metavar="install=bash", help=shell)
    parser.add_argument("--version", action="store_true", help="print the versions and exit")
    parser.add_argument("-h", "--help", action="store_true", help="print this page and exit")
    parser.usage, parser.description = _USAGE, _INTRODUCTION
    form = argparse.RawDescriptionHelpFormatter
    parser.formatter_class = functools.partial(form, width=_WIDTH, max_help_position=30)
    lines = ["Groups and their options (* is the default):"]
    for group in (group for group in groups if group in options):
        default = default_options().get(group)
        words = ", ".join(name + "*" * (name == default) for name in options[group])
        if group == "augmentation":
            words = words.replace("*", "") + " (the default depends on the dataset)"
        start, rest = f"  {group:14} ", " " * 17
        lines.append(textwrap.fill(words, _WIDTH, initial_indent=start, subsequent_indent=rest))
    lines.append("\nThe settings used most, with their defaults (--cfg job prints all settings):")
    for key in _MOST_USED:
        field = find_field(RunConfig, key) or find_field(LaunchOptions, key)
        # the optimizer's arguments are no fields
        meaning = field[0].metadata["description"] if field else "the learning rate"
        lines.append(f"  {f'{key}={as_typed(default_settings()[key])}':26}{meaning}")
    lines.append(_EXAMPLES)
    parser.epilog = "\n".join(lines)
    return parser.format_help().rstrip()
