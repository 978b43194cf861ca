"""From a command line to a Request. Only this module and `overrides` import Hydra.

Hydra composes the options; the values are set on plain containers, and what Hydra lets pass (added
keys, deleted groups, lists of options) is refused in one line, before anything slow is imported, or
anything is downloaded or written.
"""

import contextlib
import copy
import dataclasses
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from cifar_lab.config import command_line
from cifar_lab.config.data_config import keep_place
from cifar_lab.config.groups import config_folder, find_options, read_option, setting_keys
from cifar_lab.config.launch import Dimension, LaunchOptions
from cifar_lab.config.overrides import (
    Options,
    check_choice,
    expand_grid,
    expand_points,
    lines_of,
    parse_overrides,
    search_dimension,
    search_examples,
    set_value,
)
from cifar_lab.config.request import Request, planned_run, take_launch_options
from cifar_lab.config.run_config import flatten, load, to_plain
from cifar_lab.errors import UsageError, first_line, shorten

_NO_CHOICES = ("hydra", "search", "tracker")  # groups that are no part of a run

_STAND_ALONE = ("model", "optimizer", "activation", "dropout", "scheduler")
"""Groups of conf/ whose options set their own part and nothing else, and whose part only an
experiment changes. Hydra takes a tenth of a second for each combination of options."""


def compose(argv: Sequence[str]) -> Request:
    """Turn a command line of overrides and flags into a Request, whose configs are complete.

    UsageError for what is not a run. Whether a run can start here, and whether its targets take
    their arguments, is for `cifar_lab.training.preflight` to say: that needs torch.
    """
    line = command_line.parse_command_line(argv)
    words = list(line.overrides)
    folder = Path(words.pop(0)) if words and command_line.is_run_folder(words[0]) else None
    file = None if folder is None else folder / "config.yaml"
    if file is None and words and command_line.is_config_file(words[0]):
        file = Path(words.pop(0))
    command_line.check_words(words, setting_keys())
    parsed = parse_overrides(words)
    with _hydra(line.config_dir):
        bases = _Compositions(line)
        file = file or _start_of(parsed)
        if file is None:
            return _request(bases, parsed, line)
        request = _request(_PastRun(file, parsed, bases), parsed, line)
        start = line.overrides[: len(line.overrides) - len(words)]  # of each trial of a search, too
        return dataclasses.replace(
            request,
            folder=folder,
            is_sweep=len(request.runs) > 1 or bool(request.space),
            fixed=(*start, *request.fixed),
        )


def _start_of(parsed: list[Override]) -> Path | None:
    """Return the config of the run that `continue_from` names, unless an experiment says all."""
    values = {o.key_or_group: o.value() for o in parsed}
    start = values.get("continue_from")
    if isinstance(start, str) and "experiment" not in values and command_line.is_run_folder(start):
        return Path(start) / "config.yaml"
    return None


def complete_shell(argv: Sequence[str]) -> None:
    """Let Hydra answer `-sc install=SHELL`, `-sc uninstall=SHELL` or a query of the shell."""
    words = [word for word in argv if word not in ("-sc", "--shell-completion")]
    query = "|query" if "COMP_LINE" in os.environ else ""
    if not re.fullmatch(rf"(install|uninstall{query})=(bash|zsh|fish)", " ".join(words)):
        raise UsageError(
            "shell completion is wrong: write -sc install=bash, or uninstall= or zsh or fish"
        )
    sys.argv[1:] = ["--shell-completion", *words]
    hydra.main(config_path=str(config_folder()), config_name="config", version_base="1.3")(
        lambda _: None
    )()


@dataclass(frozen=True)
class _Base:
    """What the values of a command line are set on; not to be changed."""

    plain: dict[str, Any]  # a run and how it is launched, with interpolations
    grid: dict[str, Any] = dataclasses.field(default_factory=dict)  # what an experiment lists
    multirun: bool = False
    launcher: dict[str, Any] = dataclasses.field(default_factory=dict)


def _request(
    bases: "_PastRun | _Compositions", parsed: list[Override], line: command_line.CommandLine
) -> Request:
    """Return every run of a command line."""
    options = bases.options
    for override in parsed:
        check_choice(override, options)
    fixed = [o for o in parsed if not o.is_sweep_override()]
    base = bases.base(fixed)
    multirun = line.multirun or base.multirun
    asked = {override.key_or_group for override in parsed}
    if multirun:
        listed = [f"{key}={values}" for key, values in base.grid.items() if key not in asked]
        parsed = parse_overrides(listed) + parsed
        fixed = [o for o in parsed if not o.is_sweep_override()]
    plain = _with_values(base, fixed, options)
    points = expand_points(plain["points"], asked, options)
    if points and not multirun:
        raise UsageError("points name several runs; add -m to run all of them")
    for override in [override for point in points for override in point]:
        check_choice(override, options)
    space: list[Dimension] = []
    if multirun and plain["search"]["method"] != "none":
        if points:
            raise UsageError("points are for a grid; search=optuna chooses each value by itself")
        space = [search_dimension(o, options) for o in parsed if o.is_sweep_override()]
        lists = search_examples(space, fixed)
    else:
        lists = expand_grid(parsed, options, multirun=multirun, points=points)
    runs, launch_options = [], LaunchOptions()
    for overrides in lists:
        plain = _resolve(_with_values(bases.base(overrides), overrides, options))
        asked_path = any(o.key_or_group == "dataset.source.path" for o in overrides)
        if isinstance(bases, _Compositions) or asked_path:  # a run keeps its own path
            keep_place(plain["dataset"])
        launch_options = take_launch_options(plain)
        runs.append(planned_run(plain, lines_of(overrides)))
    last = bases.base(lists[-1])
    shown = None
    if line.cfg is not None:
        node = OmegaConf.create(_with_values(last, lists[-1], options))
        shown = OmegaConf.to_yaml(node).rstrip()
    return Request(
        runs,
        launch_options,
        multirun,
        last.launcher,
        shown,
        tuple(space),
        lines_of([o for o in fixed if o.key_or_group.split(".")[0] != "search"]),
    )


class _Compositions:
    """What Hydra composes, each combination of options once."""

    def __init__(self, line: command_line.CommandLine) -> None:
        self._files = find_options(line.config_dir)
        self.options: Options = self._files
        self._is_ours = line.config_dir is None
        self._kept: dict[tuple[str, ...], _Base] = {}

    def base(self, overrides: Sequence[Override]) -> _Base:
        """Return the composition of the options that are chosen."""
        choices = [override for override in overrides if _is_choice(override, self.options)]
        alone: dict[str, Any] = {}
        if self._is_ours and not any(o.key_or_group == "experiment" for o in choices):
            alone = {o.key_or_group: o.value() for o in choices if o.key_or_group in _STAND_ALONE}
        lines = lines_of([o for o in choices if o.key_or_group not in alone])
        if lines not in self._kept:
            self._kept[lines] = self._compose(lines)
        base = self._kept[lines]
        parts = {group: read_option(self._files[group][option]) for group, option in alone.items()}
        chosen = {"choices": base.plain["choices"] | alone}
        return dataclasses.replace(base, plain=base.plain | parts | chosen)

    def _compose(self, lines: tuple[str, ...]) -> _Base:
        try:
            node = _composed(list(lines))
            with open_dict(node):
                own = node.pop("hydra")
            plain = cast("dict[str, Any]", OmegaConf.to_container(node))
            chosen = own.runtime.choices.items()
            kept = {k: v for k, v in chosen if "/" not in k and k not in _NO_CHOICES}
            return _Base(
                {**plain, "choices": {**(plain.get("choices") or {}), **kept}},
                dict(own.sweeper.params or {}),
                str(own.mode) == "RunMode.MULTIRUN",
                cast("dict[str, Any]", OmegaConf.to_container(own.launcher, resolve=True)),
            )
        except (HydraException, OmegaConfBaseException) as error:
            raise UsageError(shorten(" ".join(str(error).splitlines()[:2]), 200)) from None


class _PastRun:
    """The config of a run, from which another starts: that of a folder, or a file."""

    def __init__(self, file: Path, parsed: list[Override], composed: "_Compositions") -> None:
        plain = to_plain(load(file))
        if any(override.key_or_group.startswith("split") for override in parsed):
            for name in plain["dataset"]["computed"]:  # on the images that train now
                plain["dataset"][name] = "auto"
        dataset = plain["dataset"]
        if dataset["source"].get("path") and dataset["relative_to"] is None:  # of somebody else
            dataset["relative_to"] = str(Path.cwd())
        self._plain = {**to_plain(LaunchOptions()), **plain}
        self._composed = composed
        self.options: Options = {k: v for k, v in composed.options.items() if k != "experiment"}

    def base(self, overrides: Sequence[Override]) -> _Base:
        """Return the config of the run, with the options that are chosen in place of its parts."""
        groups = [o.key_or_group for o in overrides if _is_choice(o, self.options)]
        if not groups:
            return _Base(self._plain)
        if "dataset" in groups:  # whose file chooses the augmentation
            groups.append("augmentation")
        composed = self._composed.base(overrides)
        parts = {group: composed.plain[group] for group in groups if group in composed.plain}
        chosen = {group: composed.plain["choices"].get(group) for group in groups}
        choices = self._plain["choices"] | {k: v for k, v in chosen.items() if v is not None}
        return _Base({**self._plain, **parts, "choices": choices}, launcher=composed.launcher)


def _is_choice(override: Override, options: Options) -> bool:
    """Whether an override chooses an option or is Hydra's own, and does not set a value."""
    return override.key_or_group in options or override.key_or_group.startswith("hydra")


def _with_values(base: _Base, overrides: Sequence[Override], options: Options) -> dict[str, Any]:
    """Return a config with the values of a command line, before it is resolved."""
    plain = copy.deepcopy(base.plain)
    for override in overrides:
        if not _is_choice(override, options):
            set_value(plain, override)
    return plain


def _resolve(plain: dict[str, Any]) -> dict[str, Any]:
    """Return a config with its interpolations resolved."""
    if not any("${" in str(value) or "???" in str(value) for value in flatten(plain).values()):
        return plain
    try:
        node = OmegaConf.create(plain)
        resolved = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        return cast("dict[str, Any]", resolved)
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        raise UsageError(f"the config cannot be resolved: {first_line(error)}") from None


def _composed(overrides: list[str]) -> Any:
    """Return what Hydra composes; it asks for the working directory, which may be deleted."""
    try:
        return hydra.compose("config", overrides, return_hydra_config=True)
    except FileNotFoundError:
        here = os.open(".", os.O_RDONLY)
        os.chdir(config_folder())
        try:
            return hydra.compose("config", overrides, return_hydra_config=True)
        finally:
            os.fchdir(here)
            os.close(here)


@contextlib.contextmanager
def _hydra(config_dir: str | None) -> Iterator[None]:
    """Let Hydra compose from conf/, and before it from a folder of the user's own."""
    before = GlobalHydra.instance().hydra  # of a program that uses Hydra itself
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
            if config_dir is not None:
                # what --config-dir does in Hydra's own main
                loader: Any = GlobalHydra.instance().config_loader()
                path = f"file://{Path(config_dir).resolve()}"
                schema = SearchPathQuery(provider="schema")  # Hydra wants it to stay the last
                search_path = loader.get_search_path()
                search_path.prepend(provider="command-line", path=path, anchor=schema)
                loader.repository.initialize_sources(search_path)
            yield
    finally:
        GlobalHydra.instance().hydra = before
