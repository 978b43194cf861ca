"""The flags of a command line; what remains are overrides, and words that were meant otherwise."""

import argparse
import difflib
import itertools
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, NoReturn

from cifar_lab.config.groups import setting_keys
from cifar_lab.config.launch import SearchOptions
from cifar_lab.errors import UsageError, did_you_mean, listing, shorten


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
    problem = f"there is no flag {shorten(flag)}"
    if keys := probable_keys(flag.lstrip("-"), setting_keys()):
        following = rest[rest.index(word) + 1 :]
        value = value or (following[0] if following and "=" not in following[0] else "VALUE")
        return UsageError(f"{problem}; write {keys[0]}={shorten(value, 40)}")
    known = ("--trust", "--multirun", "--detach", "--cfg", "--config-dir", "--help", "--version")
    guess = did_you_mean(flag, known) or "; settings are written KEY=VALUE, see --help"
    return UsageError(problem + guess)


OTHER_NAMES = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "epoch": "epochs",
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "gpu": "device",
}
"""Names that other programs use, and ours."""


def probable_keys(typed: str, keys: Iterable[str]) -> list[str]:
    """Return the keys, three at most, whose last part is that of a typed key, or close to it."""
    leaf = typed.rpartition(".")[2].replace("-", "_").lower()
    leaf = OTHER_NAMES.get(leaf, leaf)
    by_leaf: dict[str, list[str]] = {}
    for key in keys:
        by_leaf.setdefault(key.rpartition(".")[2].lower(), []).append(key)
    if leaf not in by_leaf:
        close = difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.75)
        leaf = close[0] if close else ""
    return by_leaf.get(leaf, [])[:3]


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
        following = words[index + 1] if index + 1 < len(words) else ""
        shown = shorten(word)
        if "=" in word or word.startswith(("~", "+")):
            if word.endswith("=") and following and "=" not in following:
                raise UsageError(f"a space beside = is wrong: write {shorten(word + following)}")
        elif word in setting_keys():
            raise UsageError(f"{word} has no value: write {word}=VALUE")
        elif index and is_run_folder(word):
            raise UsageError(f"{shown} is a folder: the folder of a run comes first")
        elif index == 0:
            raise UsageError(f"{shown} is neither a key=value nor a run folder with a config.yaml")
        else:
            raise _stray(words, index)


def _stray(words: Sequence[str], index: int) -> UsageError:
    """Return the error for a word without `=` that follows a KEY=VALUE."""
    before = words[index - 1]
    if any(before.count(left) > before.count(right) for left, right in ("[]", "{}", "()")):
        return UsageError(f"{shorten(before, 40)}... is cut at a space: put quotes around it")
    values = list(itertools.takewhile(lambda word: "=" not in word, words[index:]))
    together = ",".join(filter(None, (word.strip(",") for word in (before, *values))))
    return UsageError(
        f"{shorten(words[index], 40)} is not a key=value; several values are written without "
        f"spaces: {shorten(together)} -m"
    )


def is_run_folder(word: str) -> bool:
    """Return whether a word of a command line is the folder of a run."""
    return is_file(f"{word}/config.yaml")


is_file = os.path.isfile
"""Unlike Path.is_file it takes any text: too long for a file name, or with a null character."""
