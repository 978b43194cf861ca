"""From a checked request to its runs: one in this process, or many in processes of their own."""

from collections.abc import Sequence
from pathlib import Path

from cifar_lab.config.command_line import parse_command_line
from cifar_lab.config.request import Request
from cifar_lab.sweeps import search
from cifar_lab.sweeps.cell import DONE, Cell, sweep_cells
from cifar_lab.sweeps.outcome import Outcome, closing_table
from cifar_lab.sweeps.pool import make_launcher, run_all
from cifar_lab.training.ambient import as_in_a_fresh_process
from cifar_lab.training.data import check_data
from cifar_lab.training.preflight import compose_checked
from cifar_lab.training.signals import Stop


def start_many(request: Request, argv: Sequence[str], stop: Stop) -> list[Outcome]:
    """Run all cells of a request, or a search among its values; return how each ended.

    `argv` is the command line that the request is from. After a signal, `stop.signal` is set.
    """
    flags = _flags(argv)

    def cell_of(lines: Sequence[str]) -> Cell:
        (cell,) = sweep_cells([compose_checked([*flags, *request.fixed, *lines]).runs[0].config])
        return cell

    runs = request.runs[:1] if request.space else request.runs
    cells = sweep_cells([run.config for run in runs], [run.overrides for run in runs])
    with as_in_a_fresh_process():  # what is imported to read data sets variables (scikit-learn)
        for cell in cells:
            if request.options.rerun or cell.state() not in DONE:
                check_data(cell.config)
    if request.space:
        where = make_launcher(request.launcher, request.options)
        return search.run_search(request, cell_of, _search_folder(request), where, stop=stop)
    return run_all(cells, request.options, stop=stop, launcher=request.launcher)


def closing_text(request: Request, argv: Sequence[str], outcomes: Sequence[Outcome]) -> str:
    """Return the lines with which a sweep or a search ends."""
    if request.space:
        return search.closing_lines(request, _search_folder(request), _flags(argv))
    waits = "\nthe same line without detach waits for the jobs" * request.options.detach
    return closing_table(outcomes) + waits


def _flags(argv: Sequence[str]) -> list[str]:
    """Return the flag of a command line that its trials need too."""
    config_dir = parse_command_line(argv).config_dir
    return [] if config_dir is None else ["--config-dir", config_dir]


def _search_folder(request: Request) -> Path:
    first = request.runs[0].config
    return Path(first.output_dir) / first.name / ".search"
