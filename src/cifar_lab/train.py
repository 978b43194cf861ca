"""Train and evaluate one run, or with -m (or an experiment that is a grid) many."""

import atexit
import dataclasses
import functools
import os
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cifar_lab import cli
from cifar_lab.config.command_line import parse_command_line
from cifar_lab.config.launch import Launched, Request, check_launch, launched
from cifar_lab.errors import UsageError, listing

if TYPE_CHECKING:
    from cifar_lab.training.distributed import Processes


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m cifar_lab.train [RUN_DIR] [GROUP=OPTION] [key=value] [-m]`."""
    place = launched()
    command = train_words if place is None else functools.partial(train_together, place)
    code = cli.run(command, argv, trains=True, distributed=True)
    if place is not None:
        # A thread of gloo may outlive its group, and then aborts the process as Python ends
        # ("terminate called without an active exception", pytorch#190489). All is written by now.
        atexit.register(os._exit, code)
    return code


def train_together(place: Launched, words: list[str]) -> int:
    """Train one run in the processes of torchrun; the first one reads the command line."""
    from cifar_lab.training.distributed import follow, joined
    from cifar_lab.training.loop import Stop

    with joined(place) as group:
        if group.rank == 0:
            return train_words(words, group)
        with Stop().installed() as stop:
            return follow(group, stop)


def train_words(words: list[str], group: "Processes | None" = None) -> int:
    """Do what the words of a command line ask for; return the exit code."""
    if "-h" in words or "--help" in words:
        from cifar_lab.config.reference import help_page

        line = parse_command_line([word for word in words if word not in ("-h", "--help")])
        print(help_page(line.config_dir))
        return 0
    from cifar_lab.config.compose import complete_shell, compose

    if "-sc" in words or "--shell-completion" in words:
        complete_shell(words)
        return 0
    request = compose(words)
    if request.shown is not None:  # without the dry check of targets, which needs torch
        print(request.shown)
        return 0
    from cifar_lab.training.preflight import check_request

    request = check_request(request)
    check_launch(request)
    if group is not None:
        if request.runs_elsewhere:
            raise UsageError(cli.NOT_TOGETHER)
        group.check(request.runs[0].config)
    if request.options.plan:
        print(_plan(request))
        return 0
    from cifar_lab.training.loop import Stop
    from cifar_lab.training.run import open_run, run_experiment

    with Stop().installed() as stop:
        if request.runs_elsewhere:
            from cifar_lab.sweeps.outcome import raise_for
            from cifar_lab.sweeps.search import closing_text, start_many

            outcomes = start_many(request, stop)
            print(closing_text(request, outcomes), flush=True)
            raise_for(outcomes, stop)
            return 0
        run, options = open_run(request), request.options
        summary = run_experiment(
            run, stop=stop, rerun=options.rerun, accept_code=options.accept_code, group=group
        )
    print(f"run folder: {run.path}")
    if summary.figures:
        drawn = listing([f"{name}.png" for name in summary.figures])
        print(f"figures: {run.figures} ({drawn})")
    folder, beside = shlex.quote(str(run.path)), shlex.quote(str(run.path.parent))
    print(f"to classify pictures: python -m cifar_lab.predict {folder} IMAGE...")
    print(f"to compare with other runs: python -m cifar_lab.summarize {beside}", flush=True)
    return 0


def _plan(request: Request) -> str:
    """Return what would run: the state of every cell, and how long it would take."""
    from cifar_lab.runs.run_dir import RunDir
    from cifar_lab.sweeps.cell import sweep_cells
    from cifar_lab.sweeps.local import fitting_jobs
    from cifar_lab.sweeps.outcome import plan
    from cifar_lab.training.preflight import run_folder

    cells = sweep_cells(
        [run.config for run in request.runs],
        [run.overrides for run in request.runs],
        alone=not request.is_sweep,
    )
    if not request.is_sweep:
        cells = [dataclasses.replace(cells[0], run=RunDir(run_folder(request)))]
    options = request.options
    jobs, _ = fitting_jobs([cell.config for cell in cells], options.jobs, options.jobs_per_gpu)
    text = plan(cells, jobs, rerun=options.rerun, with_times=options.plan != "list")
    if request.space:
        seeds = options.search.seeds
        each = f" of {seeds} seeds each" * (seeds > 1)
        text += f"\na search: {options.search.trials} trials{each} such as these"
    return text


if __name__ == "__main__":
    raise SystemExit(main())
