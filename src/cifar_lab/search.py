"""A search instead of a grid: Optuna chooses the values, each trial is an ordinary run folder.

The study lives in a journal file: a search that was stopped or killed goes on by the same line, and
several lines may work on one study. Nothing is chosen on the test set: the best validation accuracy
counts, and the validation curve decides which trials are stopped early.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal

from cifar_lab.door import Dimension, SearchOptions
from cifar_lab.errors import RequestError, RunFailed
from cifar_lab.execute import Stop
from cifar_lab.planning import SweepCell, duration
from cifar_lab.run_dir import RunDir
from cifar_lab.schema import shorten
from cifar_lab.sweep import Outcome, Worker, fitting_jobs, process_context

log = logging.getLogger("cifar_lab")

_FOLDER, _OVERRIDES = "folder", "overrides"  # what a trial notes in the study


def run_search(
    space: Sequence[Dimension],
    cell_of: Callable[[Sequence[str]], SweepCell],
    options: SearchOptions,
    folder: Path,
    *,
    stop: Stop,
    jobs: int | Literal["auto"] = "auto",
    jobs_per_gpu: int = 1,
    accept_code: bool = False,
    trust: Sequence[str] = (),
) -> list[Outcome]:
    """Run trials until the study has `options.trials`; return those that ran now, in their order.

    `cell_of` turns the overrides of a trial into its cell; `folder` holds the study's journal.
    """
    study = _study(options, folder)
    example = cell_of([f"{d.key}={d.samples[0]}" for d in space])
    count, gpus = fitting_jobs([example.config] * options.trials, jobs, jobs_per_gpu)
    free = list(reversed(gpus))
    context = process_context()
    outcomes: list[Outcome] = []
    running: list[_Trial] = []
    abandoned = _abandoned(study)
    log.info("study %s: %d of %d trials done", options.study, _done(study), options.trials)
    with stop.graceful():
        try:
            while running or (stop.signal is None and _wanted(study, options, abandoned)):
                if stop.signal is not None:
                    for trial in running:
                        trial.worker.ask_to_stop()
                elif len(running) < count and _wanted(study, options, abandoned):
                    started = _start(
                        study, abandoned, space, cell_of, context, free, accept_code, trust
                    )
                    if started is not None:
                        running.append(started)
                    continue
                connection.wait([t.worker.process.sentinel for t in running], timeout=0.25)
                for trial in running:
                    trial.report(options.warmup_epochs)
                for trial in [t for t in running if not t.worker.process.is_alive()]:
                    running.remove(trial)
                    free.append(trial.worker.gpu)
                    outcomes.append(trial.close(stopping=stop.signal is not None))
                    _say(outcomes[-1], study)
        finally:
            for trial in running:
                trial.worker.process.kill()
                trial.worker.process.join()
    return outcomes


def closing_lines(options: SearchOptions, folder: Path) -> str:
    """Return the best trial by validation, how many were done."""
    import optuna

    study = _study(options, folder)
    states = [trial.state.name.lower() for trial in study.trials]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    lines = [f"study {options.study}: {len(states)} trials ({counts or 'none'})"]
    complete = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    if complete:
        best = study.best_trial
        values = " ".join(best.user_attrs[_OVERRIDES])
        lines.append(f"best by validation: {best.value:.4f} with {values}")
        lines.append(f"its folder: {best.user_attrs[_FOLDER]}")
    return "\n".join(lines)


class _Trial:
    """A trial of the study and the process of its run."""

    def __init__(
        self, study: Any, trial: Any, cell: SweepCell, worker: Worker, before: str
    ) -> None:
        self.study, self.trial, self.cell, self.worker = study, trial, cell, worker
        self._before, self._pruned = before, False
        self._reported = len(study._storage.get_trial(trial._trial_id).intermediate_values)

    def report(self, warmup_epochs: int) -> None:
        """Hand new validation accuracies to the study; stop the run if they are behind."""
        try:
            rows = self.cell.run.read_metrics()
        except RunFailed:
            return
        for row in rows[self._reported :]:
            if row.val_accuracy is not None:
                self.trial.report(row.val_accuracy, row.epoch)
        news, self._reported = len(rows) > self._reported, max(self._reported, len(rows))
        last = len(rows) >= self.cell.config.training.epochs
        if news and not last and len(rows) >= warmup_epochs and self.trial.should_prune():
            self._pruned = True
            self.worker.ask_to_stop()

    def close(self, *, stopping: bool) -> Outcome:
        """Tell the study how the ended run went; one that was interrupted stays open in it."""
        self.report(self.cell.config.training.epochs)
        outcome = self.worker.outcome(self._before, stopping=stopping or self._pruned)
        return _tell(self.study, self.trial, outcome, pruned=self._pruned)


def _study(options: SearchOptions, folder: Path) -> Any:
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise RequestError("search=optuna needs Optuna: pip install cifar-lab[search]") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{options.study}.journal"
    pruners: dict[str, Any] = {
        "median": optuna.pruners.MedianPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
        "none": optuna.pruners.NopPruner,
    }
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(path))),
        study_name=options.study,
        direction="maximize",
        pruner=pruners[options.pruner](),
        load_if_exists=True,
    )
    # going on, the sampler must not draw again what it drew at first
    seed = (options.seed + len(study.trials)) % 2**32
    study.sampler = (
        optuna.samplers.TPESampler(seed=seed)
        if options.sampler == "tpe"
        else optuna.samplers.RandomSampler(seed=seed)
    )
    return study


def _start(
    study: Any,
    abandoned: list[Any],
    space: Sequence[Dimension],
    cell_of: Callable[[Sequence[str]], SweepCell],
    context: Any,
    free: list[str],
    accept_code: bool,
    trust: Sequence[str],
) -> _Trial | None:
    """Ask for a trial (or take one that an earlier search left) and start its run.

    None if it needs no run: its folder is finished already, or its values were refused.
    """
    trial = abandoned.pop(0) if abandoned else study.ask()
    lines = [f"{d.key}={_suggest(trial, d)}" for d in space]
    try:
        cell = cell_of(lines)
    except RequestError as error:
        log.warning("trial %d is refused: %s", trial.number, error)
        _fail(study, trial)
        return None
    trial.set_user_attr(_FOLDER, str(cell.run.path))
    trial.set_user_attr(_OVERRIDES, lines)
    before = cell.state()
    if before in ("new", "queued"):
        RunDir.create(cell.config)
    if before == "finished":
        _tell(study, trial, Outcome(cell, before, before), pruned=False)
        return None
    worker = Worker(context, cell, free.pop(), (False, accept_code, tuple(trust)))
    return _Trial(study, trial, cell, worker, before)


def _suggest(trial: Any, dimension: Dimension) -> str:
    """Return the value that a trial takes on an axis, as one types it."""
    key, low, high = dimension.key, dimension.low, dimension.high
    if dimension.choices:
        return str(trial.suggest_categorical(key, list(dimension.choices)))
    if dimension.whole:
        step = 1 if dimension.log else int(dimension.step or 1)
        return str(trial.suggest_int(key, int(low), int(high), step=step, log=dimension.log))
    step_size = None if dimension.log else dimension.step
    return repr(trial.suggest_float(key, low, high, step=step_size, log=dimension.log))


def _tell(study: Any, trial: Any, outcome: Outcome, *, pruned: bool) -> Outcome:
    import optuna

    summary = None
    with contextlib.suppress(RequestError, RunFailed):
        summary = outcome.cell.summary()
    value = summary.best_val_accuracy if summary is not None else None
    with _told_once():
        if outcome.after == "finished" and value is not None:
            study.tell(trial, value)
        elif pruned and outcome.after == "interrupted":
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            return Outcome(outcome.cell, outcome.before, "pruned", outcome.seconds)
        elif outcome.after in ("failed", "damaged", "finished") or outcome.code in (1, 2):
            _fail(study, trial)
    return outcome


def _fail(study: Any, trial: Any) -> None:
    import optuna

    study.tell(trial, state=optuna.trial.TrialState.FAIL)


@contextlib.contextmanager
def _told_once() -> Iterator[None]:
    """Let it pass that another search on the same study has told a trial's end before."""
    from optuna.exceptions import UpdateFinishedTrialError

    with contextlib.suppress(UpdateFinishedTrialError):
        yield


def _abandoned(study: Any) -> list[Any]:
    """Return the trials that an earlier search left open and whose folders nobody holds."""
    import optuna

    return [
        optuna.trial.Trial(study, frozen._trial_id)
        for frozen in study.get_trials(states=[optuna.trial.TrialState.RUNNING])
        if _FOLDER in frozen.user_attrs and not RunDir(frozen.user_attrs[_FOLDER]).is_locked()
    ]


def _done(study: Any) -> int:
    return sum(trial.state.is_finished() for trial in study.trials)


def _wanted(study: Any, options: SearchOptions, abandoned: Sequence[Any]) -> bool:
    return bool(abandoned) or len(study.trials) < options.trials


def _say(outcome: Outcome, study: Any) -> None:
    rest = f" ({shorten(outcome.error, 160)})" if outcome.error else ""
    log.info(
        "%s: %s in %s%s; %d trials done",
        outcome.cell.run.path.name,
        outcome.after,
        duration(outcome.seconds),
        rest,
        _done(study),
    )
