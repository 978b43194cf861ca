"""A command line, understood: which runs it asks for and how they are launched."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_lab.config import targets
from cifar_lab.config.launch import LAUNCH_KEYS, Dimension, LaunchOptions
from cifar_lab.config.run_config import RunConfig, flatten, merge, parse
from cifar_lab.config.schema import parse_as
from cifar_lab.errors import UsageError


@dataclass(frozen=True)
class PlannedRun:
    """One run of a request, with the overrides that made it."""

    config: RunConfig
    overrides: tuple[str, ...]
    asked_keys: frozenset[str]
    """The keys that the overrides set: what the user asked for, not what is a default."""


@dataclass(frozen=True)
class Request:
    """The runs of a command line, how to launch them, or a config to show.

    `space` has the axes of a search, whose `runs` are only examples, and `fixed` the overrides that
    all its trials share. `folder` is the past run that the command line starts from.
    """

    runs: list[PlannedRun]
    options: LaunchOptions
    is_sweep: bool
    launcher: dict[str, Any]
    shown: str | None = None
    space: tuple[Dimension, ...] = ()
    fixed: tuple[str, ...] = ()
    folder: Path | None = None

    @property
    def runs_elsewhere(self) -> bool:
        """Whether the runs get processes of their own, on this machine or a cluster."""
        return self.is_sweep or bool(self.space) or "cluster" in self.launcher


def take_launch_options(plain: dict[str, Any]) -> LaunchOptions:
    """Remove the launch options from a composed config and return them; trust what they name."""
    taken = {key: plain.pop(key) for key in list(plain) if key in LAUNCH_KEYS}
    if isinstance(taken.get("trust"), str):  # trust=my_nets
        taken["trust"] = [taken["trust"]]
    options = parse_as(LaunchOptions, taken, "")
    targets.trust(options.trust)
    return options


# Arguments that came later: null is the same as none, so that earlier runs keep their addresses.
_LATER = {"optimizer": ("backbone_lr",), "model": ("first_bias_epochs", "first_bias_scale")}


def planned_run(plain: dict[str, Any], overrides: tuple[str, ...]) -> PlannedRun:
    """Turn a composed config into a run: lay the protocol over it, then parse it strictly."""
    protocols = plain.pop("protocols", None)
    asked = frozenset(line.partition("=")[0].lstrip("+") for line in overrides)
    _merge_protocol(plain, protocols, asked)
    dataset, split = plain.get("dataset"), plain.get("split")
    if isinstance(split, dict) and not {"split", "split.validation"} & asked:
        folds = split.get("folds")
        if isinstance(folds, int) and folds > 0:  # its share of the images
            split["validation"] = 1 / folds
    if isinstance(dataset, dict) and isinstance(dataset.get("computed"), list):
        dataset["computed"] = [n for n in dataset["computed"] if f"dataset.{n}" not in asked]
    for optional in ("scheduler", "activation"):
        part = plain.get(optional)
        if isinstance(part, dict) and part.get("_target_") is None:
            plain[optional] = None
    if plain.get("tracker") == {"_target_": None}:  # with tracker.uri=... it is wrong
        plain["tracker"] = None
    for group, names in _LATER.items():
        part = plain.get(group)
        if isinstance(part, dict):
            plain[group] = {k: v for k, v in part.items() if v is not None or k not in names}
    return PlannedRun(parse(plain), overrides, asked)


def _merge_protocol(plain: dict[str, Any], protocols: Any, asked: Collection[str]) -> None:
    """Lay the chosen protocol's settings over the config, except those that the user asked for."""
    known = parse_as(dict[str, dict[str, Any]], protocols or {}, "protocols")
    for key, value in flatten(known.get(str(plain.get("protocol")), {})).items():
        if any(key == a or key.startswith(f"{a}.") for a in asked):
            continue
        for name in reversed(key.split(".")):
            value = {name: value}
        plain |= merge(plain, value)


def check_launch(request: Request) -> None:
    """Raise UsageError for a search that cannot work, and where nothing can be detached."""
    options = request.options
    if options.detach and (request.launcher.get("cluster") != "slurm" or request.space):
        raise UsageError(
            "detach=true needs hydra/launcher=submitit_slurm and no search: other runs end with "
            "the command, and a search chooses what to try by the results before"
        )
    if options.search.method != "none" and not request.space:
        raise UsageError(
            f"search={options.search.method} has no values to choose from: add -m and "
            "values such as optimizer=sgd,adam or 'optimizer.lr=tag(log,interval(1e-4,1e-1))'"
        )
    if request.space and options.rerun and not options.plan:
        raise UsageError("rerun=true is wrong in a search: choose another search.study instead")
    seeds = [d.key for d in request.space if d.key in ("seed", "split.seed", "split.fold")]
    if seeds and options.search.seeds > 1:
        raise UsageError(
            f"search.seeds={options.search.seeds} repeats every setting with other seeds, and "
            f"{seeds[0]} is an axis of the search: leave out one of them"
        )
