"""How long runs take, as finished ones did or as a probe measures; `plan=true` shows it."""

import contextlib
import dataclasses
import heapq
import json
import time
from collections.abc import Sequence

from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import RunFailed, UsageError
from cifar_lab.runs.run_dir import find_runs
from cifar_lab.runs.text import align, duration
from cifar_lab.sweeps.cell import DONE, Cell, short_names
from cifar_lab.training import device
from cifar_lab.training.build import build_state
from cifar_lab.training.data import load_splits
from cifar_lab.training.loop import fit
from cifar_lab.training.preflight import on_this_machine

_PROBE_STEPS, _PROBE_SECONDS = 12, 4.0  # whichever is over first


class Pace:
    """Wall clock seconds of runs, learnt from finished ones and probes.

    A run is timed by its finished siblings of the same model, dataset, optimizer, augmentation,
    device, precision and batch size.
    """

    def __init__(self) -> None:
        self._known: dict[str, list[tuple[float, float]]] = {}

    def learn(self, cell: Cell) -> None:
        """Note what a finished cell took."""
        with contextlib.suppress(UsageError, RunFailed):
            summary = cell.summary()
            if summary and summary.status == "finished" and summary.epoch_seconds is not None:
                self.note(cell.config, summary.epoch_seconds, summary.overhead_seconds or 0.0)

    def learn_running(self, cell: Cell) -> None:
        """Note how long the epochs of a run that goes on take."""
        with contextlib.suppress(UsageError, RunFailed):
            if rows := cell.run.read_metrics():
                self.note(cell.config, sum(row.seconds for row in rows) / len(rows), 0.0)

    def note(self, config: RunConfig, epoch_seconds: float, overhead_seconds: float) -> None:
        """Note seconds per epoch, and those before the first and after the last."""
        self._known.setdefault(_kind(config), []).append((epoch_seconds, overhead_seconds))

    def seconds(self, config: RunConfig, epochs_done: int = 0) -> float | None:
        """Return what a run still takes if it does not stop early; None if nothing is known."""
        if not (known := self._known.get(_kind(config))):
            return None
        left = max(config.training.epochs - epochs_done, 0)
        return sum(left * epoch + overhead for epoch, overhead in known) / len(known)

    def time_left(self, cells: Sequence[Cell], jobs: int, *, rerun: bool = False) -> float | None:
        """Return the seconds until all cells are done, `jobs` at a time; None without any pace.

        Kinds of which nothing is known yet count as the mean of the others.
        """
        times = [self.seconds(c.config, 0 if rerun else c.epochs_done()) for c in cells]
        known = [seconds for seconds in times if seconds is not None]
        if not known:
            return None
        mean = sum(known) / len(known)
        slots = [0.0] * max(jobs, 1)
        for seconds in times:
            heapq.heappush(slots, heapq.heappop(slots) + (mean if seconds is None else seconds))
        return max(slots)


def plan(cells: Sequence[Cell], jobs: int, *, rerun: bool = False, with_times: bool = True) -> str:
    """Return what would run: cells, states, the time left of each and of all; run nothing.

    Without `with_times` there are no times, and so nothing is read or measured for them.
    """
    states = [cell.state() for cell in cells]
    wanted = [rerun or state not in DONE for state in states]
    to_run = [cell for cell, needed in zip(cells, wanted, strict=True) if needed]
    pace, source = _timed(to_run, beside=cells) if with_times else (Pace(), "")
    rows = [[*short_names(list(cells[0].axes)), "state", *["time left"] * with_times, "folder"]]
    for cell, state, needed in zip(cells, states, wanted, strict=True):
        left = pace.seconds(cell.config, 0 if rerun else cell.epochs_done()) if needed else None
        time_left = [duration(left) if left is not None else "-"] * with_times
        rows.append([*cell.axes.values(), state, *time_left, str(cell.run.path)])
    closing = f"{len(to_run)} of {len(cells)} cells to run"
    total = pace.time_left(to_run, jobs, rerun=rerun)
    if total is not None:
        at_a_time = min(jobs, len(to_run))
        closing += f", {at_a_time} at a time: about {duration(total)}, as timed by {source}"
    return "\n".join([*align(rows), f"{closing}; nothing was run"])


def _timed(cells: Sequence[Cell], *, beside: Sequence[Cell]) -> tuple[Pace, str]:
    """Return the pace of cells, and as text what it was learnt from.

    Finished runs of the same kind, among the cells `beside` and in their folders, count; a kind
    without any is probed, once for all of its cells.
    """
    pace, known = Pace(), {cell.run.path for cell in beside}
    for cell in beside:
        pace.learn(cell)
    for folder in {path.parent for path in known}:
        for run in find_runs(folder) if folder.is_dir() else ():
            if run.path not in known:
                with contextlib.suppress(UsageError, RunFailed):
                    pace.learn(Cell(run, run.read_config(), {}, ""))
    unknown = [cell for cell in cells if pace.seconds(cell.config) is None]
    for cell in unknown:
        if pace.seconds(cell.config) is None:
            with contextlib.suppress(UsageError):  # a GPU that only the nodes of a cluster have
                pace.note(cell.config, *probe(on_this_machine(cell.config)))
    sources = ["a probe"] * bool(unknown) + ["finished runs"] * (len(unknown) < len(cells))
    return pace, " and ".join(sources)


def probe(config: RunConfig) -> tuple[float, float]:
    """Time some training steps; write nothing. Return seconds per epoch, and around the epochs.

    An image that is scored counts a third of one that is trained on, whose backward pass costs
    about as much as two forward passes. To measure it would take most of the probe's memory.
    """
    device.configure(config.device, config.threads, config.deterministic)
    started = time.perf_counter()
    splits = load_splits(config, config.device)
    state, batches = build_state(config, splits, config.device)
    loading = time.perf_counter() - started
    marks = [time.perf_counter()]
    for progress in fit(
        state, batches, None, dataclasses.replace(config.training, epochs=1, print_every=1)
    ):
        device.wait_for(state.device)
        marks.append(time.perf_counter())
        is_long = marks[-1] - marks[0] > _PROBE_SECONDS
        if is_long or len(marks) > _PROBE_STEPS or progress.step == progress.steps:
            break
    steps = marks[1:] if len(marks) > 2 else marks  # the first one warms up
    step_seconds = (steps[-1] - steps[0]) / (len(steps) - 1)
    scoring = step_seconds / config.training.batch_size / 3
    validation = len(splits.validation) if splits.validation else 0
    watched = len(splits.test) if config.evaluation.watch_test else 0
    scored = len(splits.test) * (1 if config.evaluation.scored_weights == "last" else 2)
    epoch_seconds = len(batches) * step_seconds + (validation + watched) * scoring
    return epoch_seconds, loading + (scored + validation) * scoring


def _kind(config: RunConfig) -> str:
    """Return what decides how long an epoch takes."""
    parts = [
        *(config.model, config.dataset.name, config.dataset.image_shape),
        *(config.device.split(":")[0], config.precision, config.threads),
        *(config.training.batch_size, config.split.validation, config.evaluation.watch_test),
        *(config.optimizer["_target_"], dataclasses.asdict(config.augmentation)),
    ]
    return json.dumps(parts, sort_keys=True)
