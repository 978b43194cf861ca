"""A command line, understood: which runs it asks for, and how they are launched.

The launch options and the place among torchrun's processes are no part of a run.
"""

import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from cifar_lab.config import targets
from cifar_lab.config.run_config import RunConfig, flatten, merge, parse
from cifar_lab.config.schema import parse_as, setting, wrong
from cifar_lab.errors import UsageError


@dataclass(frozen=True)
class SearchOptions:
    """How a sweep chooses among the values it lists: all combinations, or a search with Optuna."""

    method: Literal["none", "optuna"] = setting("none", "none: every combination; optuna: a search")
    trials: int = setting(20, "trials of the study in all; more continue it", ge=1)
    sampler: Literal["tpe", "random"] = setting("tpe", "tpe learns from the trials before")
    pruner: Literal["median", "hyperband", "none"] = setting("median", "what ends trials that lag")
    warmup_epochs: int = setting(2, "epochs before a trial can be pruned", ge=0)
    study: str = setting("search", "its file is <output_dir>/<name>/.search/<study>.journal")
    seed: int = setting(0, "draws what is tried", ge=0, le=2**32 - 1)
    seeds: int = setting(1, "runs of a trial, with seed, seed+1, ...; their mean counts", ge=1)

    def check(self, path: str) -> None:
        """Refuse a study that does not name a file, and a pruner that goes by epochs only."""
        if self.seeds > 1 and self.pruner == "hyperband":
            right = f"median or none where {path}.seeds={self.seeds}: hyperband goes by epochs"
            raise wrong(f"{path}.pruner", self.pruner, right)
        if not re.fullmatch(r"\w[\w.\-]{0,99}", self.study):
            right = "a name of letters, digits, '.', '_' and '-', such as search"
            raise wrong(f"{path}.study", self.study, right)


@dataclass(frozen=True)
class Dimension:
    """One axis of a search: choices, or a range of numbers (`step` None: continuous)."""

    key: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    whole: bool = False
    log: bool = False

    @property
    def samples(self) -> tuple[str, str, str]:
        """Three values as text, with which a request is checked before it starts."""
        if self.choices:
            return self.choices[0], self.choices[len(self.choices) // 2], self.choices[-1]
        between = 0.0 if self.whole or self.step is not None else 0.618
        inside = self.low + (self.high - self.low) * between
        return tuple(str(int(n)) if self.whole else repr(n) for n in (self.low, inside, self.high))  # type: ignore[return-value]


@dataclass(frozen=True)
class LaunchOptions:
    """What a command line says about launching: none of it is part of a run.

    `points`: each gives values to some keys, in the grammar of a command line, and is a small grid
    where it lists several.
    """

    points: list[dict[str, Any]] = setting(
        factory=list, meaning='a sweep that is no full grid, as [{optimizer: sgd, seed: "0,1"}]'
    )
    plan: bool | Literal["list"] = setting(
        False, "show what would run, and run nothing; list: without the times"
    )
    rerun: bool = setting(False, "run again what is finished")
    accept_code: bool = setting(False, "accept results of another version of the code")
    detach: bool = setting(False, "on SLURM: send the jobs, do not wait for them; or --detach")
    jobs: int | Literal["auto"] = setting("auto", "runs at a time; auto: as many as fit")
    jobs_per_gpu: int = setting(1, "runs that share a GPU", ge=1, le=64)
    trust: list[str] = setting(factory=list, meaning="modules of your own that a config may name")
    search: SearchOptions = field(default_factory=SearchOptions)

    def check(self, path: str) -> None:
        """Refuse a number of jobs out of range."""
        if self.jobs != "auto" and not 1 <= self.jobs <= 1024:
            raise wrong("jobs", self.jobs, "at least 1 and at most 1024")


MAX_RUNS = 10_000
"""Runs that one command line may ask for."""

LAUNCH_KEYS = frozenset(spec.name for spec in fields(LaunchOptions))
"""The names of the launch options among the keys of a command line."""


@dataclass(frozen=True)
class Launched:
    """This process among the `world` ones of torchrun, `local_world` of them on this machine."""

    rank: int
    local_rank: int
    world: int
    local_world: int


def launched() -> Launched | None:
    """Return this process's place among those of torchrun; None if it is the only one."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    values = [os.environ.get(name, "") for name in names]
    if not all(map(str.isdigit, values)) or not {"MASTER_ADDR", "MASTER_PORT"} <= {*os.environ}:
        return None
    place = Launched(*map(int, values))
    return place if place.world > 1 else None


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

    `space` has the axes of a search, whose `runs` are only examples, and `fixed` the words that all
    its trials share. `folder` is the past run that the command line starts from.
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


def sets_one(word: str, keys: Collection[str]) -> bool:
    """Whether KEY=VALUE sets one of these keys, or is of a group that has one."""
    start = word.partition("=")[0].lstrip("+") + "."
    return any(f"{key}.".startswith(start) for key in keys)


def planned_run(plain: dict[str, Any], overrides: tuple[str, ...]) -> PlannedRun:
    """Parse a composed config strictly; what was asked for goes before what its protocol says."""
    protocols = plain.pop("protocols", None)
    asked = frozenset(line.partition("=")[0].lstrip("+") for line in overrides)
    known = parse_as(dict[str, dict[str, Any]], protocols or {}, "protocols")
    for key, value in flatten(known.get(str(plain.get("protocol")), {})).items():
        if not any(sets_one(word, (key,)) for word in overrides):
            for name in reversed(key.split(".")):
                value = {name: value}
            plain |= merge(plain, value)
    dataset, split = _part(plain, "dataset"), _part(plain, "split")
    folds = split.get("folds")
    if isinstance(folds, int) and folds > 0 and not {"split", "split.validation"} & asked:
        split["validation"] = 1 / folds  # its share of the images
    if isinstance(dataset.get("computed"), list):
        dataset["computed"] = [n for n in dataset["computed"] if f"dataset.{n}" not in asked]
    for optional in ("scheduler", "activation"):
        if isinstance(part := plain.get(optional), dict) and part.get("_target_") is None:
            plain[optional] = None
    if "continue_from" in asked and isinstance(start := plain.get("continue_from"), str):
        plain["continue_from"] = str(Path(start))  # a shell completes it with a slash at its end
    if plain.get("tracker") == {"_target_": None}:  # with tracker.uri=... it is wrong
        plain["tracker"] = None
    for group, names in _LATER.items():
        for name in names:
            if name in (part := _part(plain, group)) and part[name] is None:
                del part[name]
    return PlannedRun(parse(plain), overrides, asked)


def _part(plain: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a group of settings; an empty one in place of what `parse` will refuse."""
    part = plain.get(name)
    return part if isinstance(part, dict) else {}


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
