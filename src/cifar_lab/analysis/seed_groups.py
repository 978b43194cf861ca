"""Runs as configurations: what differs between them, and which differ in the seed or fold alone."""

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cifar_lab.analysis import run_metrics, statistics
from cifar_lab.analysis.load_runs import MISSING, FoundRun, read_runs, show_value
from cifar_lab.analysis.statistics import Interval, PairedTest, interval, interval_over_folds
from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import shorten
from cifar_lab.runs.metrics import Predictions

Key = tuple[str, ...]


@dataclass
class SeedGroup:
    """Runs that differ in their seed alone, or in the fold on which they validate."""

    key: Key
    runs: list[FoundRun]
    rank: int | None = None
    chosen: bool = False
    against_best: PairedTest | None = None
    p_adjusted: float | None = None
    not_tested: str = ""
    _intervals: dict[str, Interval | None] = field(default_factory=dict)

    @property
    def finished(self) -> list[FoundRun]:
        """Its finished runs, in the order of their seeds."""
        return [run for run in self.runs if run.finished]

    @property
    def dataset(self) -> str:
        """The dataset's name."""
        return self.runs[0].config.dataset.name

    @property
    def folds(self) -> int | None:
        """The number of parts of which each run validates on one; None without cross-validation."""
        return self.runs[0].config.split.folds

    @property
    def finished_folds(self) -> list[int]:
        """The folds of its finished runs, once each."""
        found = {run.config.split.fold for run in self.finished}
        return sorted(fold for fold in found if fold is not None)

    def interval(self, name: str) -> Interval | None:
        """Return mean, spread and interval of a metric over the finished runs that have it."""
        if name not in self._intervals:
            values = [(run.config.split.fold or 0, run.metric(name)) for run in self.finished]
            known = [(fold, value) for fold, value in values if value is not None]
            bounds = run_metrics.bounds(name)
            self._intervals[name] = (
                interval([value for _, value in known], bounds)
                if self.folds is None
                else interval_over_folds(known, self.folds, bounds)
            )
        return self._intervals[name]

    def mean(self, name: str) -> float | None:
        """Return the mean of a metric over the finished runs."""
        found = self.interval(name)
        return None if found is None else found.mean

    def predictions(self, split: str, weights: str) -> list[Predictions]:
        """Return the predictions of each finished run that has them."""
        found = (run.predictions(split, weights) for run in self.finished)
        return [predictions for predictions in found if predictions is not None]

    @property
    def tied_with_best(self) -> bool:
        """Whether the paired test shows no difference from the best configuration."""
        return self.p_adjusted is not None and self.p_adjusted >= statistics.LEVEL


@dataclass
class RunCollection:
    """The runs at and below a folder: what differs between them, and their configurations."""

    folder: Path
    axes: list[str]
    groups: list[SeedGroup]
    unreadable: dict[Path, str]
    notes: list[str]
    metric: str = ""
    ranked: bool = False

    @property
    def runs(self) -> list[FoundRun]:
        """All runs that can be read."""
        return [run for group in self.groups for run in group.runs]

    @property
    def ranking(self) -> list[SeedGroup]:
        """The configurations in order of rank, those without one last."""
        last = len(self.groups) + 1
        return sorted(self.groups, key=lambda group: (group.dataset, group.rank or last))

    def values(self, axis: str) -> list[str]:
        """Return the values on an axis, once each, in order."""
        index = self.axes.index(axis)
        return in_order(group.key[index] for group in self.groups)

    @cached_property
    def main_axes(self) -> list[int]:
        """The places of the axes that tables and names show: enough to tell the groups apart.

        An axis is left out if it follows from others: a key that is the same in all groups with the
        same options of the config groups, or a group that follows from another one. Where most
        combinations of options occur once that would be chance, so a third must be repetitions.
        """
        columns = list(zip(*(group.key for group in self.groups), strict=True))
        groups = [i for i, axis in enumerate(self.axes) if "." not in axis]
        for i in [i for i in groups if self.axes[i] not in ("dataset", "model")]:
            if any(_determines([columns[k]], columns[i]) for k in groups if k != i):
                groups.remove(i)
        options = [columns[i] for i in groups]
        keys = [i for i, axis in enumerate(self.axes) if "." in axis]
        return sorted([*groups, *(i for i in keys if not _determines(options, columns[i]))])

    def label(self, group: SeedGroup) -> str:
        """Return a configuration's name: the values of its main axes."""
        parts = (f"{self.axes[i]}={group.key[i]}" for i in self.main_axes)
        return ", ".join(parts) or "the one configuration"

    def short_label(self, group: SeedGroup) -> str:
        """Return a configuration's name for a legend: options alone, keys by their last part."""
        parts = []
        for i in self.main_axes:
            _, dot, last = self.axes[i].rpartition(".")
            parts.append(f"{last} {group.key[i]}" if dot else group.key[i])
        return ", ".join(parts) or "the one configuration"


def _determines(columns: Sequence[Sequence[str]], other: Sequence[str]) -> bool:
    """Whether `other` has one value for each combination of values of `columns`."""
    combinations = list(zip(*columns, strict=True)) if columns else [()] * len(other)
    distinct = len(set(combinations))
    pairs = set(zip(combinations, other, strict=True))
    return len(pairs) == distinct and 3 * (len(other) - distinct) >= len(other)


def read_collection(folder: Path) -> RunCollection:
    """Read every run at and below `folder` and group them; UsageError if there is none."""
    runs, unreadable = read_runs(folder)
    collection = collect(folder, runs)
    return dataclasses.replace(
        collection, unreadable=unreadable, notes=collection.notes + _links(folder)
    )


def collect(folder: Path, runs: Sequence[FoundRun]) -> RunCollection:
    """Group runs that were read, by what differs between them; `folder` is above them all."""
    axes = find_axes(runs)
    groups, notes = _groups_and_notes(runs, axes)
    collection = RunCollection(folder, axes, groups, {}, notes)
    collection.notes += _fold_notes(collection)
    return collection


def find_axes(runs: Sequence[FoundRun]) -> list[str]:
    """Return the config groups and keys that differ between the runs, in the config's order.

    A key of a config group is compared among the runs that took the same option of that group.
    """
    groups = sorted({group for run in runs for group in run.choices}, key=_place_of)
    axes = [g for g in groups if len({run.choices.get(g, MISSING) for run in runs}) > 1]
    every = {key for run in runs for key in run.identity}
    keys = {key for key in every if _differs_within_options(key, runs)}
    if "protocol" in keys:
        keys -= {key for key in keys - {"protocol"} if _follows_protocol(key, runs)}
    return axes + sorted(keys - set(axes), key=_place_of)


def _differs_within_options(key: str, runs: Sequence[FoundRun]) -> bool:
    """Whether runs with the same option of the key's group differ in it; one may lack it."""
    group, values = key.partition(".")[0], dict[str, set[str]]()
    for run in runs:
        value = show_value(run.identity[key]) if key in run.identity else MISSING
        values.setdefault(run.choices.get(group, ""), set()).add(value)
    return any(len(seen) > 1 for seen in values.values())


def _follows_protocol(key: str, runs: Sequence[FoundRun]) -> bool:
    """Whether a key has one value in all runs of each protocol, which then says it all."""
    pairs = {
        (run.config.protocol, show_value(run.identity[key])) for run in runs if key in run.identity
    }
    return len(pairs) == len({protocol for protocol, _ in pairs})


def in_order(values: Iterable[str]) -> list[str]:
    """Return an axis's values once each: numbers by size, then the rest by name."""

    def place(text: str) -> tuple[int, float, str]:
        with contextlib.suppress(ValueError):
            return (0, float(text), text)
        return (1, 0.0, text)

    return sorted(set(values), key=place)


def _groups_and_notes(
    runs: Sequence[FoundRun], axes: Sequence[str]
) -> tuple[list[SeedGroup], list[str]]:
    members: dict[Key, dict[tuple[int, int | None], FoundRun]] = {}
    notes = []
    for run in sorted(runs, key=_place_in_group):
        kept = members.setdefault(_key(run, axes), {}).setdefault(run.replicate, run)
        if kept is not run:
            notes.append(
                f"{shorten(str(run.run.path), 200)} is the same run as "
                f"{shorten(str(kept.run.path), 200)} and counts once."
            )
    orders = [in_order(key[i] for key in members) for i, _ in enumerate(axes)]
    keys = sorted(members, key=lambda k: [o.index(v) for o, v in zip(orders, k, strict=True)])
    return [SeedGroup(key, list(members[key].values())) for key in keys], notes


def _place_in_group(run: FoundRun) -> tuple[int, int, bool, str]:
    fold = run.config.split.fold
    return run.config.seed, -1 if fold is None else fold, not run.finished, str(run.run.path)


def _fold_notes(collection: RunCollection) -> list[str]:
    """Say which configurations lack folds, and where folds and seeds are mixed."""
    notes = []
    repeated = [group for group in collection.groups if len(group.finished) > 1]
    for group in repeated:
        if group.folds is None:
            continue
        label, count, runs = (
            collection.label(group),
            len(group.finished_folds),
            group.finished,
        )
        seeds = {run.config.seed for run in runs}
        if count < group.folds:
            notes.append(
                f"{label}: {count} of {group.folds} folds are finished, and its means are over "
                "these."
            )
        if len(seeds) > 1:
            notes.append(
                f"{label}: its {len(runs)} runs differ in the fold and in the seed ({count} folds, "
                f"{len(seeds)} seeds). The deviation is that of both; its interval and its tests "
                "average the seeds of a fold."
            )
    if len({group.folds is None for group in repeated}) > 1:
        notes.append(
            "Some configurations were repeated over folds and others over seeds: their deviations "
            "do not measure the same, and they cannot be tested against each other."
        )
    return notes


def _key(run: FoundRun, axes: Sequence[str]) -> Key:
    return tuple(
        shorten(run.choices[axis], 60)
        if axis in run.choices
        else show_value(run.identity[axis])
        if axis in run.identity
        else MISSING
        for axis in axes
    )


def _place_of(name: str) -> tuple[int, str]:
    fields = [spec.name for spec in dataclasses.fields(RunConfig)]
    group = name.split(".")[0]
    return (fields.index(group) if group in fields else len(fields), name)


def _links(folder: Path) -> list[str]:
    """Name the links to folders below `folder`: they are not followed."""
    links = [path for path in sorted(folder.iterdir()) if path.is_symlink() and path.is_dir()]
    return [f"{shorten(p.name, 200)} is a link to a folder and was not followed." for p in links]
