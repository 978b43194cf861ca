"""A study of Optuna in its journal file, and its trials: asked, followed, told how they ended."""

import contextlib
import copy
import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cifar_lab.analysis.run_metrics import in_words, show
from cifar_lab.config.launch import Dimension, SearchOptions
from cifar_lab.errors import Damaged, RunFailed, UsageError, first_line, log, missing_extra
from cifar_lab.sweeps.cell import Cell
from cifar_lab.sweeps.outcome import Outcome

RUNS, OVERRIDES, REPEATS = "runs", "overrides", "repeats"
"""What a trial notes: the folders of its runs by seed, its values, the trial that it repeats."""

_BEGUN = "begun_with"


def open_study(options: SearchOptions, folder: Path, monitor: str) -> Any:
    """Return the study of a journal file, made where there is none; Damaged if it is not whole.

    It minimizes the score that the runs `monitor` if it is a loss, and maximizes it if not. Raises
    UsageError where it was begun with another score or number of seeds.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise missing_extra("search=optuna", "Optuna", "search") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruners = {"median": "MedianPruner", "hyperband": "HyperbandPruner", "none": "NopPruner"}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{options.study}.journal"
    if path.is_symlink():  # in a stranger's folder it could lead to any file
        raise Damaged(f"{path} is not a file of its own; choose another search.study")
    if path.exists():
        _repair(path)
    try:
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path))),
            study_name=options.study,
            direction="minimize" if monitor == "val_loss" else "maximize",
            pruner=getattr(optuna.pruners, pruners[options.pruner])(),
            load_if_exists=True,
        )
        asked = {"search.seeds": options.seeds, "training.monitor": monitor}
        if _BEGUN not in study.user_attrs:
            study.set_user_attr(_BEGUN, asked)
        begun = study.user_attrs[_BEGUN]
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise Damaged(
            f"{path} is damaged: {first_line(error)}; move it away or choose another search.study "
            "(the runs of its trials stay as they are)"
        ) from None
    for key, value in asked.items():
        if begun[key] != value:
            raise _begun_with(options, f"{key}={begun[key]}, which cannot become {value}")
    return study


def _repair(path: Path) -> None:
    """Remove a last line that was cut short, to which Optuna would append the next one."""
    from optuna.storages.journal import JournalFileSymlinkLock

    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()  # another search may be writing
    try:
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
            log.warning("warning: the last line of %s was cut short and was removed", path)
    finally:
        lock.release()


def counted(study: Any) -> list[Any]:
    """Return the trials of a study but for those that repeat another one."""
    return [t for t in study.get_trials(deepcopy=False) if REPEATS not in t.user_attrs]


def _begun_with(options: SearchOptions, before: str) -> UsageError:
    return UsageError(
        f"search.study={options.study} was begun with {before}: choose another search.study"
    )


def suggest(
    study: Any, trial: Any, space: Sequence[Dimension], options: SearchOptions
) -> dict[str, str]:
    """Return the values of a trial as one types them; those that it does not have yet are drawn.

    Each is drawn by a sampler of its own, seeded by search.seed, the trial's number and the axis,
    so that a search that was killed at any moment tries what an undisturbed one would have tried.
    Raises UsageError if the study was begun with other choices.
    """
    import optuna

    samplers = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    values = {}
    for axis, dimension in enumerate(space):
        sequence = np.random.SeedSequence([options.seed, trial.number, axis])
        study.sampler = samplers[options.sampler](seed=int(sequence.generate_state(1)[0]))
        try:
            value = _drawn(trial, dimension)
        except ValueError:  # Optuna's words for it are "dynamic value space"
            raise _begun_with(options, f"other values of {dimension.key}") from None
        values[dimension.key] = repr(value) if isinstance(value, float) else str(value)
    return values


def _drawn(trial: Any, dimension: Dimension) -> object:
    key, low, high = dimension.key, dimension.low, dimension.high
    step = None if dimension.log else dimension.step
    if dimension.choices:
        return trial.suggest_categorical(key, list(dimension.choices))
    if dimension.whole:
        return trial.suggest_int(key, int(low), int(high), step=int(step or 1), log=dimension.log)
    return trial.suggest_float(key, low, high, step=step, log=dimension.log)


def open_trials(study: Any) -> list[Any]:
    """Return the trials that an earlier search left open, as `ask` returned them then.

    Optuna has no public name for a trial's id; tests/test_search.py says when this one breaks.
    """
    from optuna.trial import Trial as OptunaTrial
    from optuna.trial import TrialState

    running = study.get_trials(states=[TrialState.RUNNING])
    return [OptunaTrial(study, frozen._trial_id) for frozen in running]


def tell(study: Any, trial: Any, value: float | None = None, *, state: str = "COMPLETE") -> None:
    """Tell the study how a trial ended, unless another search on the same study has done so."""
    from optuna.trial import TrialState

    study.tell(trial, value, state=TrialState[state], skip_if_finished=True)


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
        folders = {str(cell.config.seed): str(cell.run.path) for cell in cells}
        for key, noted in {OVERRIDES: list(lines), RUNS: folders}.items():
            if trial.user_attrs.get(key) != noted:
                trial.set_user_attr(key, noted)

    @property
    def cell(self) -> Cell:
        """The run that is going on or comes next."""
        return self.cells[len(self._values)]

    @property
    def left(self) -> int:
        """How many runs have no value yet, the one that is going on included."""
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
        summary = outcome.cell.summary() if outcome.after == "finished" else None
        value = getattr(summary, f"best_{self._monitor}", None)
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
        # The pruner would take the best mean so far, and is asked by that of all finished runs.
        frozen = copy.copy(self._frozen())
        frozen.intermediate_values = {done: mean}
        if done == len(self.cells):
            tell(self._study, self._trial, mean)
        elif self._study.pruner.prune(self._study, frozen):
            log.info(
                "trial %d is pruned after %d of %d seeds: their mean %s is %s",
                *(self._trial.number, done, len(self.cells), in_words(self._monitor)),
                show(f"best_{self._monitor}", mean),
            )
            tell(self._study, self._trial, state="PRUNED")
        else:
            self.goes_on = True

    def _frozen(self) -> Any:
        """Return what the study knows of the trial."""
        return self._study.get_trials(deepcopy=False)[self._trial.number]

    def _report_epochs(self) -> int:
        """Hand new validation scores to the study; return the last epoch, 0 if none is new."""
        with contextlib.suppress(RunFailed):
            rows = self.cells[0].run.read_metrics()
            return self._report({row.epoch: getattr(row, self._monitor) for row in rows})
        return 0

    def _report(self, values: dict[int, float | None]) -> int:
        """Report values that the study does not have yet; return the last new step, or 0."""
        told = self._frozen().intermediate_values
        new = {k: v for k, v in values.items() if v is not None and k not in told}
        for step, value in new.items():
            self._trial.report(value, step)
        return max(new, default=0)
