"""The experiments at a glance, from their YAML and their finished runs: nothing is composed."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from cifar_lab.config.groups import read_experiment
from cifar_lab.errors import RunFailed, UsageError
from cifar_lab.runs.run_dir import find_runs
from cifar_lab.runs.text import align, duration

_UNKNOWN = "–"


def listing(names: Sequence[str], output_dir: Path, config_dir: Path | None) -> str:
    """Return a line per experiment: its report, runs, finished runs, their time and its title.

    The time is that of all runs of one seed, one after the other, as the finished ones below
    `output_dir` took in the mean.
    """
    lines = [("report", "experiment", "runs", "finished", "time of all", "what")]
    for name in names:
        content = read_experiment(name, config_dir)
        study = content.get("study") or {}
        runs = _runs_of(content)
        seconds = _finished_seconds(output_dir / name)
        total = duration(fmean(seconds) * runs) if seconds and runs else _UNKNOWN
        title = study.get("title") or ""
        report = study.get("report") or "-"
        lines.append((report, name, str(runs or _UNKNOWN), str(len(seconds)), total, title))
    return "\n".join(align(lines))


def _runs_of(content: dict[str, Any]) -> int | None:
    """Return the runs of an experiment's grid; None if it is not a product of plain lists."""
    runs = 1
    for values in (content.get("hydra", {}).get("sweeper", {}).get("params") or {}).values():
        # Commas within brackets and quotes belong to a value.
        text = re.sub(r"\[[^][]*\]|\{[^{}]*\}|'[^']*'|\"[^\"]*\"", "", str(values))
        if "(" in text:
            return None
        runs *= text.count(",") + 1
    return runs


def _finished_seconds(folder: Path) -> list[float]:
    """Return the training times of the finished runs of a folder; damaged runs are passed over."""
    seconds = []
    for run in find_runs(folder) if folder.is_dir() else ():
        with contextlib.suppress(UsageError, RunFailed):
            summary = run.read_summary()
            if summary.status == "finished":
                seconds.append(summary.seconds)
    return seconds
