"""A trial of a search: runs that differ in the seed alone, and what the study is told of them."""

import contextlib
import copy
import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

from cifar_lab.analysis.run_metrics import in_words
from cifar_lab.errors import RunFailed, UsageError
from cifar_lab.sweeps.cell import Cell, sweep_cells
from cifar_lab.sweeps.outcome import Outcome

log = logging.getLogger("cifar_lab")

RUNS, OVERRIDES = "runs", "overrides"
"""What a trial notes in the study: the folders of its runs by seed, and its values."""


def with_seeds(cell: Cell, first: int, count: int) -> list[Cell]:
    """Return `count` cells like this one, whose seeds are `first` above its own and so on."""
    config = cell.config
    seeds = range(config.seed + first, config.seed + first + count)
    return sweep_cells([dataclasses.replace(config, seed=seed) for seed in seeds])


def by_seed(cells: Sequence[Cell]) -> dict[str, str]:
    """Return the folder of each cell, by its seed, as a study notes them."""
    return {str(cell.config.seed): str(cell.run.path) for cell in cells}


def is_done(cell: Cell) -> bool:
    """Return whether a run is finished, and its data are still those of then."""
    return cell.state() == "finished" and cell.data_problem() is None


def best_validation(cell: Cell) -> float | None:
    """Return the best value of the score that a run monitors, None if there is none (yet)."""
    summary = None
    with contextlib.suppress(UsageError, RunFailed):
        summary = cell.summary()
    return getattr(summary, f"best_{cell.config.training.monitor}", None)


class Trial:
    """An open trial of a study. Its runs come one after another; its value is their mean.

    A trial of one run is pruned by that run's validation curve. A trial of several is pruned
    between them, by the mean of those that are finished; `goes_on` then tells whether the next one
    is to run, which is `cell`.
    """

    def __init__(self, study: Any, trial: Any, cells: Sequence[Cell], lines: Sequence[str]) -> None:
        self.cells, self.goes_on = cells, True
        self._study, self._trial = study, trial
        self._monitor = cells[0].config.training.monitor
        self._values: list[float] = []
        self._is_pruned = False
        self._told = dict(self._frozen().intermediate_values)
        notes = {OVERRIDES: list(lines), RUNS: by_seed(cells)}
        for key, note in notes.items():
            if trial.user_attrs.get(key) != note:
                trial.set_user_attr(key, note)

    @property
    def cell(self) -> Cell:
        """The run that is going on or comes next."""
        return self.cells[len(self._values)]

    @property
    def runs_left(self) -> int:
        """How many runs are not finished."""
        return len(self.cells) - len(self._values)

    def is_behind(self, warmup_epochs: int) -> bool:
        """Hand new epochs of the run to the pruner; return whether it ends the trial."""
        if len(self.cells) == 1:
            epoch = self._report_epochs()
            may_stop = warmup_epochs <= epoch < self.cell.config.training.epochs
            self._is_pruned |= bool(epoch and may_stop and self._trial.should_prune())
        return self._is_pruned

    def ended(self, outcome: Outcome) -> Outcome:
        """Tell the study how a run ended; a trial that was interrupted stays open in it."""
        import optuna

        self.goes_on = False
        if len(self.cells) == 1:
            self._report_epochs()
        value = best_validation(outcome.cell)
        with _told_once():
            if outcome.after == "finished" and value is not None:
                self._values.append(value)
                self._finish_or_go_on()
            elif self._is_pruned and outcome.after == "interrupted":
                self._study.tell(self._trial, state=optuna.trial.TrialState.PRUNED)
                return dataclasses.replace(outcome, after="pruned", code=0, error=None)
            elif outcome.after in ("failed", "damaged", "finished") or outcome.code in (1, 2):
                fail(self._study, self._trial)
        return outcome

    def _finish_or_go_on(self) -> None:
        import optuna

        done, mean = len(self._values), math.fsum(self._values) / len(self._values)
        if len(self.cells) > 1:
            self._report(done, mean)
        if done == len(self.cells):
            self._study.tell(self._trial, mean)
        elif self._is_behind_others(done, mean):
            log.info(
                "trial %d is pruned after %d of %d seeds: their mean %s is %.4f",
                *(self._trial.number, done, len(self.cells), in_words(self._monitor), mean),
            )
            self._study.tell(self._trial, state=optuna.trial.TrialState.PRUNED)
        else:
            self.goes_on = True

    def _is_behind_others(self, done: int, mean: float) -> bool:
        """Ask the pruner by the mean of all finished runs, where it would take the best mean."""
        frozen = copy.copy(self._frozen())
        frozen.intermediate_values = {done: mean}
        return bool(self._study.pruner.prune(self._study, frozen))

    def _frozen(self) -> Any:
        """Return what the study knows of the trial."""
        return self._study.get_trials(deepcopy=False)[self._trial.number]

    def _report_epochs(self) -> int:
        """Hand new validation scores to the study; return the last epoch, 0 if none is new."""
        try:
            rows = self.cells[0].run.read_metrics()
        except RunFailed:
            return 0
        new = [row for row in rows if row.epoch not in self._told]
        for row in new:
            value = getattr(row, self._monitor)
            if value is not None:
                self._report(row.epoch, value)
        return len(rows) if new else 0

    def _report(self, step: int, value: float) -> None:
        if step not in self._told:
            self._trial.report(value, step)
            self._told[step] = value


def fail(study: Any, trial: Any) -> None:
    """Tell the study that a trial has no value."""
    import optuna

    with _told_once():
        study.tell(trial, state=optuna.trial.TrialState.FAIL)


@contextlib.contextmanager
def _told_once() -> Iterator[None]:
    """Ignore that another search on the same study has told a trial's end before."""
    from optuna.exceptions import UpdateFinishedTrialError

    with contextlib.suppress(UpdateFinishedTrialError):
        yield
