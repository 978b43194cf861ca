"""What became of the cells of a sweep, and how long those take that are left.

Live, in the closing table, as the command's exit code; `plan=true` shows the times before. They are
those of finished runs, or what a probe measures.
"""

import contextlib
import heapq
import json
import os
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cifar_lab.analysis import run_metrics
from cifar_lab.analysis.grouping import collect
from cifar_lab.analysis.load_runs import FoundRun
from cifar_lab.analysis.ranking import rank
from cifar_lab.analysis.seed_groups import short_names
from cifar_lab.analysis.texts import conclusion
from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import RunFailed, Stopped, Unavailable, UsageError, log, shorten
from cifar_lab.runs.run_dir import find_runs
from cifar_lab.runs.text import align, duration
from cifar_lab.sweeps.cell import DONE, STOPPED, Cell
from cifar_lab.training import device
from cifar_lab.training.build import build_state, load_splits
from cifar_lab.training.console import new_bar
from cifar_lab.training.loop import Stop, fit
from cifar_lab.training.preflight import on_this_machine

_PROBE_STEPS, _PROBE_SECONDS = 12, 4.0  # whichever is over first


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: its state before and after, wall clock seconds, exit code, error."""

    cell: Cell
    before: str
    after: str
    seconds: float = 0.0
    code: int = 0
    error: str | None = None

    @property
    def has_failed(self) -> bool:
        """Whether the run failed, as opposed to being stopped or unavailable now."""
        return self.code not in (0, 3, *STOPPED)


class Pace:
    """Wall clock seconds of runs, learnt from finished ones and probes.

    A run is timed by its finished siblings of the same model, dataset, optimizer, augmentation,
    device, precision and batch size.
    """

    def __init__(self) -> None:
        self._known: dict[str, list[tuple[float, float]]] = {}

    def learn(self, cell: Cell) -> None:
        """Note what a finished cell took, or the epochs so far of one that goes on."""
        with contextlib.suppress(UsageError, RunFailed):
            summary = cell.summary()
            if summary and summary.status == "finished" and summary.epoch_seconds is not None:
                self.note(cell.config, summary.epoch_seconds, summary.overhead_seconds or 0.0)
            elif summary and summary.status == "running" and (rows := cell.run.read_metrics()):
                self.note(cell.config, sum(row.seconds for row in rows) / len(rows), 0.0)

    def note(self, config: RunConfig, epoch_seconds: float, overhead_seconds: float) -> None:
        """Note seconds per epoch, and those before the first and after the last."""
        self._known.setdefault(_kind(config), []).append((epoch_seconds, overhead_seconds))

    def seconds(
        self, config: RunConfig, epochs_done: int = 0, others: Sequence[tuple[float, float]] = ()
    ) -> float | None:
        """Return what a run still takes if it does not stop early; None if nothing is known.

        `others` count where nothing is known of its kind.
        """
        left = max(config.training.epochs - epochs_done, 0)
        known = self._known.get(_kind(config), others)
        times = [left * epoch + overhead for epoch, overhead in known]
        return sum(times) / len(times) if times else None

    def time_left(self, cells: Sequence[Cell], jobs: int, *, rerun: bool = False) -> float | None:
        """Return the seconds until all cells are done, `jobs` at a time; None without any pace."""
        every = [times for kind in self._known.values() for times in kind]
        slots = [0.0] * max(jobs, 1)
        for cell in cells if every else ():
            seconds = self.seconds(cell.config, 0 if rerun else cell.epochs_done(), every)
            heapq.heapreplace(slots, slots[0] + (seconds or 0.0))
        return max(slots) if every else None


class LiveLine:
    """How many of `total` cells are done, running and failed, and the time left.

    Without a terminal it is a plain line for each cell that ends.
    """

    def __init__(self, total: int, pace: Pace) -> None:
        self._total, self._pace = total, pace
        self._next, self._failed = 0.0, 0
        self._left: float | None = None  # seconds until all is done
        layout = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}"
        self._bar: Any = new_bar(total=total, desc="cells", bar_format=layout)

    def close(self) -> None:
        """Remove the line."""
        self._bar.close()

    def ended(self, outcome: Outcome, left: int) -> None:
        """Report that a cell has ended, and how many are left; on a terminal only if it failed."""
        self._failed += outcome.has_failed
        self._pace.learn(outcome.cell)
        if self._bar.disable or outcome.code:
            parts, score = [f"{outcome.after} in {duration(outcome.seconds)}"], _score(outcome)
            name = outcome.cell.config.training.monitor.removesuffix("_accuracy").replace("_", " ")
            parts += [f"{name} {score}"] * (score != "–")
            parts += self._time_left() if left else []
            error = f" ({outcome.error})" if outcome.error else ""
            done, folder = self._total - left, outcome.cell.run.path.name
            log.info("[%d/%d] %s: %s%s", done, self._total, folder, ", ".join(parts), error)

    def show(self, running: Sequence[Cell], waiting: Sequence[Cell], slots: int) -> None:
        """Bring the live line up to date, about once a second; tell the time of all cells once.

        It is known from the start where such runs are finished, else after the first epoch.
        """
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 1 + len(waiting) / 1000  # a file of each is looked for
        is_new = self._left is None
        for cell in running if is_new else ():
            self._pace.learn(cell)
        self._left = self._pace.time_left([*running, *waiting], slots)
        if is_new and (time_left := self._time_left()):
            log.info("about %s, if no run stops early", *time_left)
        parts = [f"{len(running)} running, {self._failed} failed", *self._time_left()]
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.update(self._total - len(running) - len(waiting) - self._bar.n)
        self._bar.refresh()

    def _time_left(self) -> list[str]:
        """Return how long all cells still take, in words; nothing if it is less than a second."""
        return [f"{duration(left)} left"] if (left := self._left or 0.0) >= 1 else []


def closing_table(outcomes: Sequence[Outcome]) -> str:
    """Return what became of each cell, what `summarize` says of the best, and that command."""
    names = short_names(list(outcomes[0].cell.axes))
    monitors = {outcome.cell.config.training.monitor.replace("_", " ") for outcome in outcomes}
    monitor = monitors.pop() if len(monitors) == 1 else "score"
    rows = [[*names, "before", "after", monitor, "time", "folder", "error"]]
    finished: list[FoundRun] = []
    for outcome in outcomes:
        cell = outcome.cell
        seconds = duration(outcome.seconds) if outcome.seconds else "-"
        error = shorten((outcome.error or "").replace(f"{cell.run.path}/", ""), 160)
        row = [outcome.before, outcome.after, _score(outcome), seconds, str(cell.run.path), error]
        rows.append([*cell.axes.values(), *row])
        if outcome.after == "finished":
            with contextlib.suppress(UsageError, RunFailed):  # `summarize` names what is damaged
                finished.append(FoundRun(cell.run))
    counts = Counter(outcome.after for outcome in outcomes)
    folder = Path(os.path.commonpath([outcome.cell.run.path.parent for outcome in outcomes]))
    lines = [*align(rows), ", ".join(f"{number} {state}" for state, number in counts.items())]
    rank(collection := collect(folder, finished))
    lines += conclusion(collection)
    lines.append(f"to compare them: python -m cifar_lab.summarize {shlex.quote(str(folder))}")
    return "\n".join(lines)


def _score(outcome: Outcome) -> str:
    """Return the best value of the score that a run monitors, – where there is none."""
    name = f"best_{outcome.cell.config.training.monitor}"
    summary = outcome.cell.summary() if outcome.after != "damaged" else None
    return run_metrics.show(name, getattr(summary, name, None))


def raise_for(outcomes: Sequence[Outcome], stop: Stop) -> None:
    """Raise what the command ends with: Stopped, RunFailed or Unavailable, or nothing."""
    count = len(outcomes)
    if stop.signal is not None:
        raise Stopped(stop.signal, "stopped (the table says how far); the same line goes on")
    if failed := [o for o in outcomes if o.has_failed]:
        raise RunFailed(
            f"{len(failed)} of {count} cells failed (the table says why); the same line tries "
            "them again"
        )
    if left_out := [o for o in outcomes if o.code]:
        raise Unavailable(f"{len(left_out)} of {count} cells were left out: {left_out[0].error}")


def plan(cells: Sequence[Cell], jobs: int, *, rerun: bool = False, with_times: bool = True) -> str:
    """Return what would run: cells, states, the time left of each and of all; run nothing.

    Without `with_times` there are no times, and so nothing is read or measured for them.
    """
    states = [cell.state() for cell in cells]
    to_run = [c for c, state in zip(cells, states, strict=True) if rerun or state not in DONE]
    pace, source = _timed(to_run, beside=cells) if with_times else (Pace(), "")
    rows = [[*short_names(list(cells[0].axes)), "state", *["time left"] * with_times, "folder"]]
    for cell, state in zip(cells, states, strict=True):
        is_to_run = rerun or state not in DONE
        left = pace.seconds(cell.config, 0 if rerun else cell.epochs_done()) if is_to_run else None
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
    for folder in {path.parent for path in known if path.parent.is_dir()}:
        for run in (run for run in find_runs(folder) if run.path not in known):
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
    training = replace(config.training, epochs=1, print_every=1)
    marks = [time.perf_counter()]
    loading = marks[0] - started
    for progress in fit(state, batches, None, training):
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
        *(config.optimizer["_target_"], asdict(config.augmentation)),
    ]
    return json.dumps(parts, sort_keys=True)
