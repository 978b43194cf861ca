"""Runs that differ in the seed or fold alone, and collections of them: values, names, ranks."""

import contextlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from cifar_lab.analysis import run_metrics
from cifar_lab.analysis.contrasts import Difference, Sample
from cifar_lab.analysis.load_runs import MISSING, FoundRun, show_value
from cifar_lab.analysis.statistics import Interval, interval
from cifar_lab.errors import UsageError, did_you_mean, listing, shorten, shorten_path

Key = tuple[str, ...]

BRINGING = ("dataset", "model", "protocol")
"""Axes whose values bring values of other keys along."""


@dataclass(eq=False)
class SeedGroup:
    """Runs that differ in their seed alone, or in the fold on which they validate.

    `dataset`: its name, with a number where several sets of images have that name. `difference` is
    the group's mean minus that of the reference (the best group, or one that was named), and
    `not_judged` the reason where there is none.
    """

    key: Key
    runs: list[FoundRun]
    dataset: str
    rank: int | None = None
    chosen: bool = False
    is_reference: bool = False
    difference: Difference | None = None
    not_judged: str = ""

    @property
    def finished(self) -> list[FoundRun]:
        """Its finished runs, in the order of their seeds."""
        return [run for run in self.runs if run.finished]

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
        """Return mean, spread and interval of a metric over the finished runs that have it.

        Over folds, they are those of the means of the folds; `n` counts the runs.
        """
        runs, sample = self._values(name)
        if not runs:
            return None
        found = interval(sample.values, run_metrics.bounds(name), sample.share)
        return found and replace(found, n=len(runs))

    def _values(self, name: str) -> tuple[list[FoundRun], Sample]:
        """Return the runs that have a metric, and its values; over folds, their means."""
        known = {run: value for run in self.finished if (value := run.metric(name)) is not None}
        replicates = tuple(run.replicate for run in known)
        sample = Sample(tuple(known.values()), replicates, folds=self.folds)
        if self.folds is not None:
            sample = sample.over_folds(sorted({fold or 0 for _, fold in replicates}))
        return list(known), sample

    def mean(self, name: str) -> float | None:
        """Return the mean of a metric over the finished runs."""
        found = self.interval(name)
        return None if found is None else found.mean

    def sample(self, name: str) -> Sample:
        """Return a metric of each finished run that has it, for tests; over folds, their means.

        With the images that it was measured on, where the runs' predictions of them are stored.
        """
        (runs, sample), where = self._values(name), run_metrics.measured_on(name)
        if where is None or self.folds is not None:
            return sample
        there = [scored for run in runs if (scored := run.scored(*where)) is not None]
        images = {scored.images for scored in there}
        if len(images) != 1:
            return sample
        whole = len(there) == len(runs) and name in run_metrics.COUNTS_IMAGES
        right = np.stack([scored.right for scored in there]) if whole else None
        return replace(sample, images=images.pop(), right=right)

    @property
    def is_tied(self) -> bool:
        """Whether it was compared with the reference and not told apart."""
        return self.difference is not None and not self.difference.told_apart


@dataclass
class RunCollection:
    """The runs at and below a folder: what differs between them, and their groups.

    `baseline`: what the groups are set against, in words of `select`, if it is not the best.
    """

    folder: Path
    axes: list[str]
    groups: list[SeedGroup]
    unreadable: dict[Path, str]
    notes: list[str]
    metric: str = ""
    ranked: bool = False
    baseline: str | None = None

    @property
    def datasets(self) -> list[str]:
        """The names of the datasets, each ranked apart."""
        return sorted({group.dataset for group in self.groups})

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
        return sort_values(group.key[index] for group in self.groups)

    @cached_property
    def main_axes(self) -> list[int]:
        """The places of the axes that tables and names show: enough to tell the groups apart.

        An axis is left out if it follows from options: a key or group that has one value for each
        option of the BRINGING, and a key that is missing where an option has no place for it, or
        has one value for the same options. Where most combinations occur once that would be chance,
        so a third must be repetitions. Other groups stay, even if they only changed together.
        """
        columns = list(zip(*(group.key for group in self.groups), strict=True))
        groups = [i for i, axis in enumerate(self.axes) if "." not in axis]
        bringing = [i for i in groups if self.axes[i] in BRINGING]
        for i in [i for i in groups if i not in bringing]:
            if any(_determines([columns[k]], columns[i]) for k in bringing):
                groups.remove(i)
        main = list(groups)
        for i, axis in enumerate(self.axes):
            lacks = bool({MISSING, "null"} & set(columns[i]))
            follows = _determines([columns[k] for k in groups], columns[i], repeated=not lacks)
            follows |= any(
                _determines([columns[k]], columns[i], repeated=self.axes[k] not in BRINGING)
                for k in groups
            )
            if "." in axis and not follows:
                main.append(i)
        return sorted(main)

    def label(self, group: SeedGroup) -> str:
        """Return a group's name: the values of its main axes."""
        parts = [f"{self.axes[i]}={group.key[i]}" for i in self.main_axes]
        return ", ".join(parts) or "the one configuration"

    def short_label(self, group: SeedGroup) -> str:
        """Return a group's name for a legend: options alone, keys by their last part."""
        parts = []
        for axis, value in ((self.axes[i], group.key[i]) for i in self.main_axes):
            key, name = axis.removesuffix("._target_"), value.rpartition(".")[2]
            if key != axis and sum(v.endswith(f".{name}") for v in self.values(axis)) == 1:
                value = name
            parts.append(f"{key.rpartition('.')[2]} {value}" if "." in axis else value)
        return ", ".join(parts) or "the one configuration"

    def select(self, words: str) -> list[SeedGroup]:
        """Return the groups that `optimizer=adam,lr=0.01` describes; UsageError if none does.

        A key may be shortened to its last part, and values are those of a command line: [8,8].
        """
        groups = self.groups
        for word in re.split(r",\s*(?=[\w.]+\s*=)", words):
            key, equals, value = (part.strip() for part in word.partition("="))
            if not equals or not key or not value:
                raise UsageError(f"{shorten(words)} is wrong: it must be KEY=VALUE, KEY=VALUE")
            places = [i for i, a in enumerate(self.axes) if a == key or a.endswith(f".{key}")]
            if not places:
                axes = listing(self.axes)
                raise UsageError(
                    f"{shorten(word)} is wrong: the configurations below "
                    f"{shorten_path(self.folder)} do not differ in {shorten(key)}"
                    f"{did_you_mean(key, self.axes)}; they differ in {axes}"
                )
            with contextlib.suppress(ValueError):
                value = show_value(json.loads(f"0{value}" if value[0] == "." else value))
            chosen = [g for g in groups if any(g.key[i] == value for i in places)]
            if not chosen:
                values = sorted({group.key[i] for group in groups for i in places})
                raise UsageError(
                    f"{shorten(words)} fits no configuration below {shorten_path(self.folder)}; "
                    f"{key} is {listing(values)} there"
                )
            groups = chosen
        return groups


def short_names(axes: Sequence[str]) -> list[str]:
    """Return axes' names by their last part, where that is enough to tell them apart."""
    names = [axis.removesuffix("._target_") for axis in axes]
    short = [name.rpartition(".")[2] for name in names]
    return [s if short.count(s) == 1 else n for s, n in zip(short, names, strict=True)]


def _determines(
    columns: Sequence[Sequence[str]], other: Sequence[str], *, repeated: bool = True
) -> bool:
    """Whether `other` has one value for each combination of values of `columns`.

    `repeated`: and a third of the combinations at least occurred before.
    """
    combinations = list(zip(*columns, strict=True)) if columns else [()] * len(other)
    distinct = len(set(combinations))
    pairs = set(zip(combinations, other, strict=True))
    enough = not repeated or 3 * (len(other) - distinct) >= len(other)
    return len(pairs) == distinct and enough


def place_of(value: str) -> tuple[int, float, str]:
    """Return what orders an axis's values: numbers by size, then the rest by name."""
    with contextlib.suppress(ValueError):
        return 0, float(value), value
    return 1, 0.0, value


def sort_values(values: Iterable[str]) -> list[str]:
    """Return an axis's values once each, in order."""
    return sorted(set(values), key=place_of)
