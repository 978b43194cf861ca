"""From a folder of runs to the cells of a table: axes found, seeds joined, nothing lost in silence.

Whatever a folder holds was made by someone else: a run that cannot be read is named with its
reason, and the others go on.
"""

import contextlib
import dataclasses
import functools
import json
import math
import stat
import typing
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cifar_lab import config as config_module
from cifar_lab import measures, significance
from cifar_lab.config import RunConfig
from cifar_lab.errors import RequestError, RunFailed
from cifar_lab.metrics import EpochMetrics, Integers, Predictions
from cifar_lab.run_dir import RunDir, RunSummary, find_runs
from cifar_lab.schema import convert, shorten
from cifar_lab.significance import Interval, PairedTest, interval

Key = tuple[str, ...]

LARGEST = {
    "config.yaml": 2**20,
    "summary.json": 2**22,
    "metrics.csv": 2**27,
    ".lock": 2**16,
}
"""Bytes that a file of a run has at most; a larger one is not ours."""

LARGEST_ARRAYS = 2**30
"""Bytes of the arrays of an .npz at most, decompressed."""

_SHOWN_GROUPS = ("experiment", "figures")
"""Groups whose options change nothing that the settings do not already say."""

MISSING = "–"


class FoundRun:
    """A run folder as it was read: config, summary and history, checked."""

    def __init__(self, run: RunDir) -> None:
        _check_files(run)
        self.run = run
        self.config: RunConfig = run.config
        self.summary: RunSummary = _checked(run.read_summary(), run)
        self.history: list[EpochMetrics] = run.read_metrics()
        self.problems: list[str] = []
        self._confusion: dict[tuple[str, str], Integers] = {}

    @property
    def finished(self) -> bool:
        """Whether its numbers are final."""
        return self.summary.status == "finished"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What makes the run another run, flattened; `choices` and `seed` are left out."""
        plain = _identity(self.config)
        plain.pop("seed")
        source = plain["dataset"]
        for name in ("checksums", "classes"):
            source.pop(name)
        for name in config_module.TRANSPORT_ARGUMENTS:
            source["source"].pop(name, None)
        return config_module.flatten(plain)

    @cached_property
    def choices(self) -> dict[str, str]:
        """The option of each group that has one; a target's name where the config says none."""
        config = self.config
        chosen = {g: o for g, o in config.choices.items() if g not in _SHOWN_GROUPS}
        for group in ("model", "optimizer", "activation", "scheduler"):
            component = getattr(config, group)
            name = component.get("_target_", MISSING) if component else "none"
            chosen.setdefault(group, str(name).rsplit(".", 1)[-1])
        chosen.setdefault("dataset", config.dataset.name)
        return chosen

    def measure(self, name: str) -> float | None:
        """Return a measure, None where there is none; a damaged file becomes a problem."""
        try:
            return measures.measure(name, self.run, self.summary, self.history)
        except (RequestError, RunFailed) as error:
            self.note(str(error))
            return None

    def predictions(self, split: str, weights: str = "scored") -> Predictions | None:
        """Return stored predictions, None where there are none; damaged ones become a problem."""
        path = self.run.predictions_file(split, weights)
        if not path.exists():
            return None
        try:
            check_arrays(path)
            found = self.run.read_predictions(split, weights)
            shapes = {found.logits.ndim: 2, found.labels.ndim: 1, found.indices.ndim: 1}
            sizes = {len(found.logits), len(found.labels), len(found.indices)}
            kinds = found.logits.dtype.kind + found.labels.dtype.kind + found.indices.dtype.kind
            classes = found.logits.shape[-1]
            labels_fit = not len(found) or (found.labels.min() >= 0 < classes > found.labels.max())
            if shapes != {2: 2, 1: 1} or len(sizes) != 1 or kinds != "fii" or not labels_fit:
                raise RunFailed(f"{path} is damaged: its arrays do not fit each other")
        except (RequestError, RunFailed) as error:
            self.note(str(error))
            return None
        self._confusion[split, weights] = found.confusion_matrix
        return found

    def confusion(self, split: str, weights: str = "scored") -> Integers | None:
        """Return the counts (C, C) of stored predictions, which are read once at most."""
        if (split, weights) not in self._confusion and self.predictions(split, weights) is None:
            return None
        return self._confusion[split, weights]

    def note(self, problem: str) -> None:
        """Keep a problem, once."""
        if problem not in self.problems:
            self.problems.append(problem)


@dataclass(frozen=True)
class Unreadable:
    """A run folder that cannot be read, and why."""

    path: Path
    reason: str


@dataclass
class Cell:
    """Runs that differ in their seed alone."""

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

    def interval(self, name: str) -> Interval | None:
        """Return mean, spread and interval of a measure over the finished runs that have it."""
        if name not in self._intervals:
            values = (run.measure(name) for run in self.finished)
            self._intervals[name] = interval([v for v in values if v is not None])
        return self._intervals[name]

    def mean(self, name: str) -> float | None:
        """Return the mean of a measure over the finished runs."""
        found = self.interval(name)
        return None if found is None else found.mean

    def predictions(self, split: str, weights: str) -> list[Predictions]:
        """Return the predictions of each finished run that has them."""
        found = (run.predictions(split, weights) for run in self.finished)
        return [predictions for predictions in found if predictions is not None]

    @property
    def tied_with_best(self) -> bool:
        """Whether the paired test shows no difference from the best cell."""
        return self.p_adjusted is not None and self.p_adjusted >= significance.LEVEL


@dataclass
class Study:
    """Everything that stands below a folder, as a table: axes, cells, and what is wrong with it."""

    folder: Path
    axes: list[str]
    cells: list[Cell]
    unreadable: list[Unreadable]
    notes: list[str]
    metric: str = ""
    ranked: bool = False

    @property
    def runs(self) -> list[FoundRun]:
        """All runs that can be read."""
        return [run for cell in self.cells for run in cell.runs]

    @property
    def ranking(self) -> list[Cell]:
        """The cells in order of rank, those without one last."""
        last = len(self.cells) + 1
        return sorted(self.cells, key=lambda cell: (cell.dataset, cell.rank or last))

    def values(self, axis: str) -> list[str]:
        """Return the values on an axis, once each, in order."""
        index = self.axes.index(axis)
        return in_order(cell.key[index] for cell in self.cells)

    def label(self, cell: Cell) -> str:
        """Return a cell's name: the values of its axes."""
        pairs = zip(self.axes, cell.key, strict=True)
        return ", ".join(f"{axis}={value}" for axis, value in pairs) or "the one setting"

    def short_label(self, cell: Cell) -> str:
        """Return a cell's name for a legend: options alone, settings by their last name."""
        pairs = zip(self.axes, cell.key, strict=True)
        parts = [f"{a.rsplit('.', 1)[-1]} {v}" if "." in a else v for a, v in pairs]
        return ", ".join(parts) or "the one setting"


def read_study(folder: Path) -> Study:
    """Read every run at and below `folder`; RequestError if there is none."""
    found = find_runs(folder)
    if not found:
        raise RequestError(
            f"{folder} holds no run: a run's folder has a config.yaml and a summary.json"
        )
    runs: list[FoundRun] = []
    unreadable: list[Unreadable] = []
    for run in found:
        try:
            runs.append(FoundRun(run))
        except (RequestError, RunFailed, OSError, RecursionError) as error:
            unreadable.append(Unreadable(run.path, _reason(error, run)))
    axes = find_axes(runs)
    cells, notes = _join(runs, axes)
    notes += _linked(folder)
    return Study(folder, axes, cells, unreadable, notes)


def find_axes(runs: Sequence[FoundRun]) -> list[str]:
    """Return the settings and groups that differ; a setting of a group counts within one option."""
    groups = sorted({group for run in runs for group in run.choices}, key=_group_order)
    axes = []
    for group in groups:
        if len({run.choices.get(group, MISSING) for run in runs}) > 1:
            axes.append(group)
    values: dict[tuple[str, str], set[str]] = {}
    for run in runs:
        for key, value in run.settings.items():
            option = run.choices.get(key.split(".")[0], "")
            values.setdefault((key, option), set()).add(show_value(value))
    # A key that only some runs of an option have differs between them too.
    sizes: dict[tuple[str, str], int] = {}
    options: dict[tuple[str, str], int] = {}
    for run in runs:
        for group in {key.split(".")[0] for key in run.settings}:
            place = (group, run.choices.get(group, ""))
            options[place] = options.get(place, 0) + 1
        for key in run.settings:
            option = run.choices.get(key.split(".")[0], "")
            sizes[key, option] = sizes.get((key, option), 0) + 1
    settings = {
        key
        for (key, option), seen in values.items()
        if len(seen) > 1 or sizes[key, option] < options[key.split(".")[0], option]
    }
    if "protocol" in settings:
        settings -= {key for key in settings - {"protocol"} if _follows_protocol(key, runs)}
    return axes + sorted(settings - set(axes), key=lambda key: (_group_order(key), key))


def _follows_protocol(key: str, runs: Sequence[FoundRun]) -> bool:
    """Whether a setting is the same in all runs of one protocol, which then says it all."""
    pairs = {
        (run.config.protocol, show_value(run.settings[key])) for run in runs if key in run.settings
    }
    return len(pairs) == len({protocol for protocol, _ in pairs})


def show_value(value: Any) -> str:
    """Return a setting's value as short text: 0.0001, none, [3, 32, 32]."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, str):
        return shorten(value, 60)
    return shorten(json.dumps(value, ensure_ascii=False), 60)


def in_order(values: Iterable[str]) -> list[str]:
    """Return an axis's values once each: numbers by size, then the rest by name."""

    def place(text: str) -> tuple[int, float, str]:
        with contextlib.suppress(ValueError):
            return (0, float(text), text)
        return (1, 0.0, text)

    return sorted(set(values), key=place)


def check_arrays(path: Path) -> None:
    """RunFailed if an .npz would not fit in memory, whatever its file's size says."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise RunFailed(f"{path} is damaged: {error}") from None
    if size > LARGEST_ARRAYS:
        raise RunFailed(f"{path} is damaged: it would unpack to {size:,} bytes")


def rank(study: Study, metric: str | None) -> None:
    """Give the cells their ranks, choose the best of each dataset, and test the others against it.

    By validation accuracy unless `metric` says otherwise. Where no validation was held out and no
    metric was asked for, nothing is ranked: a note says why.
    """
    study.metric = metric or "best_val_accuracy"
    measures.check(study.metric)
    sign = -1 if measures.higher_is_better(study.metric) else 1
    for dataset in sorted({cell.dataset for cell in study.cells}):
        cells = [cell for cell in study.cells if cell.dataset == dataset]
        scored = [cell for cell in cells if cell.mean(study.metric) is not None]
        if not scored:
            if any(cell.finished for cell in cells):
                study.notes.append(_why_unranked(study, dataset, cells))
            continue
        study.ranked = True
        scored.sort(key=lambda cell: (sign * (cell.mean(study.metric) or 0.0), cell.key))
        for place, cell in enumerate(scored, start=1):
            cell.rank = place
        scored[0].chosen = True
        _test_against_best(study, scored)
    if study.ranked:
        study.notes += _warnings(study)


def _test_against_best(study: Study, ranking: list[Cell]) -> None:
    """Fill in the paired tests of the best cell against each other one, adjusted by Holm."""
    if "accuracy" not in study.metric:
        for cell in ranking[1:]:
            cell.not_tested = f"paired tests compare accuracies, not {study.metric}"
        return
    test = measures.is_test(study.metric)
    split = "test" if test else "validation"
    weights = "last" if study.metric == "test_accuracy_last" else "scored"
    best = ranking[0].predictions(split, weights)
    tested = []
    for cell in ranking[1:]:
        other = cell.predictions(split, weights)
        if not best or not other:
            cell.not_tested = f"no {split} predictions of {'it' if best else 'the best cell'}"
            continue
        try:
            cell.against_best = significance.compare(best, other)
        except RequestError as error:
            cell.not_tested = str(error)
            continue
        tested.append(cell)
    adjusted = significance.holm([cell.against_best.p for cell in tested if cell.against_best])
    for cell, p in zip(tested, adjusted, strict=True):
        cell.p_adjusted = p


def _why_unranked(study: Study, dataset: str, cells: list[Cell]) -> str:
    if study.metric == "best_val_accuracy" and all(
        run.config.split.validation == 0 for cell in cells for run in cell.finished
    ):
        named = {
            claim.metric
            for cell in cells
            for run in cell.runs
            for claim in run.config.study.claims
            if "accuracy" in claim.metric
        }
        hint = f", or by what the study's claims name: {', '.join(sorted(named))}" if named else ""
        return (
            f"{dataset}: no validation images were held out (protocol "
            f"{cells[0].runs[0].config.protocol}), so the cells are not ranked and none is chosen: "
            "choosing by the test score would make that score worthless. --metric ranks by "
            f"another measure if you want to{hint}."
        )
    return f"{dataset}: no finished run has a {study.metric}, so its cells are not ranked."


def _warnings(study: Study) -> list[str]:
    found = []
    configs = [run.config for run in study.runs if run.finished]
    if measures.is_test(study.metric):
        found.append(
            f"Ranked by {study.metric}, as asked: the best cell is chosen on the test images, so "
            "its score is an optimistic one."
        )
    elif any(c.split.source == "test" and c.split.validation > 0 for c in configs):
        found.append(
            "Some runs take their validation images from the test set (split.source=test): a test "
            "score that counts these images is an optimistic one."
        )
    scored = [cell for cell in study.cells if cell.rank is not None]
    if scored and all(len(cell.finished) == 1 for cell in scored) and len(scored) > 1:
        found.append(
            "One seed each: a difference is one between these networks; how far other seeds "
            "scatter is not known."
        )
    return found


def _join(runs: Sequence[FoundRun], axes: Sequence[str]) -> tuple[list[Cell], list[str]]:
    cells: dict[Key, list[FoundRun]] = {}
    notes = []
    for run in runs:
        cells.setdefault(_key(run, axes), []).append(run)
    result = []
    for key, members in cells.items():
        members.sort(key=lambda run: (run.config.seed, not run.finished, str(run.run.path)))
        once: dict[int, FoundRun] = {}
        for run in members:
            kept = once.setdefault(run.config.seed, run)
            if kept is not run:
                notes.append(
                    f"{shorten(str(run.run.path), 200)} is the same run as "
                    f"{shorten(str(kept.run.path), 200)} and counts once."
                )
        result.append(Cell(key, list(once.values())))
    orders = [in_order(cell.key[i] for cell in result) for i, _ in enumerate(axes)]
    result.sort(
        key=lambda cell: [order.index(v) for order, v in zip(orders, cell.key, strict=True)]
    )
    return result, notes


def _key(run: FoundRun, axes: Sequence[str]) -> Key:
    return tuple(
        shorten(run.choices[axis], 60)
        if axis in run.choices
        else show_value(run.settings[axis])
        if axis in run.settings
        else MISSING
        for axis in axes
    )


def _group_order(name: str) -> tuple[int, str]:
    fields = [spec.name for spec in dataclasses.fields(RunConfig)]
    group = name.split(".")[0]
    return (fields.index(group) if group in fields else len(fields), name)


def _check_files(run: RunDir) -> None:
    """RunFailed if a file is none (a pipe would never end), or larger than any of ours."""
    for name, largest in LARGEST.items():
        try:
            found = (run.path / name).stat()
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(found.st_mode):
            raise RunFailed(f"{name} is no regular file")
        if found.st_size > largest:
            raise RunFailed(f"{name} has {found.st_size:,} bytes, more than any run's")


def _checked(summary: RunSummary, run: RunDir) -> RunSummary:
    """Return the summary without what is not finite; RunFailed if a value is of a wrong kind."""
    hints = _summary_hints()
    values = {}
    for name in ("status", "seed", "device", "precision", "protocol", "test_size", "error"):
        values[name] = getattr(summary, name)
    numbers = [n for n, hint in hints.items() if hint in (float | None, int | None, float, int)]
    for name in numbers:
        value = getattr(summary, name)
        if isinstance(value, float) and not math.isfinite(value):
            value = 0.0 if hints[name] in (float, int) else None
        values[name] = value
    values["device_name"], values["warnings"] = summary.device_name, summary.warnings
    values["choices"], values["scored_weights"] = summary.choices, summary.scored_weights
    try:
        checked = {n: convert(hints[n], value, n) for n, value in values.items()}
    except RequestError as error:
        raise RunFailed(f"summary.json is damaged: {error}") from None
    return dataclasses.replace(summary, **checked)


def _identity(value: Any) -> Any:
    """Return a config as plain values, without the fields that do not make it another run."""
    if not dataclasses.is_dataclass(value):
        return config_module.to_plain(value)
    return {
        spec.name: _identity(getattr(value, spec.name))
        for spec in dataclasses.fields(value)
        if spec.metadata.get("identity", True)
    }


@functools.cache
def _summary_hints() -> dict[str, Any]:
    return typing.get_type_hints(RunSummary)


def _reason(error: BaseException, run: RunDir) -> str:
    text = str(error) or type(error).__name__
    for path in (run.config_file, run.summary_file, run.metrics_file, run.path):
        text = text.replace(f"{path}", path.name)
    return shorten(text, 300)


def _linked(folder: Path) -> list[str]:
    """Name the links to folders below `folder`: they are not followed."""
    notes = []
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and path.is_dir():
            notes.append(f"{shorten(path.name, 200)} is a link to a folder and was not followed.")
    return notes
