"""What a search found: its trials, the best setting, and fresh runs of that."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar_lab.analysis import run_metrics
from cifar_lab.analysis.load_runs import FoundRun
from cifar_lab.analysis.statistics import MIN_VALUES, interval
from cifar_lab.config.launch import SearchOptions
from cifar_lab.errors import RunFailed, UsageError, shorten
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.summary import RunSummary
from cifar_lab.runs.text import align
from cifar_lab.sweeps.cell import short_names
from cifar_lab.sweeps.study import CONFIRMED, monitored, open_study
from cifar_lab.sweeps.trial import OVERRIDES, RUNS

_MOST_SHOWN = 20  # trials


def search_size(options: SearchOptions) -> str:
    """Return how many trials a search has, and of how many seeds."""
    text = f"{options.trials} trial{'s' * (options.trials != 1)}"
    if options.seeds > 1:
        text += f" of {options.seeds} seeds each"
    if options.confirm:
        text += f", then {options.confirm} run{'s' * (options.confirm != 1)} of the best setting"
    return text


def closing_lines(options: SearchOptions, folder: Path) -> str:
    """Return the trials of a study, the best one by validation, and how fresh seeds confirm it."""
    study = open_study(options, folder)
    states = [trial.state.name.lower() for trial in study.trials]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    lines = _table(study.trials, monitored(study)) if states else []
    lines.append(f"study {options.study}: {len(states)} trials ({counts or 'none'})")
    if complete := states.count("complete"):
        lines += _best_lines(study.best_trial, complete, options, monitored(study))
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
    folders = list(best.user_attrs.get(RUNS, {}).values())
    label = "its folder" if len(folders) == 1 else "its folders"
    return [*lines, *(f"{label}: {name}" for name in folders[:1]), *(f"  {n}" for n in folders[1:])]


def _confirming_lines(study: Any) -> list[str]:
    """Return the scores of the best setting's runs with fresh seeds, if there are any."""
    noted = study.user_attrs.get(CONFIRMED)
    if not noted or noted["trial"] != study.best_trial.number:
        return []
    summaries = [s for name in noted[RUNS].values() if (s := _finished(name)) is not None]
    lines = []
    for metric in (f"best_{monitored(study)}", "test_accuracy"):
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
    try:
        summary = FoundRun(RunDir(folder)).summary if folder else None
    except (UsageError, RunFailed):
        return None
    return summary if summary is not None and summary.status == "finished" else None
