"""Train and evaluate one run, or with -m (or an experiment that is a grid) many."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cifar_lab import cli
from cifar_lab.config.command_line import parse_command_line
from cifar_lab.config.request import Request
from cifar_lab.config.torchrun import Launched, launched
from cifar_lab.errors import UsageError

if TYPE_CHECKING:
    from cifar_lab.training.distributed import Group


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m cifar_lab.train [RUN_DIR] [GROUP=OPTION] [key=value] [-m]`."""
    return cli.run(_train, argv, trains=True, distributed=True)


def _train(argv: list[str]) -> int:
    place = launched()
    return _train_alone(argv) if place is None else _train_together(argv, place)


def _train_together(argv: list[str], place: Launched) -> int:
    """Train one run in the processes of torchrun; the first one reads the command line."""
    from cifar_lab.training.distributed import joined
    from cifar_lab.training.follower import follow
    from cifar_lab.training.signals import Stop

    with joined(place) as group:
        if group.rank == 0:
            return _train_alone(argv, group)
        with Stop().installed() as stop:
            return follow(group, stop)


def _train_alone(argv: list[str], group: "Group | None" = None) -> int:
    if "-h" in argv or "--help" in argv:
        from cifar_lab.config.help_page import help_page

        line = parse_command_line([word for word in argv if word not in ("-h", "--help")])
        print(help_page(line.config_dir))
        return 0
    from cifar_lab.config.compose import complete_shell, compose

    if "-sc" in argv or "--shell-completion" in argv:
        complete_shell(argv)
        return 0
    request = compose(argv)
    if request.shown is None or request.touches_targets:  # shipped options are known to be right
        from cifar_lab.training.preflight import check_request

        request = check_request(request)
    if request.shown is not None:
        print(request.shown)
        return 0
    # torch is imported from here on, for those requests that need it
    from cifar_lab.sweeps.start import check_launch

    check_launch(request)
    if group is not None:
        if request.runs_elsewhere:
            raise UsageError(cli.NOT_TOGETHER)
        group.check(request.runs[0].config)
    return _plan(request) if request.options.plan else _start(request, argv, group)


def _start(request: Request, argv: Sequence[str], group: "Group | None") -> int:
    from cifar_lab.sweeps.outcome import raise_for
    from cifar_lab.sweeps.start import closing_text, start_many, start_run, what_next
    from cifar_lab.training.signals import Stop

    with Stop().installed() as stop:
        if request.runs_elsewhere:
            outcomes = start_many(request, argv, stop)
            print(closing_text(request, outcomes), flush=True)
            raise_for(outcomes, stop)
        else:
            print(what_next(start_run(request, stop, group)), flush=True)
    return 0


def _plan(request: Request) -> int:
    from cifar_lab.runs.run_dir import RunDir
    from cifar_lab.sweeps.cell import sweep_cells
    from cifar_lab.sweeps.launcher import fitting_jobs
    from cifar_lab.sweeps.plan import plan
    from cifar_lab.sweeps.search_report import search_size
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
    print(plan(cells, jobs, rerun=options.rerun))
    if request.space:
        print(f"a search: {search_size(options.search)} such as these")
    return 0


if __name__ == "__main__":
    sys.exit(main())
