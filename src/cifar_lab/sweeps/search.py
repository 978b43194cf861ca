"""A search instead of a grid: Optuna chooses the values, each trial is one or several run folders.

The study lives in a journal file: a search that was stopped or killed goes on by the same line, and
several lines may work on one study. Nothing is chosen on the test set: the best value of the score
that `training.monitor` names counts, and its mean where a trial has several seeds.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cifar_lab.analysis import run_metrics
from cifar_lab.analysis.load_runs import FoundRun
from cifar_lab.analysis.statistics import MIN_VALUES, interval
from cifar_lab.config.launch import SearchOptions
from cifar_lab.config.request import Request
from cifar_lab.errors import RunFailed, UsageError, shorten
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.summary import RunSummary
from cifar_lab.runs.text import align
from cifar_lab.sweeps import study as studies
from cifar_lab.sweeps.cell import Cell, short_names
from cifar_lab.sweeps.launcher import Job, Launcher
from cifar_lab.sweeps.outcome import Outcome
from cifar_lab.sweeps.pool import PATIENCE_SECONDS, Source, fill_slots
from cifar_lab.sweeps.study import CONFIRMED, OVERRIDES, REPEATS, RUNS, Trial
from cifar_lab.sweeps.timing import Pace
from cifar_lab.training.signals import Stop

log = logging.getLogger("cifar_lab")

_DETACHED_JOBS = 4  # trials at a time in a cluster's queue; all at once, none would learn
_MOST_REPEATS = 50  # in a row, after which the sampler is taken to have nothing new
_MOST_SHOWN = 20  # trials

CellOf = Callable[[Sequence[str]], Cell]
"""Turns the overrides of a trial into its first cell."""


def run_search(
    request: Request, cell_of: CellOf, folder: Path, where: Launcher, *, stop: Stop
) -> list[Outcome]:
    """Run trials until the study has `search.trials`; return the runs of now, as they ended.

    `folder` holds the study's journal.
    """
    wanted = request.options.search
    example = cell_of([f"{d.key}={d.samples[0]}" for d in request.space])
    monitor = example.config.training.monitor
    study = studies.open_study(wanted, folder, monitor)
    studies.check_study(study, wanted, monitor)
    slots = where.prepare([example.config] * max(wanted.trials, wanted.confirm))
    if where.is_detached:
        jobs = request.options.jobs
        slots = min(slots, _DETACHED_JOBS if jobs == "auto" else jobs)
    done = sum(trial.state.is_finished() for trial in studies.counted(study))
    log.info("study %s: %d of %d trials done", wanted.study, done, wanted.trials)
    search = _Search(study, request, cell_of, example)
    search.reopen(where.is_free)
    return fill_slots(search, where, slots, stop=stop, pace=Pace())


class _Search(Source):
    """The runs of a study's trials: those that an earlier search left open, then new ones.

    After the last trial come the runs of the best setting with fresh seeds.
    """

    def __init__(self, study: Any, request: Request, cell_of: CellOf, example: Cell) -> None:
        self._study, self._space, self._cell_of = study, request.space, cell_of
        self._options, self._example = request.options.search, example
        self.total = self._options.trials * self._options.seeds + self._options.confirm
        self._open: list[Trial] = []
        self._running: dict[Path, Trial | None] = {}
        self._repeats = 0
        self._confirming: list[Cell] | None = None

    def reopen(self, is_free: Callable[[Cell], bool]) -> None:
        """Take up the trials that an earlier search left open and whose folders are free.

        The runs of a search that was killed a moment ago are given time to save and end.
        """

        def is_idle(trial: Trial) -> bool:
            return all(is_free(cell) for cell in trial.cells)

        opened = map(self._opened, studies.open_trials(self._study))
        trials = [trial for trial in opened if trial is not None]
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not all(map(is_idle, trials)) and time.monotonic() < deadline:
            time.sleep(0.2)
        self._open = [trial for trial in trials if is_idle(trial)]

    def waiting(self) -> Sequence[Cell]:
        # What the trials to come will try is not known yet.
        if not self._has_trials() and not self._running:
            return self._fresh()
        trials = len(self._open) + self._new_trials()
        return [self._example] * (trials * self._options.seeds + self._options.confirm)

    def take(self, is_free: Callable[[Cell], bool], *, idle: bool) -> Cell | None:
        while self._has_trials():
            trial = self._open.pop(0) if self._open else self._opened(self._study.ask())
            if trial is not None and _is_done(trial.cell):
                self._end(trial, Outcome(trial.cell, "finished", "finished"))
            elif trial is not None and trial.cell.run.path in self._running:
                self._open.append(trial)  # its values differ and mean the same
                return None
            elif trial is not None:
                return self._started(trial.cell, trial)
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
        if self._repeats == _MOST_REPEATS:
            return 0
        return max(0, self._options.trials - len(studies.counted(self._study)))

    def _opened(self, trial: Any) -> Trial | None:
        """Return a trial with its values and cells, None if it repeats another or is no run."""
        values = studies.suggest(self._study, trial, self._space, self._options)
        lines = [f"{key}={value}" for key, value in values.items()]
        if self._is_repeated(trial):
            return None
        try:
            cells = studies.with_seeds(self._cell_of(lines), 0, self._options.seeds)
        except UsageError as error:
            log.warning("trial %d is refused: %s", trial.number, error)
            studies.tell(self._study, trial, state="FAIL")
            return None
        return Trial(self._study, trial, cells, lines)

    def _is_repeated(self, trial: Any) -> bool:
        """Return whether a trial has the values of an earlier one, whose result is then its own.

        It does not count, so that a search of four settings and twenty trials tries all four.
        """
        for earlier in self._study.get_trials(deepcopy=False)[: trial.number]:
            state = earlier.state.name
            if earlier.params == trial.params and state != "FAIL":
                trial.set_user_attr(REPEATS, earlier.number)
                value = earlier.value if state == "COMPLETE" else None
                state = "FAIL" if state == "RUNNING" else state
                studies.tell(self._study, trial, value, state=state)
                self._repeats += 1
                if self._repeats == _MOST_REPEATS:
                    log.info("the search tries nothing new any more, and ends before its time")
                return True
        self._repeats = 0
        return False

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
        cells = studies.with_seeds(first, self._options.seeds, self._options.confirm)
        noted = {"trial": best.number, RUNS: studies.by_seed(cells)}
        self._study.set_user_attr(CONFIRMED, noted)
        return [cell for cell in cells if not _is_done(cell)]


def _is_done(cell: Cell) -> bool:
    """Return whether a run is finished, and its data are still those of then."""
    return cell.state() == "finished" and cell.data_problem() is None


def search_size(options: SearchOptions) -> str:
    """Return how many trials a search has, and of how many seeds."""
    text = f"{options.trials} trials" + f" of {options.seeds} seeds each" * (options.seeds > 1)
    return text + f", then {options.confirm} runs of the best setting" * bool(options.confirm)


def closing_lines(options: SearchOptions, folder: Path) -> str:
    """Return the trials of a study, the best one by validation, and how fresh seeds confirm it."""
    study = studies.open_study(options, folder)
    trials, monitor = studies.counted(study), studies.monitored(study)
    states = [trial.state.name.lower() for trial in trials]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    lines = _table(trials, monitor) if trials else []
    lines.append(f"study {options.study}: {len(states)} trials ({counts or 'none'})")
    if complete := states.count("complete"):
        lines += _best_lines(study.best_trial, complete, options, monitor)
        lines += _confirming_lines(study)
    return "\n".join(lines)


def _table(trials: Sequence[Any], monitor: str) -> list[str]:
    """Return a table of trials, the best first, with the scores of their seeds."""
    sign = 1 if monitor == "val_loss" else -1
    ranked = sorted(trials, key=lambda trial: (trial.value is None, sign * (trial.value or 0.0)))
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    is_mean = any(len(trial.user_attrs.get(RUNS, ())) > 1 for trial in trials)
    seeds = list(dict.fromkeys(s for trial in ranked for s in trial.user_attrs.get(RUNS, ())))
    seeds = seeds if is_mean else []
    score = "mean" if is_mean else monitor.replace("_", " ")
    rows = [["trial", *short_names(keys), "state", *(f"seed {seed}" for seed in seeds), score]]
    for trial in ranked[:_MOST_SHOWN]:
        folders = trial.user_attrs.get(RUNS, {})
        scores = [getattr(_finished(folders.get(s)), f"best_{monitor}", None) for s in seeds]
        values = [shorten(_text(trial.params.get(key), "g"), 30) for key in keys]
        shown = [_text(value, "f") for value in (*scores, trial.value)]
        rows.append([str(trial.number), *values, trial.state.name.lower(), *shown])
    more = len(ranked) - _MOST_SHOWN
    return align(rows) + [f"and {more} other trials"] * (more > 0)


def _text(value: object, kind: str) -> str:
    text = f"{value:.4{kind}}" if isinstance(value, float) else str(value)
    return "-" if value is None else text


def _best_lines(best: Any, complete: int, options: SearchOptions, monitor: str) -> list[str]:
    values = " ".join(best.user_attrs.get(OVERRIDES, ()))
    of_seeds = f" (mean of {options.seeds} seeds)" if options.seeds > 1 else ""
    score = "validation" if monitor == "val_accuracy" else monitor
    end, side = ("lowest", "low") if monitor == "val_loss" else ("highest", "high")
    lines = [f"best by {score}: {best.value:.4f}{of_seeds} with {values}"]
    if complete > 1:
        lines.append(
            f"this is the {end} of {complete} values and therefore likely to be too {side}"
            + "; search.confirm=5 runs the setting with fresh seeds" * (not options.confirm)
        )
    return [*lines, "in " + "\n   ".join(best.user_attrs.get(RUNS, {}).values())]


def _confirming_lines(study: Any) -> list[str]:
    """Return the scores of the best setting's runs with fresh seeds, if there are any."""
    noted = study.user_attrs.get(CONFIRMED)
    if not noted or noted["trial"] != study.best_trial.number:
        return []
    summaries = [s for name in noted[RUNS].values() if (s := _finished(name)) is not None]
    lines = []
    for metric in (f"best_{studies.monitored(study)}", "test_accuracy"):
        values = [v for s in summaries if (v := getattr(s, metric)) is not None]
        mean = interval(values, run_metrics.bounds(metric))
        if mean is not None:
            shown = run_metrics.show_interval(metric, mean)
            lines.append(f"  {run_metrics.in_words(metric)} {shown}")
    count, wanted = len(summaries), len(noted[RUNS])
    seeds = ", ".join(str(summary.seed) for summary in summaries)
    heading = f"with fresh seeds ({seeds or 'none yet'}), {count} of {wanted} runs"
    what = ", mean and its 95 % interval:" if count >= MIN_VALUES else ":"
    return [heading + what, *lines]


def _finished(folder: str | None) -> RunSummary | None:
    with contextlib.suppress(UsageError, RunFailed):
        summary = FoundRun(RunDir(folder)).summary if folder else None
        if summary is not None and summary.status == "finished":
            return summary
    return None
