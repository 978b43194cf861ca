"""Runs read from a folder and grouped: what differs between them, and which are seeds of one."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from cifar_lab.analysis.load_runs import MISSING, FoundRun, identity_without, read_runs
from cifar_lab.analysis.seed_groups import Key, RunCollection, SeedGroup, place_of
from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import listing, shorten
from cifar_lab.runs.run_dir import RunDir


def read_collection(folder: Path) -> RunCollection:
    """Read every run at and below `folder` and group them; UsageError if there is none."""
    runs, unreadable = read_runs(folder)
    collection = collect(folder, runs)
    collection.unreadable = unreadable
    collection.notes += [
        f"{shorten(path.name, 200)} is a link to a folder and was not followed."
        for path in sorted(folder.iterdir())
        if path.is_symlink() and path.is_dir()
    ]
    return collection


def collect_folders(folders: Sequence[Path]) -> RunCollection:
    """Read the runs of these folders and group them."""
    runs = [FoundRun(RunDir(folder)) for folder in folders]
    above = os.path.commonpath([folder.absolute().parent for folder in folders])
    return collect(Path(above), runs)


def collect(folder: Path, runs: Sequence[FoundRun]) -> RunCollection:
    """Group runs that were read, by what differs between them; `folder` is above them all."""
    axes, notes = find_axes(runs), list[str]()
    runs = sorted(runs, key=lambda run: str(run.run.path))
    datasets = _name_datasets(runs, notes)
    is_numbered = any(name != run.config.dataset.name for run, name in datasets.items())
    if is_numbered and "dataset" not in axes:
        axes.insert(0, "dataset")
    members: dict[tuple[Key, str], dict[tuple[int, int | None], FoundRun]] = {}
    # Of two copies, a finished one is kept.
    for run in sorted(
        runs, key=lambda r: (r.config.seed, r.config.split.fold or 0, not r.finished)
    ):
        # The number follows the option: two options may read the same pictures differently.
        number = datasets[run].removeprefix(run.config.dataset.name)
        values = run.values | {"dataset": run.values["dataset"] + number}
        key = tuple(values.get(axis, MISSING) for axis in axes)
        kept = members.setdefault((key, datasets[run]), {}).setdefault(run.replicate, run)
        if kept is not run:
            notes.append(
                f"{shorten(str(run.run.path), 200)} is the same run as "
                f"{shorten(str(kept.run.path), 200)} and counts once."
            )
    ordered = sorted(members, key=lambda member: (list(map(place_of, member[0])), member[1]))
    groups = [SeedGroup(key, list(members[key, of].values()), of) for key, of in ordered]
    collection = RunCollection(folder, axes, groups, {}, notes)
    notes += [
        f"{collection.label(group)}: its means are over {count} of {group.folds} folds."
        for group in groups
        if group.folds and 0 < (count := len(group.finished_folds)) < group.folds
    ]
    return collection


def find_axes(runs: Sequence[FoundRun]) -> list[str]:
    """Return the config groups and keys that differ between the runs, in the config's order.

    A key of a config group is compared among the runs that took the same option of that group.
    """
    groups = sorted({group for run in runs for group in run.choices}, key=_place_of)
    axes = [g for g in groups if len({run.choices.get(g, MISSING) for run in runs}) > 1]
    keys = []
    for key in {key for run in runs for key in run.values}.difference(axes):
        group = key.partition(".")[0]
        values = {(run.choices.get(group), run.values.get(key)) for run in runs}
        if len(values) > len({option for option, _ in values}):
            keys.append(key)
    return axes + sorted(keys, key=_place_of)


def _name_datasets(runs: Sequence[FoundRun], notes: list[str]) -> dict[FoundRun, str]:
    """Return the name of each run's dataset, with a number, and a note, where one means several.

    Runs on other pictures are no seeds of one another, and their scores are not compared.
    """
    sets: dict[str, list[list[FoundRun]]] = {}
    for run in runs:
        of_name = sets.setdefault(run.config.dataset.name, [])
        same = next((members for members in of_name if same_pictures(run, members[0])), [])
        if not same:
            of_name.append(same)
        same.append(run)
    names: dict[FoundRun, str] = {}
    for name, of_name in sets.items():
        for number, members in enumerate(of_name, start=1):
            label = f"{name} ({number})" if len(of_name) > 1 else name
            names |= dict.fromkeys(members, label)
        if len(of_name) > 1:
            paths = [shorten(str(members[0].run.path), 200) for members in of_name]
            notes.append(
                f"{len(of_name)} different sets of pictures are called {name}, by their checksums "
                f"(those of {listing(paths, 400)}): their runs are ranked apart, and they are "
                "neither seeds of one another nor compared."
            )
    return names


def same_pictures(a: FoundRun, b: FoundRun) -> bool:
    """Whether two runs used the same pictures, as far as their checksums tell.

    The same source at another size has other pixels, and the same pictures.
    """
    here, there = a.summary.dataset, b.summary.dataset
    differ = {name for name in here.keys() & there.keys() - {"name"} if here[name] != there[name]}
    if not differ:
        return True
    sources = [
        {k: v for k, v in identity_without(run.config).items() if k.startswith("dataset.source.")}
        | {"dataset.source.fit": None}
        for run in (a, b)
    ]
    resized = a.config.dataset.image_shape != b.config.dataset.image_shape
    return resized and sources[0] == sources[1] and differ <= {"train_images", "test_images"}


def _place_of(name: str) -> tuple[int, str]:
    fields = [spec.name for spec in dataclasses.fields(RunConfig)]
    group = name.split(".")[0]
    return (fields.index(group) if group in fields else len(fields), name)
