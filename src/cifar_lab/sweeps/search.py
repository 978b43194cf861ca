"""A search instead of a grid: Optuna chooses the values, each trial is one or several run folders.

The study lives in a journal file: a search that was stopped or killed goes on by the same line, and
several lines may work on one study. Nothing is chosen on the test set: the best value of the score
that `training.monitor` names counts, and its mean where a trial has several seeds.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cifar_lab.config.launch import SearchOptions
from cifar_lab.config.request import Request
from cifar_lab.errors import UsageError
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.sweeps.cell import Cell
from cifar_lab.sweeps.launcher import Job
from cifar_lab.sweeps.outcome import Outcome
from cifar_lab.sweeps.pool import PATIENCE_SECONDS, Source, fill_slots, make_launcher
from cifar_lab.sweeps.study import (
    CONFIRMED,
    check_study,
    distributions,
    open_study,
    open_trials,
    suggest,
)
from cifar_lab.sweeps.timing import Pace
from cifar_lab.sweeps.trial import OVERRIDES, RUNS, Trial, by_seed, is_done, tell, with_seeds
from cifar_lab.training.signals import Stop

log = logging.getLogger("cifar_lab")

_DETACHED_JOBS = 4  # trials at a time in a cluster's queue; all at once, none would learn

CellOf = Callable[[Sequence[str]], Cell]
"""Turns the overrides of a trial into its first cell."""


def run_search(request: Request, cell_of: CellOf, folder: Path, *, stop: Stop) -> list[Outcome]:
    """Run trials until the study has `search.trials`; return the runs of now, as they ended.

    `folder` holds the study's journal.
    """
    options, wanted = request.options, request.options.search
    where = make_launcher(request.launcher, options)
    space = distributions(request.space)
    example = cell_of([f"{d.key}={d.samples[0]}" for d in request.space])
    monitor = example.config.training.monitor
    study = open_study(wanted, folder, monitor)
    check_study(study, space, wanted, monitor)
    slots = where.prepare([example.config] * max(wanted.trials, wanted.confirm))
    if where.is_detached:
        slots = min(slots, _DETACHED_JOBS if options.jobs == "auto" else options.jobs)
    done = sum(trial.state.is_finished() for trial in study.trials)
    log.info("study %s: %d of %d trials done", wanted.study, done, wanted.trials)
    search = _Search(study, space, cell_of, wanted, example)
    search.reopen(where.is_free)
    return fill_slots(search, where, slots, stop=stop, pace=Pace())


class _Search(Source):
    """The runs of a study's trials: those that an earlier search left open, then new ones.

    After the last trial come the runs of the best setting with fresh seeds.
    """

    def __init__(
        self,
        study: Any,
        space: dict[str, Any],
        cell_of: CellOf,
        options: SearchOptions,
        example: Cell,
    ) -> None:
        self.total = options.trials * options.seeds + options.confirm
        self._study, self._space, self._cell_of = study, space, cell_of
        self._options, self._example = options, example
        self._open: list[Trial] = []
        self._running: dict[Path, Trial | None] = {}
        self._confirming: list[Cell] | None = None

    def reopen(self, is_free: Callable[[Cell], bool]) -> None:
        """Take up the trials that an earlier search left open and whose folders are free.

        The runs of a search that was killed a moment ago are given time to save and end.
        """

        def is_idle(trial: Trial) -> bool:
            return all(is_free(cell) for cell in trial.cells)

        opened = map(self._opened, open_trials(self._study))
        trials = [trial for trial in opened if trial is not None]
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not all(map(is_idle, trials)) and time.monotonic() < deadline:
            time.sleep(0.2)
        self._open = [trial for trial in trials if is_idle(trial)]

    def waiting(self) -> Sequence[Cell]:
        # What the trials to come will try is not known yet.
        if not self._has_trials() and not self._running:
            return self._fresh()
        begun = sum(trial.runs_left for trial in self._open)
        begun += sum(trial.runs_left - 1 for trial in self._running.values() if trial)
        new = self._new_trials() * self._options.seeds
        return [self._example] * (begun + new + self._options.confirm)

    def take(self, is_free: Callable[[Cell], bool], *, idle: bool) -> Cell | None:
        while self._has_trials():
            trial = self._open.pop(0) if self._open else self._opened(self._study.ask())
            if trial is None:
                continue
            cell = trial.cell
            if cell.run.path in self._running:  # the same values as a trial that is running
                self._open.append(trial)
                return None
            if is_done(cell):
                self._end(trial, Outcome(cell, "finished", "finished"))
                continue
            return self._started(cell, trial)
        fresh = self._fresh() if not any(self._running.values()) else []
        return self._started(fresh.pop(0), None) if fresh else None

    def is_behind(self, job: Job) -> bool:
        trial = self._running[job.cell.run.path]
        return trial is not None and trial.is_behind(self._options.warmup_epochs)

    def ended(self, outcome: Outcome) -> Outcome:
        trial = self._running.pop(outcome.cell.run.path)
        return outcome if trial is None else self._end(trial, outcome)

    def _end(self, trial: Trial, outcome: Outcome) -> Outcome:
        outcome = trial.ended(outcome)
        if trial.goes_on:
            self._open.insert(0, trial)
        return outcome

    def _started(self, cell: Cell, trial: Trial | None) -> Cell:
        if cell.state() in ("new", "queued"):
            RunDir.create(cell.config)
        self._running[cell.run.path] = trial
        return cell

    def _has_trials(self) -> bool:
        return bool(self._open or self._new_trials())

    def _new_trials(self) -> int:
        return max(0, self._options.trials - len(self._study.get_trials(deepcopy=False)))

    def _opened(self, trial: Any) -> Trial | None:
        """Return a trial with its values and cells, None if its values are no run."""
        values = suggest(self._study, trial, self._space, self._options)
        lines = [f"{key}={value}" for key, value in values.items()]
        try:
            cells = with_seeds(self._cell_of(lines), 0, self._options.seeds)
        except UsageError as error:
            log.warning("trial %d is refused: %s", trial.number, error)
            tell(self._study, trial, state="FAIL")
            return None
        return Trial(self._study, trial, cells, lines)

    def _fresh(self) -> list[Cell]:
        """Return the runs that are to confirm the best setting; none while a trial is open."""
        if self._confirming is None:
            self._confirming = self._to_confirm() if self._options.confirm else []
        return self._confirming

    def _to_confirm(self) -> list[Cell]:
        states = [trial.state.name for trial in self._study.get_trials(deepcopy=False)]
        if "RUNNING" in states or "COMPLETE" not in states:
            return []
        best = self._study.best_trial
        first = self._cell_of(best.user_attrs[OVERRIDES])
        cells = with_seeds(first, self._options.seeds, self._options.confirm)
        self._study.set_user_attr(CONFIRMED, {"trial": best.number, RUNS: by_seed(cells)})
        return [cell for cell in cells if not is_done(cell)]
