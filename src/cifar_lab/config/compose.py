"""From a command line to a Request. Only this module, `composition` and `overrides` import Hydra.

Hydra composes; what it lets pass (added keys, deleted groups, lists of options, values of the
wrong type) is refused here, in one line, before anything slow is imported, or anything is
downloaded or written.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra import main as hydra_main
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from cifar_lab.config.command_line import (
    CommandLine,
    check_words,
    is_run_folder,
    parse_command_line,
)
from cifar_lab.config.composition import Compositions, apply_value, lines_of, resolve
from cifar_lab.config.groups import config_folder, find_options, find_root, setting_keys
from cifar_lab.config.launch import Dimension, LaunchOptions
from cifar_lab.config.overrides import (
    INSTEAD_OF_PLUGINS,
    check_overrides,
    expand_grid,
    expand_points,
    listed_values,
    parse_overrides,
    search_dimension,
    search_examples,
    value_text,
)
from cifar_lab.config.request import PlannedRun, Request, planned_run, take_launch_options
from cifar_lab.config.run_config import load, to_plain
from cifar_lab.errors import UsageError, did_you_mean, listing, shorten

_MISSING = object()


def compose(argv: Sequence[str]) -> Request:
    """Turn a command line of overrides and flags into a Request, whose configs are complete.

    UsageError for what is not a run. Whether a run can start here, and whether its targets take
    their arguments, is for `cifar_lab.training.preflight` to say: that needs torch.
    """
    line = parse_command_line(argv)
    words = list(line.overrides)
    folder = Path(words.pop(0)) if words and is_run_folder(words[0]) else None
    check_words(words, setting_keys(), after_folder=folder is not None)
    parsed = parse_overrides(words)
    check_overrides(parsed)
    if folder is not None:
        return _compose_folder(folder, parsed, line)
    composer = _Composer(line)
    with _hydra(line.config_dir):
        return composer.request(parsed, line)


def complete_shell(argv: Sequence[str]) -> None:
    """Let Hydra answer `-sc install=SHELL`, `-sc uninstall=SHELL` or a query of the shell."""
    words = [word for word in argv if word not in ("-sc", "--shell-completion")]
    action, _, shell = words[0].partition("=") if len(words) == 1 else ("", "", "")
    known = action in ("install", "uninstall", "query") and shell in ("bash", "zsh", "fish")
    if not known or (action == "query" and "COMP_LINE" not in os.environ):
        raise UsageError(
            "shell completion is wrong: write -sc install=bash, or uninstall= or zsh or fish"
        )
    sys.argv[1:] = ["--shell-completion", *words]
    hydra_main(config_path=str(config_folder()), config_name="config", version_base="1.3")(
        lambda _: None
    )()


def _points(
    node: DictConfig,
    parsed: list[Override],
    options: dict[str, dict[str, Path]],
    *,
    multirun: bool,
) -> list[list[Override]]:
    """Return the overrides of each of the `points`; UsageError without -m."""
    asked = {override.key_or_group for override in parsed}
    points = OmegaConf.select(node, "points")
    plain = OmegaConf.to_container(points) if OmegaConf.is_config(points) else points or []
    places = expand_points(plain, asked, options)
    if places and not multirun:
        raise UsageError("points name several runs; add -m to run all of them")
    return places


def _compose_folder(folder: Path, parsed: list[Override], line: CommandLine) -> Request:
    base = to_plain(load(folder / "config.yaml"))
    if any(override.key_or_group.startswith("split") for override in parsed):
        for name in base["dataset"]["computed"]:  # on the images that train now
            base["dataset"][name] = "auto"
    runs = []
    options = LaunchOptions()
    of_points = OmegaConf.create({"points": []})
    for override in parsed:
        if override.key_or_group == "points":
            apply_value(of_points, override)
    points = _points(of_points, parsed, {}, multirun=line.multirun)
    for overrides in expand_grid(parsed, {}, multirun=line.multirun, points=points):
        node = OmegaConf.create({**dataclasses.asdict(LaunchOptions()), **base})
        OmegaConf.set_struct(node, True)
        for override in overrides:
            apply_value(node, override)
        plain = resolve(node)
        options = take_launch_options(plain)
        runs.append(planned_run(plain, lines_of(overrides)))
    shown = None
    if line.cfg is not None:
        shown = _show(OmegaConf.create(to_plain(runs[0].config)), line)
    return Request(runs, options, len(runs) > 1, {}, shown=shown, folder=folder)


@contextlib.contextmanager
def _hydra(config_dir: str | None) -> Iterator[None]:
    """Let Hydra compose from conf/, and before it from a folder of the user's own."""
    before = GlobalHydra.instance().hydra  # of a program that uses Hydra itself
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
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


class _Composer:
    """Composes the runs of a command line."""

    def __init__(self, line: CommandLine) -> None:
        self._options = find_options(line.config_dir)
        root = find_root(line.config_name or "config", line.config_dir)
        self._compositions = Compositions(root, self._options)

    def request(self, parsed: list[Override], line: CommandLine) -> Request:
        """Compose every run of a command line."""
        for override in parsed:
            self._check_choice(override)
        fixed = [o for o in parsed if not o.is_sweep_override()]
        node, hydra = self._compositions.node(fixed), self._compositions.hydra(fixed)
        grid = OmegaConf.select(hydra, "sweeper.params") or {}
        multirun = line.multirun or str(OmegaConf.select(hydra, "mode")) == "RunMode.MULTIRUN"
        if multirun and grid:
            asked = {override.key_or_group for override in parsed}
            extra = [f"{k}={v}" for k, v in grid.items() if k not in asked]
            parsed = parse_overrides(extra) + parsed
            fixed = [o for o in parsed if not o.is_sweep_override()]
        points = _points(node, parsed, self._options, multirun=multirun)
        for override in [override for point in points for override in point]:
            self._check_choice(override)
        space: list[Dimension] = []
        if multirun and OmegaConf.select(node, "search.method") != "none":
            if points:
                raise UsageError(
                    "points are for a grid; search=optuna chooses each value by itself"
                )
            space = [search_dimension(o, self._options) for o in parsed if o.is_sweep_override()]
            lists = search_examples(space, fixed)
        else:
            lists = expand_grid(parsed, self._options, multirun=multirun, points=points)
        runs: list[PlannedRun] = []
        options = LaunchOptions()
        for overrides in lists:
            plain = self._compositions.cell(overrides)
            options = take_launch_options(plain)
            runs.append(planned_run(plain, lines_of(overrides)))
        return Request(
            runs,
            options,
            multirun,
            _launcher(self._compositions.hydra(lists[-1])),
            None if line.cfg is None else _show(self._compositions.node(lists[-1]), line),
            tuple(space),
            lines_of([o for o in fixed if o.key_or_group.split(".")[0] != "search"]),
        )

    def _check_choice(self, override: Override) -> None:
        """Refuse what is not an option of its group."""
        group = override.key_or_group
        if group not in self._options and group not in INSTEAD_OF_PLUGINS:
            return
        options = list(self._options.get(group, ()))
        chosen = [override.value()]
        if override.is_sweep_override():
            chosen = list(listed_values(override, self._options))
        for option in chosen:
            if group in INSTEAD_OF_PLUGINS:
                if override.is_sweep_override() or option not in ("basic", *options):
                    raise _not_supported(group, value_text(override))
            elif not isinstance(option, str) or option not in options:
                guess = did_you_mean(option, options) if isinstance(option, str) else ""
                raise UsageError(
                    f"{group}={shorten(value_text(override))} is wrong: it must be one of "
                    f"{listing(options)}{guess}"
                )


def _launcher(hydra: DictConfig) -> dict[str, Any]:
    """Return the settings of hydra/launcher; refuse Hydra's other launchers and sweepers."""
    choices = OmegaConf.select(hydra, "runtime.choices")
    settings = OmegaConf.to_container(OmegaConf.select(hydra, "launcher"), resolve=True)
    assert isinstance(settings, dict)
    if choices["hydra/launcher"] != "basic" and "cluster" not in settings:
        raise _not_supported("hydra/launcher", choices["hydra/launcher"])
    if choices["hydra/sweeper"] != "basic":
        raise _not_supported("hydra/sweeper", choices["hydra/sweeper"])
    return {str(key): value for key, value in settings.items()}


def _not_supported(group: str, option: Any) -> UsageError:
    return UsageError(
        f"{group}={shorten(str(option))} is not supported: {INSTEAD_OF_PLUGINS[group]}"
    )


def _show(node: DictConfig, line: CommandLine) -> str:
    """Return what `--cfg job` prints."""
    shown: Any = node
    if line.package is not None:
        shown = OmegaConf.select(node, line.package, default=_MISSING)
        if shown is _MISSING:
            raise UsageError(f"--package {shorten(line.package)}: there is no such part")
    if not OmegaConf.is_config(shown):
        return str(shown)
    return OmegaConf.to_yaml(shown, resolve=line.resolve).rstrip()
