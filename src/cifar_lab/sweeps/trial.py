"""A trial of a search: runs that differ in the seed alone, and what the study is told of them."""

import contextlib
import copy
import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

from cifar_lab.analysis.run_metrics import in_words
from cifar_lab.errors import RunFailed
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
        for key, noted in {OVERRIDES: list(lines), RUNS: by_seed(cells)}.items():
            if trial.user_attrs.get(key) != noted:
                trial.set_user_attr(key, noted)

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
        if len(self.cells) == 1 and (epoch := self._report_epochs()):
            may_stop = warmup_epochs <= epoch < self.cell.config.training.epochs
            self._is_pruned |= may_stop and self._trial.should_prune()
        return self._is_pruned

    def ended(self, outcome: Outcome) -> Outcome:
        """Tell the study how a run ended; a trial that was interrupted stays open in it."""
        self.goes_on = False
        if len(self.cells) == 1:
            self._report_epochs()
        value = None
        if outcome.after == "finished" and (summary := outcome.cell.summary()) is not None:
            value = getattr(summary, f"best_{self._monitor}")
        if value is not None:
            self._values.append(value)
            self._finish_or_go_on()
        elif self._is_pruned and outcome.after == "interrupted":
            tell(self._study, self._trial, state="PRUNED")
            return dataclasses.replace(outcome, after="pruned", code=0, error=None)
        elif outcome.after in ("failed", "damaged", "finished") or outcome.code in (1, 2):
            tell(self._study, self._trial, state="FAIL")
        return outcome

    def _finish_or_go_on(self) -> None:
        done, mean = len(self._values), math.fsum(self._values) / len(self._values)
        if len(self.cells) > 1:
            self._report({done: mean})
        if done == len(self.cells):
            tell(self._study, self._trial, mean)
        elif self._is_behind_others(done, mean):
            log.info(
                "trial %d is pruned after %d of %d seeds: their mean %s is %.4f",
                *(self._trial.number, done, len(self.cells), in_words(self._monitor), mean),
            )
            tell(self._study, self._trial, state="PRUNED")
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
        with contextlib.suppress(RunFailed):
            rows = self.cells[0].run.read_metrics()
            scores = {row.epoch: getattr(row, self._monitor) for row in rows}
            if self._report({k: value for k, value in scores.items() if value is not None}):
                return len(rows)
        return 0

    def _report(self, values: dict[int, float]) -> bool:
        """Report values that the study does not have yet; return whether there were any."""
        told = self._frozen().intermediate_values
        new = {step: value for step, value in values.items() if step not in told}
        for step, value in new.items():
            self._trial.report(value, step)
        return bool(new)


def tell(study: Any, trial: Any, value: float | None = None, *, state: str = "COMPLETE") -> None:
    """Tell the study how a trial ended, unless another search on the same study has done so."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    with contextlib.suppress(UpdateFinishedTrialError):
        study.tell(trial, value, state=TrialState[state])
