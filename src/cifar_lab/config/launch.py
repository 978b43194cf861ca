"""How runs are launched: options that are no part of a run, and the processes of torchrun."""

import os
import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from cifar_lab.config.schema import setting, wrong


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
