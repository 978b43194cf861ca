"""The words of a command line: its flags, what may be chosen and set, and what was meant otherwise.

The groups and their options are read from the folders that hold them, without Hydra.
"""

import argparse
import functools
import itertools
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from cifar_lab.config.launch import SearchOptions
from cifar_lab.config.run_config import flatten, merge
from cifar_lab.errors import UsageError, closest, did_you_mean, listing, shorten


@dataclass(frozen=True)
class CommandLine:
    """A command line, divided: flags, and the overrides in their order."""

    overrides: tuple[str, ...]
    multirun: bool = False
    cfg: Literal["job"] | None = None
    config_dir: str | None = None


class StrictParser(argparse.ArgumentParser):
    """An argument parser that raises UsageError instead of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong."""
        raise UsageError(f"{message}; see --help")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags; what it leaves are overrides."""
    parser = StrictParser(prog="", add_help=False, allow_abbrev=False)  # sys.argv may be missing
    add = parser.add_argument
    add("--trust", metavar="MODULE", action="append", help="code of your own; or trust=MODULE")
    add("-m", "--multirun", action="store_true", help="run every combination of listed values")
    add("--detach", action="store_true", help="on SLURM: send the jobs, do not wait for them")
    add("-c", "--cfg", choices=("job",), metavar="job", help="print the whole config, run nothing")
    add("-cd", "--config-dir", metavar="FOLDER", help="a folder with config groups of your own")
    return parser


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Divide a command line into flags and overrides; UsageError for a flag that is not known."""
    flags, rest = make_parser().parse_known_args(argv)  # overrides may stand around flags
    for word in rest:
        if word.startswith("-"):
            raise _unknown_flag(word, rest)
    settings = ["detach=true"] if flags.detach else []
    settings += [f"trust=[{','.join(flags.trust)}]"] if flags.trust else []
    return CommandLine((*rest, *settings), flags.multirun, flags.cfg, flags.config_dir)


def _unknown_flag(word: str, rest: Sequence[str]) -> UsageError:
    flag, _, value = word.partition("=")
    name, value = flag.lstrip("-"), value or _value_of(rest[rest.index(word) + 1 :])
    flags = ("trust", "multirun", "detach", "cfg", "config-dir", "help", "version")
    hint = "; settings are written KEY=VALUE, see --help"
    if keys := probable_keys(name, setting_keys()):
        is_switch = value == "VALUE" and default_settings().get(keys[0]) is False
        hint = f"; write {keys[0]}={'true' if is_switch else shorten(value, 40)}"
    elif value.endswith((".yaml", ".yml")):
        hint = f"; the config of a run is the first word: {shorten(value, 40)}"
    elif guess := closest(name, flags):
        hint = f" (did you mean --{guess}?)"
    return UsageError(f"there is no flag {shorten(flag)}{hint}")


def _value_of(words: Sequence[str]) -> str:
    """Return what the words after a key mean as its value, as in `key value` or `key = value`."""
    value = next(filter(None, (word.lstrip("=") for word in words)), "=")
    return "VALUE" if "=" in value or value.startswith("-") else value


OTHER_NAMES = {
    **dict.fromkeys(("epoch", "num_epochs", "max_epochs"), "epochs"),
    **dict.fromkeys(("batch", "bs"), "batch_size"),
    **dict.fromkeys(("gpu", "gpus"), "device"),
    "learning_rate": "lr",
    "wd": "weight_decay",
    "dry_run": "plan",
}
"""Names that other programs use, and ours."""


def probable_keys(typed: str, keys: Iterable[str]) -> list[str]:
    """Return the keys, three at most, whose last part is that of a typed key, or close to it."""
    leaf = typed.rpartition(".")[2].replace("-", "_").lower()
    leaf = OTHER_NAMES.get(leaf, leaf)
    leaves = {key: key.rpartition(".")[2].lower() for key in keys}
    if leaf not in leaves.values():
        leaf = closest(leaf, leaves.values(), 0.75)
    return [key for key in leaves if leaves[key] == leaf][:3]


def unknown_key(key: str, siblings: Collection[str], keys: Iterable[str]) -> UsageError:
    """Return the error for a key that does not exist.

    `siblings` are the names beside it, `keys` all dotted keys of the config.
    """
    parent, _, name = key.rpartition(".")
    problem = f"there is no setting {shorten(key)}"
    if parent == "search" and name in {spec.name for spec in fields(SearchOptions)}:
        listed = "; a grid lists its seeds: seed=0,1,2 -m" if name == "seeds" else ""
        return UsageError(f"{key} is for search=optuna{listed}")
    beside, probable = did_you_mean(name, siblings), probable_keys(key, keys)
    if beside and (parent or not probable):
        return UsageError(problem + beside)
    if probable:
        return UsageError(f"{problem} (did you mean {' or '.join(probable)}?)")
    return UsageError(f"{problem}; {shorten(parent) or 'a run'} has {listing(siblings)}")


def check_words(words: Sequence[str]) -> None:
    """Refuse words that are not KEY=VALUE: mostly values with spaces between them."""
    for index, word in enumerate(words):
        shown, key = shorten(word) or "''", word.partition(":")[0]
        value = _value_of([word[len(key) + 1 :], *words[index + 1 :]])
        if "=" in word[1:] or word.startswith(("~", "+")):
            if word.endswith("=") and value != "VALUE":
                raise UsageError(f"a space beside = is wrong: write {shorten(word + value)}")
            continue
        if key in setting_keys():
            raise UsageError(f"{shown} has no value: write {key}={shorten(value, 40)}")
        before = words[index - 1] if index else ""
        groups = [name for name, options in find_options().items() if word in options]
        if groups and not before.startswith(f"{groups[0]}="):  # optimizer=sgd, adam
            raise UsageError(f"{shown} is not a key=value: write {groups[0]}={word}")
        if index == 0:
            raise UsageError(f"{shown} is neither a key=value nor a run folder with a config.yaml")
        if is_run_folder(word):
            raise UsageError(f"{shown} is a folder: the folder of a run comes first")
        if any(before.count(left) > before.count(right) for left, right in ("[]", "{}", "()")):
            raise UsageError(f"{shorten(before, 40)}... is cut at a space: put quotes around it")
        values = list(itertools.takewhile(lambda word: "=" not in word, words[index:]))
        together = ",".join(filter(None, (word.strip(",") for word in (before, *values))))
        raise UsageError(
            f"{shorten(word, 40)} is not a key=value; several values are written without "
            f"spaces: {shorten(together)} -m"
        )


def is_run_folder(word: str) -> bool:
    """Return whether a word of a command line is the folder of a run."""
    return is_file(f"{word}/config.yaml")


is_file = os.path.isfile  # unlike Path.is_file it takes what is too long for a name


# --- the groups of conf/ --------------------------------------------------------------------------

_PACKAGE = Path(__file__).resolve().parents[1]


def config_folder() -> Path:
    """Return where conf/ is: in the checkout, or inside the installed package."""
    checkout = _PACKAGE.parents[1] / "conf"
    return checkout if checkout.is_dir() else _PACKAGE / "conf"


def find_options(config_dir: str | Path | None = None) -> dict[str, dict[str, Path]]:
    """Return the file of each option of each group, without the reports: `find_files`."""
    files = find_files(config_dir)
    return {group: files[group] for group in files if group != "report"}


def find_files(config_dir: str | Path | None = None) -> dict[str, dict[str, Path]]:
    """Return the files of each folder of conf/; those in `config_dir` win over the shipped."""
    if config_dir is not None and not Path(config_dir).is_dir():
        raise UsageError(f"--config-dir {shorten(str(config_dir))} is not a folder")
    files: dict[str, dict[str, Path]] = {}
    for folder in (config_folder(), *([Path(config_dir)] if config_dir is not None else [])):
        for path in sorted(folder.rglob("*/*.yaml")):
            group = path.parent.relative_to(folder).as_posix()
            files.setdefault(group, {})[path.stem] = path
    return files


def experiments(config_dir: str | Path | None = None) -> dict[str, str | None]:
    """Return each experiment and the tag of the report that it reproduces, if any."""
    return {
        name: (read_experiment(name, config_dir).get("study") or {}).get("report")
        for name in find_options(config_dir)["experiment"]
    }


def read_experiment(name: str, config_dir: str | Path | None = None) -> dict[str, Any]:
    """Return what an experiment and those that it starts from set, as in conf/."""
    files = find_options(config_dir)["experiment"]
    content: dict[str, Any] = read_option(files[name]) or {}
    for start in content.get("defaults", []):
        if isinstance(start, str) and start in files:
            content = merge(read_experiment(start, config_dir), content)
    return content


@functools.cache
def default_options() -> dict[str, str]:
    """Return the default option of each group, in the order of conf/config.yaml."""
    lines = read_option(config_folder() / "config.yaml")["defaults"]
    return {group: line[group] for line in lines if isinstance(line, dict) for group in line}


@functools.cache
def default_settings() -> dict[str, Any]:
    """Return every dotted key of a run with the default options, and its value."""
    hidden = ("defaults", "hydra", "protocols", "study", "choices")
    main = read_option(config_folder() / "config.yaml")
    config = {key: value for key, value in main.items() if key not in hidden}
    files, chosen = find_options(), default_options().items()
    config |= {name: read_option(files[name][o]) for name, o in chosen if name != "experiment"}
    return dict.fromkeys(config) | flatten(config)


@functools.cache
def setting_keys() -> tuple[str, ...]:
    """Return every dotted key of a run with the default options, and the names of the groups."""
    return tuple(dict.fromkeys([*default_settings(), *find_options()]))


@functools.cache
def read_option(path: Path) -> Any:
    """Return the content of a file of conf/, not to be changed."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
