"""One run of a sweep: its folder, its state on disk, and how a process runs it."""

import dataclasses
import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cifar_lab.config import targets
from cifar_lab.config.identity import address
from cifar_lab.config.launch import LaunchOptions
from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import RunFailed, Stopped, Unavailable, UsageError
from cifar_lab.runs.provenance import code_hash
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.summary import RunSummary
from cifar_lab.training.data_record import check_finished
from cifar_lab.training.run import run_experiment
from cifar_lab.training.signals import Stop

THREADS = 1
"""CPU threads of a cell that asks for no number: the same for every cell, machine and `jobs`."""

DONE = ("finished", "other code", "damaged")
"""States of cells that a sweep leaves alone."""

LEFT_OUT = (3, 130, 143)
"""Exit codes of cells that did not fail: unavailable now, or stopped and saved."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: its folder, config, what tells it from the others, today's code hash."""

    run: RunDir
    config: RunConfig
    axes: Mapping[str, str]
    code: str

    def summary(self) -> RunSummary | None:
        """Return summary.json, or None if the folder is not there yet."""
        return self.run.read_summary() if self.run.summary_file.exists() else None

    def state(self) -> str:
        """Return new, queued, running, interrupted, failed, finished, other code or damaged."""
        try:
            summary = self.summary()
        except (UsageError, RunFailed):
            return "damaged"
        if summary is None:
            return "new"
        has_result = summary.status == "finished" or self.run.last.exists()
        same_code = summary.code_hash in (None, self.code)
        if has_result and not same_code and summary.status != "running":
            return "other code"
        return summary.status

    def is_finished(self) -> bool:
        """Return whether there is a result, whichever code made it."""
        summary = self.summary()
        return summary is not None and summary.status == "finished"

    def problem(self) -> str:
        """Return what is wrong with a damaged folder."""
        try:
            self.summary()
        except (UsageError, RunFailed) as error:
            return str(error)
        return ""

    def data_problem(self) -> str | None:
        """Return how the data have changed since a finished cell was trained; None if they did not.

        Raises UsageError if they cannot be read any more.
        """
        try:
            check_finished(self.config.dataset, self.run.read_summary().dataset, self.run.path)
        except Unavailable as error:
            return str(error)
        return None

    def epochs_done(self) -> int:
        """Return how many epochs metrics.csv holds."""
        try:
            return len(self.run.read_metrics())
        except RunFailed:
            return 0


def sweep_cells(
    configs: Sequence[RunConfig],
    overrides: Sequence[Sequence[str]] | None = None,
    *,
    alone: bool = False,
) -> list[Cell]:
    """Return the cells of a sweep; two configs with one address are one cell.

    A cell that asks for no number of threads gets THREADS, so that results do not depend on how
    many run at once; a run `alone` keeps its own default. `overrides` name the axes for the tables.
    """
    overrides = overrides or [() for _ in configs]
    settings = [dict(_key_value(line) for line in lines) for lines in overrides]
    keys = {key: None for one in settings for key in one}
    axes = [key for key in keys if len({one.get(key) for one in settings}) > 1]
    cells: dict[Path, Cell] = {}
    codes: dict[str, str] = {}
    for plain, one in zip(configs, settings, strict=True):
        threads = plain.threads or (None if alone else THREADS)
        settled = dataclasses.replace(plain, threads=threads)
        run = RunDir(address(settled))
        roles = (settled.model, settled.activation, settled.optimizer, settled.scheduler)
        sources = json.dumps([settled.dataset.source, *roles], sort_keys=True)
        if sources not in codes:
            codes[sources] = code_hash(settled)
        labels = {key: one.get(key, "") for key in axes}
        cells.setdefault(run.path, Cell(run, settled, labels, codes[sources]))
    return list(cells.values())


def short_names(cells: Sequence[Cell]) -> list[str]:
    """Return the names of the axes, `lr` for `optimizer.lr` where that is clear."""
    keys = list(cells[0].axes) if cells else []
    last = [key.rpartition(".")[2] for key in keys]
    return [s if last.count(s) == 1 else key for key, s in zip(keys, last, strict=True)]


def run_cell(run: RunDir, code: str, stop: Stop, options: LaunchOptions) -> tuple[int, str | None]:
    """Run a folder in this process; return the exit code and a message, None if all went well.

    `code` is the hash of the sources when the sweep began: a cell that would run others is refused.
    """
    try:
        targets.trust(options.trust)
        if code_hash(run.read_config()) != code:
            raise Unavailable("the code was changed while the sweep ran; run the same line again")
        run_experiment(run, stop=stop, rerun=options.rerun, accept_code=options.accept_code)
    except Stopped as stopped:
        name = signal.Signals(stopped.signal).name
        return 128 + stopped.signal, f"stopped by {name}; all is saved"
    except (UsageError, Unavailable, RunFailed) as error:
        return error.exit_code, str(error)
    except OSError as error:
        return 1, f"{error.filename or run.path}: {error.strerror or error}"
    return 0, None


def _key_value(line: str) -> tuple[str, str]:
    key, _, value = line.partition("=")
    return key.lstrip("+"), value
