"""From a command line to a Request. Only this module and `overrides` import Hydra.

Hydra composes the options; the values are set on plain containers, and what Hydra lets pass (added
keys, deleted groups, lists of options) is refused in one line, before anything slow is imported, or
anything is downloaded or written.
"""

import contextlib
import copy
import functools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from cifar_lab.config.command_line import (
    CommandLine,
    check_words,
    config_folder,
    find_options,
    is_file,
    is_run_folder,
    parse_command_line,
)
from cifar_lab.config.data_config import keep_place
from cifar_lab.config.launch import (
    Dimension,
    LaunchOptions,
    Request,
    planned_run,
    take_launch_options,
)
from cifar_lab.config.overrides import (
    check_choice,
    expand_grid,
    expand_points,
    lines_of,
    parse_overrides,
    search_dimension,
    set_value,
)
from cifar_lab.config.run_config import flatten, load, to_plain
from cifar_lab.errors import UsageError, first_line, shorten, shorten_path

_NO_CHOICES = ("hydra", "search", "tracker")  # groups that are no part of a run


def compose(argv: Sequence[str]) -> Request:
    """Turn a command line of overrides and flags into a Request, whose configs are complete.

    UsageError for what is not a run. Whether a run can start here, and whether its targets take
    their arguments, is for `cifar_lab.training.preflight` to say: that needs torch.
    """
    line = parse_command_line(argv)
    words = list(line.overrides)
    folder, file = None, None
    if words and is_run_folder(words[0]):
        folder = Path(words.pop(0))
        file = folder / "config.yaml"
    elif words and words[0].endswith((".yaml", ".yml")) and is_file(words[0]):
        file = Path(words.pop(0))
    check_words(words)
    parsed = parse_overrides(words)
    values = {o.key_or_group: o.value() for o in parsed}
    start = values.get("continue_from")
    # An experiment says all; else the run that is continued has the other settings.
    if (
        file is None
        and "experiment" not in values
        and isinstance(start, str)
        and is_run_folder(start)
    ):
        file = Path(start) / "config.yaml"
    past = None if file is None else _past_run(file, parsed)
    with _hydra(line.config_dir):
        request = _request(_Composer(line, past), parsed, line)
    if past is None:
        return request
    first = line.overrides[: len(line.overrides) - len(words)]  # of each trial of a search, too
    return replace(
        request,
        folder=folder,
        is_sweep=len(request.runs) > 1 or bool(request.space),
        fixed=(*first, *request.fixed),
    )


def complete_shell(argv: Sequence[str]) -> None:
    """Let Hydra answer `-sc install=SHELL`, `-sc uninstall=SHELL` or a query of the shell."""
    words = [word for word in argv if word not in ("-sc", "--shell-completion")]
    query = "|query" if "COMP_LINE" in os.environ else ""
    if not re.fullmatch(rf"(install|uninstall{query})=(bash|zsh|fish)", " ".join(words)):
        raise UsageError("-sc is wrong: write -sc install=bash, or uninstall= or zsh or fish")
    sys.argv[1:] = ["--shell-completion", *words]
    main = hydra.main(config_path=str(config_folder()), config_name="config", version_base="1.3")
    main(lambda _: None)()


def _request(composer: "_Composer", parsed: list[Override], line: CommandLine) -> Request:
    """Return every run of a command line."""
    options = composer.options
    for override in parsed:
        check_choice(override, options)
    fixed = [o for o in parsed if not o.is_sweep_override()]
    base = composer.with_overrides(fixed)
    multirun = line.multirun or base.multirun
    asked = {override.key_or_group for override in parsed}
    if multirun:
        listed = [f"{key}={values}" for key, values in base.grid.items() if key not in asked]
        parsed = parse_overrides(listed) + parsed
        fixed = [o for o in parsed if not o.is_sweep_override()]
    plain = composer.with_overrides(fixed).plain
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
        lines = [[f"{d.key}={d.samples[i]}" for d in space] for i in range(3 if space else 1)]
        lists = [[*fixed, *parse_overrides(some)] for some in lines]  # examples, to check it with
    else:
        lists = expand_grid(parsed, options, multirun=multirun, points=points)
    runs, launch_options = [], LaunchOptions()
    for overrides in lists:
        plain = _resolve(composer.with_overrides(overrides).plain)
        asked_path = any(o.key_or_group == "dataset.source.path" for o in overrides)
        if composer.past is None or asked_path:  # a run keeps its own path
            keep_place(plain["dataset"])
        launch_options = take_launch_options(plain)
        runs.append(planned_run(plain, lines_of(overrides)))
    last = composer.with_overrides(lists[-1])
    shown = None if line.cfg is None else OmegaConf.to_yaml(OmegaConf.create(last.plain)).rstrip()
    flags = () if line.config_dir is None else ("--config-dir", line.config_dir)
    shared = lines_of([o for o in fixed if o.key_or_group.split(".")[0] != "search"])
    return Request(
        runs, launch_options, multirun, last.launcher, shown, tuple(space), (*flags, *shared)
    )


def _past_run(file: Path, parsed: list[Override]) -> dict[str, Any]:
    """Return the config of a run, from which another starts: that of a folder, or a file."""
    plain = to_plain(load(file))
    dataset, protocol = plain["dataset"], plain["protocol"]
    if any(o.key_or_group == "protocol" and o.value() != protocol for o in parsed):
        raise UsageError(
            f"protocol={protocol} cannot be changed: {shorten_path(file)} has what it set, and not "
            "what another one would; start from the experiment of the run"
        )
    if any(override.key_or_group.startswith("split") for override in parsed):
        dataset |= dict.fromkeys(dataset["computed"], "auto")  # on the images that train now
    if dataset["source"].get("path") and dataset["relative_to"] is None:  # of somebody else
        dataset["relative_to"] = str(Path.cwd())
    return {**to_plain(LaunchOptions()), **plain}


@dataclass(frozen=True)
class _Composed:
    """A config before it is resolved."""

    plain: dict[str, Any]  # a run and how it is launched, with interpolations
    grid: dict[str, Any] = field(default_factory=dict)  # what an experiment lists
    multirun: bool = False
    launcher: dict[str, Any] = field(default_factory=dict)


class _Composer:
    """Makes configs from what Hydra composes of the options, or from that of a `past` run."""

    def __init__(self, line: CommandLine, past: dict[str, Any] | None) -> None:
        self.past = past
        self.options = find_options(line.config_dir)
        if past is not None:  # an experiment says all
            self.options = {k: v for k, v in self.options.items() if k != "experiment"}
        self._compose = functools.cache(_compose)  # each combination takes a tenth of a second

    def with_overrides(self, overrides: Sequence[Override]) -> _Composed:
        """Return the config that some overrides make: options that are chosen, then values."""
        choices = [o for o in overrides if self._is_choice(o)]
        base = self._base(choices)
        plain = copy.deepcopy(base.plain)
        for override in overrides:
            if not self._is_choice(override):
                set_value(plain, override)
        return replace(base, plain=plain)

    def _is_choice(self, override: Override) -> bool:
        return override.key_or_group in self.options or override.key_or_group.startswith("hydra")

    def _base(self, choices: Sequence[Override]) -> _Composed:
        if self.past is None:
            composed = self._compose(lines_of(choices))
            return replace(composed, plain=composed.plain | self._exchanged(choices))
        if not choices:
            return _Composed(self.past)
        groups = [override.key_or_group for override in choices]
        if "dataset" in groups:  # whose file chooses the augmentation
            groups.append("augmentation")
        composed = self._compose(lines_of(choices))
        parts = {group: composed.plain[group] for group in groups if group in composed.plain}
        chosen = {k: v for k, v in composed.plain["choices"].items() if k in groups}
        plain = {**self.past, **parts, "choices": self.past["choices"] | chosen}
        return _Composed(plain, launcher=composed.launcher)

    def _exchanged(self, choices: Sequence[Override]) -> dict[str, Any]:
        """Return the groups whose option is another than the experiment's, as they are without it.

        Else dropout=none would keep the rates that the experiment sets. A group that the experiment
        lists options of keeps its values: they are meant for all of them.
        """
        experiment = lines_of([o for o in choices if o.key_or_group == "experiment"])
        parts: dict[str, Any] = {}
        for override in choices if experiment else ():
            group, option, own = override.key_or_group, override.value(), self._compose(experiment)
            is_listed = group in own.grid or group in str(own.plain["points"])
            if own.plain["choices"].get(group, option) != option and not is_listed:
                parts[group] = self._compose(lines_of([override])).plain[group]
        return parts


def _compose(lines: tuple[str, ...]) -> _Composed:
    """Return what Hydra composes of some options."""
    try:
        node = hydra.compose("config", list(lines), return_hydra_config=True)
        with open_dict(node):
            own = node.pop("hydra")
        plain = cast("dict[str, Any]", OmegaConf.to_container(node))
        chosen = own.runtime.choices.items()
        kept = {k: v for k, v in chosen if "/" not in k and k not in _NO_CHOICES}
        return _Composed(
            {**plain, "choices": {**(plain.get("choices") or {}), **kept}},
            dict(own.sweeper.params or {}),
            str(own.mode) == "RunMode.MULTIRUN",
            cast("dict[str, Any]", OmegaConf.to_container(own.launcher, resolve=True)),
        )
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(shorten(" ".join(str(error).splitlines()[:2]), 200)) from None


def _resolve(plain: dict[str, Any]) -> dict[str, Any]:
    """Return a config with its interpolations resolved."""
    if not any("${" in str(value) or "???" in str(value) for value in flatten(plain).values()):
        return plain
    try:
        node = OmegaConf.create(plain)
        resolved = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        return cast("dict[str, Any]", resolved)
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        key = getattr(error, "full_key", None) or "the config"
        raise UsageError(f"{key} cannot be resolved: {first_line(error)}") from None


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
