"""One run of a sweep: its folder, its state on disk, and the process that runs it.

    python -m cifar_lab.sweeps.cell RUN_DIR

A cell is a process on a folder, and its result is the folder: the exit code says how it ended, as
that of every command, and summary.json says why.
"""

import argparse
import contextlib
import json
import logging
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cifar_lab.config import targets
from cifar_lab.config.identity import address
from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import RunFailed, Stopped, Unavailable, UsageError, log
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.summary import RunSummary, Status, code_version, other_code
from cifar_lab.training.build import check_finished
from cifar_lab.training.loop import Stop
from cifar_lab.training.preflight import on_this_machine
from cifar_lab.training.run import run_experiment

THREADS = 1
"""CPU threads of a cell that asks for no number: the same for every cell, machine and `jobs`."""

DONE = ("finished", "other code", "damaged")
"""States of cells that a sweep leaves alone."""

STOPPED = (129, 130, 143)
"""Exit codes of cells that a signal stopped, with everything saved."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a sweep: folder, config, what tells it from the others, today's code version.

    `asked_threads` is the number that the line names, if any: a cell that was begun keeps its own.
    """

    run: RunDir
    config: RunConfig
    axes: Mapping[str, str]
    code: str
    asked_threads: int | None = None

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
        if has_result and summary.status != "running" and other_code(summary, self.code):
            return "other code"
        return summary.status

    def why(self, code: int) -> str | None:
        """Return why the process of this cell ended with an exit code; None if all is well."""
        if code == 0:
            return None
        if code in STOPPED:
            return f"stopped by {signal.Signals(code - 128).name}; all is saved"
        if code == 3 and self.run.is_locked():
            return "another process took it first, and runs it"
        try:
            summary = self.summary()
        except (UsageError, RunFailed) as error:
            return str(error)
        if summary is not None and summary.error is not None:
            return re.sub(r"^(UsageError|Unavailable|RunFailed|Damaged): ", "", summary.error)
        return f"it ended with exit code {code}; see its train.log"

    def data_problem(self) -> str | None:
        """Return how a finished cell's data have changed, if so; UsageError if they are gone."""
        try:
            check_finished(self.config.dataset, self.run.read_summary().dataset, self.run.path)
        except Unavailable as error:
            return str(error)
        return None

    def epochs_done(self) -> int:
        """Return how many epochs metrics.csv holds."""
        with contextlib.suppress(RunFailed):
            return len(self.run.read_metrics())
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
    pairs = [[line.lstrip("+").partition("=") for line in lines] for lines in overrides]
    values = [{key: value for key, _, value in lines} for lines in pairs]
    keys = {key: None for words in values for key in words}
    axes = [key for key in keys if len({words.get(key) for words in values}) > 1]
    cells: dict[Path, Cell] = {}
    codes: dict[str, str] = {}
    for plain, words in zip(configs, values, strict=True):
        threads = plain.threads or (None if alone else THREADS)
        config = replace(plain, threads=threads)
        run = RunDir(address(config))
        roles = (config.model, config.activation, config.optimizer, config.scheduler)
        sources = json.dumps([config.dataset.source, *roles], sort_keys=True)
        if sources not in codes:
            codes[sources] = code_version(config)
        labels = {key: words.get(key, "") for key in axes}
        cells.setdefault(run.path, Cell(run, config, labels, codes[sources], plain.threads))
    return list(cells.values())


def main(argv: Sequence[str] | None = None, stop: Stop | None = None) -> int:
    """Run the folder that a command line names in this process; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cifar_lab.sweeps.cell")
    parser.add_argument("run_dir", type=RunDir, metavar="RUN_DIR")
    parser.add_argument("--code", help="code version to run; another is refused")
    parser.add_argument("--accept-code", action="store_true")
    parser.add_argument("--trust", action="append", default=[], metavar="MODULE")
    asked = parser.parse_args(argv)
    log.setLevel(logging.INFO)
    log.propagate = False  # train.log has it
    with (stop or Stop()).installed() as stop:
        try:
            targets.trust(asked.trust)
            return run_cell(asked.run_dir, stop, code=asked.code, accept_code=asked.accept_code)
        except Stopped as stopped:  # before the run began, or after its end
            return 128 + stopped.signal


def run_cell(run: RunDir, stop: Stop, *, code: str | None, accept_code: bool = False) -> int:
    """Run a folder in this process; return the exit code. What is wrong is in its summary.json.

    `code` is the `code_version` when the sweep began: a cell that would run others is refused.
    """
    try:
        config = run.read_config()
        if code is not None and code_version(config) != code:
            raise Unavailable("the code was changed while the sweep ran; run the same line again")
        if (here := on_this_machine(config)) != config:  # it was sent to a cluster
            run.settle(here)
        run_experiment(run, stop=stop, accept_code=accept_code)
    except Stopped as stopped:
        return 128 + stopped.signal
    except (UsageError, Unavailable, RunFailed, OSError) as error:
        note(run, str(error))
        log.error("%s", error)  # without a handler to standard error, in a sweep to train.log
        return getattr(error, "exit_code", 1)
    return 0


def note(run: RunDir, error: str, status: Status | None = None) -> None:
    """Write into a run's summary.json why it has no result, unless it says so or is in use."""
    with contextlib.suppress(UsageError, Unavailable, RunFailed, OSError), run.lock():
        summary = run.read_summary()
        told = summary.error is not None and (summary.error in error or error in summary.error)
        if summary.status != "finished" and (status or not told):
            status = status or summary.status
            run.write_summary(replace(summary, status=status, error=error))


if __name__ == "__main__":
    sys.exit(main())
