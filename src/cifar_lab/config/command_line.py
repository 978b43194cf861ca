"""The flags of a command line that composes a config; what remains are its overrides."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from cifar_lab.config.groups import setting_keys
from cifar_lab.config.suggestions import probable_keys
from cifar_lab.errors import UsageError, did_you_mean, shorten

FLAGS = (
    (("-m", "--multirun"), {"action": "store_true"}, "run every combination of listed values"),
    (("--detach",), {"action": "store_true"}, "on SLURM: send the jobs, do not wait for them"),
    (("-c", "--cfg"), {"choices": ("job",)}, "--cfg job: print the whole config, run nothing"),
    (("-p", "--package"), {"metavar": "KEY"}, "with --cfg job: print only this part of it"),
    (("--resolve",), {"action": "store_true"}, "with --cfg job: resolve interpolations"),
    (("-cd", "--config-dir"), {"metavar": "FOLDER"}, "a folder with config groups of your own"),
    (("-cn", "--config-name"), {"metavar": "NAME"}, "another file than config.yaml to start from"),
)
"""The flags, with the arguments that argparse needs and what they are for."""

_FLAGS_OF_HYDRA = {
    "--config-path": "use --config-dir FOLDER to add config groups of your own",
    "-cp": "use --config-dir FOLDER to add config groups of your own",
    "--experimental-rerun": "train RUN_DIR runs the config of a past run",
    "--hydra-help": "see --help",
    "--info": "--cfg job prints the config, plan=true shows what would run",
    "-i": "--cfg job prints the config, plan=true shows what would run",
    "--run": "leave it out: it is the default",
    "-r": "leave it out: it is the default",
}


@dataclass(frozen=True)
class CommandLine:
    """A command line, divided: flags, and the overrides in their order."""

    overrides: tuple[str, ...]
    multirun: bool = False
    cfg: Literal["job"] | None = None
    package: str | None = None
    resolve: bool = False
    config_dir: str | None = None
    config_name: str | None = None

    @property
    def config_flags(self) -> list[str]:
        """The flags that say where the config comes from, as one types them."""
        flags = []
        for name, value in (("--config-dir", self.config_dir), ("--config-name", self.config_name)):
            flags += [name, value] if value is not None else []
        return flags


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Divide a command line into flags and overrides; UsageError for a flag that is not known."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    for names, arguments, _ in FLAGS:
        parser.add_argument(*names, **arguments)
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    found, rest = parser.parse_known_args(words[:end])  # overrides may stand around flags
    for word in rest:
        if word.startswith("-"):
            raise _unknown_flag(word, rest)
    detached = ("detach=true",) if vars(found).pop("detach") else ()
    line = CommandLine((*rest, *words[end + 1 :], *detached), **vars(found))
    for name in ("package", "resolve"):
        if getattr(line, name) and line.cfg is None:
            raise UsageError(f"--{name} goes with --cfg job only")
    return line


def _unknown_flag(word: str, rest: Sequence[str]) -> UsageError:
    flag, _, value = word.partition("=")
    if flag in _FLAGS_OF_HYDRA:
        return UsageError(f"{flag} is not supported: {_FLAGS_OF_HYDRA[flag]}")
    problem = f"there is no flag {shorten(flag)}"
    if keys := probable_keys(flag.lstrip("-"), setting_keys()):
        following = rest[rest.index(word) + 1 :]
        value = value or (following[0] if following and "=" not in following[0] else "VALUE")
        return UsageError(f"{problem}; write {keys[0]}={shorten(value, 40)}")
    known = [name for names, _, _ in FLAGS for name in names if name.startswith("--")]
    guess = did_you_mean(flag, known) or "; settings are written KEY=VALUE, see --help"
    return UsageError(problem + guess)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def flag_lines() -> list[tuple[str, str]]:
    """Return the flags as help pages show them, each with what it is for."""
    lines: list[tuple[str, str]] = []
    arguments: dict[str, Any]
    for names, arguments, purpose in FLAGS:
        value = arguments.get("metavar") or "".join(arguments.get("choices", ()))
        lines.append((f"{', '.join(names)} {value}".rstrip(), purpose))
    return lines
