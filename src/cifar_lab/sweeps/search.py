"""From a checked request to its runs: all combinations, or a search among them with Optuna.

Each trial of a search is one or several run folders. Its study lives in a journal file: a search
that was stopped or killed goes on by the same line, and several lines may work on one study.
Nothing is chosen on the test set: the best value of the score that `training.monitor` names counts,
and its mean where a trial has several seeds.
"""

import contextlib
import dataclasses
import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar_lab.analysis import run_metrics
from cifar_lab.analysis.seed_groups import short_names
from cifar_lab.config.identity import identity
from cifar_lab.config.launch import LaunchOptions, Request, sets_one
from cifar_lab.config.run_config import flatten, to_plain
from cifar_lab.errors import RunFailed, UsageError, listing, log, shorten
from cifar_lab.runs.text import align
from cifar_lab.sweeps import study as studies
from cifar_lab.sweeps.cell import DONE, Cell, sweep_cells
from cifar_lab.sweeps.local import LocalProcesses
from cifar_lab.sweeps.outcome import Outcome, Pace, closing_table
from cifar_lab.sweeps.pool import PATIENCE_SECONDS, Job, Launcher, Source, fill_slots, run_all
from cifar_lab.sweeps.study import OVERRIDES, REPEATS, RUNS, Trial
from cifar_lab.training.ambient import as_in_a_fresh_process
from cifar_lab.training.loop import Stop
from cifar_lab.training.preflight import compose_checked
from cifar_lab.training.run import check_start, not_applied

_DETACHED_JOBS = 4  # trials at a time in a cluster's queue; all at once, none would learn
_MOST_REPEATS = 50  # in a row, after which the sampler is taken to have nothing new
_FRESH_SEEDS = 5  # that measure the best setting


def start_many(request: Request, stop: Stop) -> list[Outcome]:
    """Run all cells of a request, or a search among its values; return how each ended.

    After a signal, `stop.signal` is set.
    """
    runs = request.runs[:1] if request.space else request.runs
    cells = sweep_cells([run.config for run in runs], [run.overrides for run in runs])
    config = runs[0].config
    identified = flatten(identity(config, with_defaults=True)).keys()
    others = flatten(to_plain(config)).keys() - identified - {"name", "output_dir"}
    words = [w for w in runs[0].overrides if sets_one(w, others) and not sets_one(w, identified)]
    with as_in_a_fresh_process():  # what is imported to read data sets variables (scikit-learn)
        for cell in cells:
            state = cell.state()
            if request.options.rerun or state not in DONE:
                check_start(cell.run, cell.config, rerun=request.options.rerun)
            elif words and state == "finished":
                with contextlib.suppress(UsageError, RunFailed):  # a damaged config.yaml
                    words = _warn_of(words, cell)
    launcher = make_launcher(request.launcher, request.options)
    if request.space:
        return run_search(request, _search_folder(request), launcher, stop=stop)
    return run_all(cells, launcher, stop=stop)


def _warn_of(words: list[str], cell: Cell) -> list[str]:
    """Say once which words a finished cell does not follow; return the words still to look at."""
    remedy = "`cifar_lab.draw` draws figures again, rerun=true trains again"
    if ignored := not_applied(cell.run.read_config(), cell.config, words):
        log.info("finished cells stay as they are, without %s: %s", listing(ignored), remedy)
    return [word for word in words if word not in ignored]


def make_launcher(settings: Mapping[str, Any], options: LaunchOptions) -> Launcher:
    """Return the launcher that `hydra/launcher` names; UsageError where it cannot work."""
    if settings.get("cluster") == "ray":
        from cifar_lab.sweeps.ray import RayTasks

        return RayTasks(settings, options)
    if settings.get("cluster") == "slurm":
        from cifar_lab.sweeps.slurm import Slurm

        return Slurm(settings, options)
    return LocalProcesses(options)


def closing_text(request: Request, outcomes: Sequence[Outcome]) -> str:
    """Return the lines with which a sweep or a search ends."""
    if request.space:
        return closing_lines(request, _search_folder(request))
    waits = "\nthe same line without detach waits for the jobs" * request.options.detach
    return closing_table(outcomes) + waits


def _search_folder(request: Request) -> Path:
    first = request.runs[0].config
    return Path(first.output_dir) / first.name / ".search"


def run_search(request: Request, folder: Path, launcher: Launcher, *, stop: Stop) -> list[Outcome]:
    """Run trials until the study has `search.trials`; return the runs of now, as they ended.

    `folder` holds the study's journal.
    """
    options = request.options.search
    example = _cell(request, [f"{d.key}={d.samples[0]}" for d in request.space])
    study = studies.open_study(options, folder, example.config.training.monitor)
    slots = launcher.prepare([example.config] * options.trials)
    if launcher.is_detached:
        jobs = request.options.jobs
        slots = min(slots, _DETACHED_JOBS if jobs == "auto" else jobs)
    done = sum(trial.state.is_finished() for trial in studies.counted(study))
    log.info("study %s: %d of %d trials done", options.study, done, options.trials)
    search = _Search(study, request, example)
    search.reopen(launcher.is_free)
    return fill_slots(search, launcher, slots, stop=stop, pace=Pace())


class _Search(Source):
    """The runs of a study's trials: those that an earlier search left open, then new ones."""

    def __init__(self, study: Any, request: Request, example: Cell) -> None:
        self._study, self._request, self._example = study, request, example
        self._options = request.options.search
        super().__init__([], self._options.trials * self._options.seeds)
        self._open: list[Trial] = []
        self._running: dict[Path, Trial] = {}
        self._repeats = 0

    def reopen(self, is_free: Callable[[Cell], bool]) -> None:
        """Take up the trials that an earlier search left open and whose folders are free.

        The runs of a search that was killed a moment ago are given time to save and end.
        """
        opened = filter(None, map(self._opened, studies.open_trials(self._study)))
        deadline = time.monotonic() + PATIENCE_SECONDS
        for trial in opened:
            while not (is_idle := all(map(is_free, trial.cells))) and time.monotonic() < deadline:
                time.sleep(0.2)
            if is_idle:
                self._open.append(trial)

    def waiting(self) -> Sequence[Cell]:
        # What the trials to come will try is not known yet.
        later = sum(trial.left - 1 for trial in self._running.values())
        later += sum(trial.left for trial in self._open)
        return [self._example] * (later + self._new_trials() * self._options.seeds)

    def take(self, is_free: Callable[[Cell], bool], *, idle: bool) -> Cell | None:
        while self._open or self._new_trials():
            trial = self._open.pop(0) if self._open else self._opened(self._study.ask())
            if trial is None:
                continue
            cell = trial.cell
            if cell.state() == "finished" and cell.data_problem() is None:
                self._end(trial, Outcome(cell, "finished", "finished"))
            elif cell.run.path in self._running:
                self._open.append(trial)  # its values differ and mean the same
                return None
            else:
                self._running[cell.run.path] = trial
                return cell
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
        values = studies.suggest(self._study, trial, self._request.space, self._options)
        lines = [f"{key}={value}" for key, value in values.items()]
        if self._is_repeated(trial):
            return None
        try:
            config = _cell(self._request, lines).config
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


def _cell(request: Request, lines: Sequence[str]) -> Cell:
    """Return the cell of a search's fixed words with the overrides of a trial."""
    return sweep_cells([compose_checked([*request.fixed, *lines]).runs[0].config])[0]


def closing_lines(request: Request, folder: Path) -> str:
    """Return the trials of a study, the best first, and the line that measures the best again."""
    options, monitor = request.options.search, request.runs[0].config.training.monitor
    study = studies.open_study(options, folder, monitor)
    sign = 1 if monitor == "val_loss" else -1
    trials = studies.counted(study)
    trials.sort(key=lambda trial: (trial.value is None, sign * (trial.value or 0.0)))
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    score = "mean " * (options.seeds > 1) + monitor.replace("_", " ")
    rows = [["trial", *short_names(keys), "state", score]]
    for trial in trials:
        values = [trial.params.get(key, "-") for key in keys]
        shown = [shorten(f"{v:.4g}" if isinstance(v, float) else str(v), 30) for v in values]
        value = run_metrics.show(f"best_{monitor}", trial.value)
        rows.append([str(trial.number), *shown, trial.state.name.lower(), value])
    counts = Counter(trial.state.name.lower() for trial in trials)
    told = ", ".join(f"{number} {state}" for state, number in counts.items())
    lines = [*align(rows), f"study {options.study}: {len(trials)} trials ({told or 'none'})"]
    if counts["complete"]:
        lines += _best_lines(request, study.best_trial, counts["complete"])
    return "\n".join(lines)


def _best_lines(request: Request, best: Any, complete: int) -> list[str]:
    """Return the best trial of several, whose value is too good, and how to train it again."""
    options, config = request.options.search, request.runs[0].config
    monitor, values = config.training.monitor, best.user_attrs.get(OVERRIDES, [])
    of_seeds = f" (mean of {options.seeds} seeds)" if options.seeds > 1 else ""
    shown = run_metrics.show(f"best_{monitor}", best.value)
    lines = [f"best by {monitor}: {shown}{of_seeds} with {' '.join(values)}"]
    if complete > 1:
        fresh = range(config.seed + options.seeds, config.seed + options.seeds + _FRESH_SEEDS)
        words = [w for w in (*request.fixed, *values) if not w.startswith("seed=")]
        line = shlex.join([*words, f"seed={','.join(map(str, fresh))}"])
        lines += [
            f"this is the best of {complete} values and therefore likely to be too good; with "
            "fresh seeds:",
            f"  python -m cifar_lab.train -m {line}",
        ]
    return [*lines, "in " + "\n   ".join(best.user_attrs.get(RUNS, {}).values())]
