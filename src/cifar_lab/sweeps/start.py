"""From a checked request to its runs: one in this process, or many in processes of their own."""

from collections.abc import Sequence
from pathlib import Path

from cifar_lab.config.command_line import parse_command_line
from cifar_lab.config.request import Request
from cifar_lab.sweeps import optuna_search, search_report
from cifar_lab.sweeps.cell import DONE, Cell, sweep_cells
from cifar_lab.sweeps.outcome import Outcome, closing_table, detached_text
from cifar_lab.sweeps.pool import run_all
from cifar_lab.training.data import check_data
from cifar_lab.training.preflight import compose_checked
from cifar_lab.training.signals import Stop


def start_many(request: Request, argv: Sequence[str], stop: Stop) -> list[Outcome]:
    """Run all cells of a request, or a search among its values; return what became of each.

    `argv` is the command line that the request is from. After a signal, `stop.signal` is set.
    """
    if request.space:
        return _search(request, argv, stop)
    cells = sweep_cells(
        [run.config for run in request.runs], [run.overrides for run in request.runs]
    )
    rerun = request.options.rerun
    for cell in cells:
        if rerun or cell.state() not in DONE:
            check_data(cell.config)
    return run_all(cells, request.options, stop=stop, launcher=request.launcher, command=argv)


def closing_text(request: Request, outcomes: Sequence[Outcome]) -> str:
    """Return the lines with which a sweep or a search ends."""
    if request.space:
        return search_report.closing_lines(request.options.search, _search_folder(request))
    if request.options.detach:
        return detached_text(outcomes)
    return closing_table(outcomes)


def _search(request: Request, argv: Sequence[str], stop: Stop) -> list[Outcome]:
    flags = parse_command_line(argv).config_flags

    def cell_of(lines: Sequence[str]) -> Cell:
        (cell,) = sweep_cells([compose_checked([*flags, *request.fixed, *lines]).runs[0].config])
        return cell

    first = request.runs[0].config
    if sweep_cells([first])[0].state() not in DONE:
        check_data(first)
    return optuna_search.run_search(
        request.space,
        cell_of,
        request.options,
        _search_folder(request),
        stop=stop,
        launcher=request.launcher,
        command=argv,
    )


def _search_folder(request: Request) -> Path:
    first = request.runs[0].config
    return Path(first.output_dir) / first.name / ".search"
