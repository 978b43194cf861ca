"""From a checked request to its runs: all combinations, or a search among them with Optuna.

Each trial of a search is one or several run folders. Its study lives in a journal file: a search
that was stopped or killed goes on by the same line, and several lines may work on one study.
Nothing is chosen on the test set: the best value of the score that `training.monitor` names counts,
and its mean where a trial has several seeds.
"""

import dataclasses
import logging
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cifar_lab.analysis import run_metrics
from cifar_lab.config.command_line import parse_command_line
from cifar_lab.config.launch import Request, SearchOptions
from cifar_lab.errors import UsageError, shorten
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.text import align
from cifar_lab.sweeps import study as studies
from cifar_lab.sweeps.cell import DONE, Cell, short_names, sweep_cells
from cifar_lab.sweeps.launcher import Job, Launcher
from cifar_lab.sweeps.outcome import Outcome, Pace, closing_table
from cifar_lab.sweeps.pool import PATIENCE_SECONDS, Source, fill_slots, make_launcher, run_all
from cifar_lab.sweeps.study import OVERRIDES, REPEATS, RUNS, Trial
from cifar_lab.training.ambient import as_in_a_fresh_process
from cifar_lab.training.data import check_data
from cifar_lab.training.loop import Stop
from cifar_lab.training.preflight import compose_checked

log = logging.getLogger("cifar_lab")

_DETACHED_JOBS = 4  # trials at a time in a cluster's queue; all at once, none would learn
_MOST_REPEATS = 50  # in a row, after which the sampler is taken to have nothing new
_MOST_SHOWN = 20  # trials
_FRESH_SEEDS = 5  # that measure the best setting


def start_many(request: Request, argv: Sequence[str], stop: Stop) -> list[Outcome]:
    """Run all cells of a request, or a search among its values; return how each ended.

    `argv` is the command line that the request is from. After a signal, `stop.signal` is set.
    """
    runs = request.runs[:1] if request.space else request.runs
    cells = sweep_cells([run.config for run in runs], [run.overrides for run in runs])
    with as_in_a_fresh_process():  # what is imported to read data sets variables (scikit-learn)
        for cell in cells:
            if request.options.rerun or cell.state() not in DONE:
                check_data(cell.config)
    if request.space:
        where = make_launcher(request.launcher, request.options)
        return run_search(request, _search_folder(request), where, flags=_flags(argv), stop=stop)
    return run_all(cells, request.options, stop=stop, launcher=request.launcher)


def closing_text(request: Request, argv: Sequence[str], outcomes: Sequence[Outcome]) -> str:
    """Return the lines with which a sweep or a search ends."""
    if request.space:
        return closing_lines(request, _search_folder(request), _flags(argv))
    waits = "\nthe same line without detach waits for the jobs" * request.options.detach
    return closing_table(outcomes) + waits


def _flags(argv: Sequence[str]) -> list[str]:
    """Return the flag of a command line that its trials need too."""
    config_dir = parse_command_line(argv).config_dir
    return [] if config_dir is None else ["--config-dir", config_dir]


def _search_folder(request: Request) -> Path:
    first = request.runs[0].config
    return Path(first.output_dir) / first.name / ".search"


def run_search(
    request: Request, folder: Path, where: Launcher, *, flags: Sequence[str] = (), stop: Stop
) -> list[Outcome]:
    """Run trials until the study has `search.trials`; return the runs of now, as they ended.

    `folder` holds the study's journal; `flags` are those of Hydra that trials need too.
    """
    wanted = request.options.search
    words = [*flags, *request.fixed]
    example = _cell(words, [f"{d.key}={d.samples[0]}" for d in request.space])
    study = studies.open_study(wanted, folder, example.config.training.monitor)
    slots = where.prepare([example.config] * wanted.trials)
    if where.is_detached:
        jobs = request.options.jobs
        slots = min(slots, _DETACHED_JOBS if jobs == "auto" else jobs)
    done = sum(trial.state.is_finished() for trial in studies.counted(study))
    log.info("study %s: %d of %d trials done", wanted.study, done, wanted.trials)
    search = _Search(study, request, words, example)
    search.reopen(where.is_free)
    return fill_slots(search, where, slots, stop=stop, pace=Pace())


class _Search(Source):
    """The runs of a study's trials: those that an earlier search left open, then new ones."""

    def __init__(self, study: Any, request: Request, words: list[str], example: Cell) -> None:
        self._study, self._space, self._words = study, request.space, words
        self._options, self._example = request.options.search, example
        self.total = self._options.trials * self._options.seeds
        self._open: list[Trial] = []
        self._running: dict[Path, Trial] = {}
        self._repeats = 0

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
        later = sum(trial.left - 1 for trial in self._running.values())
        later += sum(trial.left for trial in self._open)
        return [self._example] * (later + self._new_trials() * self._options.seeds)

    def take(self, is_free: Callable[[Cell], bool], *, idle: bool) -> Cell | None:
        while self._open or self._new_trials():
            trial = self._open.pop(0) if self._open else self._opened(self._study.ask())
            if trial is not None and _is_done(trial.cell):
                self._end(trial, Outcome(trial.cell, "finished", "finished"))
            elif trial is not None and trial.cell.run.path in self._running:
                self._open.append(trial)  # its values differ and mean the same
                return None
            elif trial is not None:
                if trial.cell.state() in ("new", "queued"):
                    RunDir.create(trial.cell.config)
                self._running[trial.cell.run.path] = trial
                return trial.cell
        return None

    def is_behind(self, job: Job) -> bool:
        return self._running[job.cell.run.path].is_behind(self._options.warmup_epochs)

    def ended(self, outcome: Outcome) -> Outcome:
        return self._end(self._running.pop(outcome.cell.run.path), outcome)

    def _end(self, trial: Trial, outcome: Outcome) -> Outcome:
        outcome = trial.ended(outcome)
        if trial.goes_on:
            self._open.insert(0, trial)
        return outcome

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
            config = _cell(self._words, lines).config
        except UsageError as error:
            log.warning("trial %d is refused: %s", trial.number, error)
            studies.tell(self._study, trial, state="FAIL")
            return None
        seeds = range(config.seed, config.seed + self._options.seeds)
        cells = sweep_cells([dataclasses.replace(config, seed=seed) for seed in seeds])
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


def _cell(words: Sequence[str], lines: Sequence[str]) -> Cell:
    """Return the cell of a command line's words with the overrides of a trial."""
    return sweep_cells([compose_checked([*words, *lines]).runs[0].config])[0]


def _is_done(cell: Cell) -> bool:
    """Return whether a run is finished, and its data are still those of then."""
    return cell.state() == "finished" and cell.data_problem() is None


def search_size(options: SearchOptions) -> str:
    """Return how many trials a search has, and of how many seeds."""
    return f"{options.trials} trials" + f" of {options.seeds} seeds each" * (options.seeds > 1)


def closing_lines(request: Request, folder: Path, flags: Sequence[str] = ()) -> str:
    """Return the trials of a study, the best first, and the line that measures the best again.

    `flags` are those of Hydra that the line needs.
    """
    options, monitor = request.options.search, request.runs[0].config.training.monitor
    study = studies.open_study(options, folder, monitor)
    sign = 1 if monitor == "val_loss" else -1
    trials = studies.counted(study)
    trials.sort(key=lambda trial: (trial.value is None, sign * (trial.value or 0.0)))
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    score = "mean " * (options.seeds > 1) + monitor.replace("_", " ")
    rows = [["trial", *short_names(keys), "state", score]]
    for trial in trials[:_MOST_SHOWN]:
        values = [trial.params.get(key, "-") for key in keys]
        shown = [shorten(f"{v:.4g}" if isinstance(v, float) else str(v), 30) for v in values]
        value = run_metrics.show(f"best_{monitor}", trial.value)
        rows.append([str(trial.number), *shown, trial.state.name.lower(), value])
    lines = align(rows) if trials else []
    if (more := len(trials) - _MOST_SHOWN) > 0:
        lines.append(f"and {more} other trials")
    counts = Counter(trial.state.name.lower() for trial in trials)
    told = ", ".join(f"{number} {state}" for state, number in counts.items())
    lines.append(f"study {options.study}: {len(trials)} trials ({told or 'none'})")
    if counts["complete"]:
        lines += _best_lines(request, study.best_trial, counts["complete"], flags)
    return "\n".join(lines)


def _best_lines(request: Request, best: Any, complete: int, flags: Sequence[str]) -> list[str]:
    """Return the best trial of several, whose value is too good, and how to train it again."""
    options, config = request.options.search, request.runs[0].config
    monitor, values = config.training.monitor, best.user_attrs.get(OVERRIDES, [])
    of_seeds = f" (mean of {options.seeds} seeds)" if options.seeds > 1 else ""
    score = "validation" if monitor == "val_accuracy" else monitor
    shown = run_metrics.show(f"best_{monitor}", best.value)
    lines = [f"best by {score}: {shown}{of_seeds} with {' '.join(values)}"]
    if complete > 1:
        fresh = range(config.seed + options.seeds, config.seed + options.seeds + _FRESH_SEEDS)
        words = [w for w in (*request.fixed, *values) if not w.startswith("seed=")]
        line = shlex.join([*flags, *words, f"seed={','.join(map(str, fresh))}"])
        end, side = ("lowest", "low") if monitor == "val_loss" else ("highest", "high")
        lines += [
            f"this is the {end} of {complete} values and therefore likely to be too {side}; with "
            "fresh seeds:",
            f"  python -m cifar_lab.train -m {line}",
        ]
    return [*lines, "in " + "\n   ".join(best.user_attrs.get(RUNS, {}).values())]
