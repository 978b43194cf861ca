"""From a checked request to its runs: one in this process, or many in processes of their own."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from cifar_lab.config.command_line import parse_command_line
from cifar_lab.config.identity import address
from cifar_lab.config.request import Request
from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import UsageError, listing
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.sweeps import optuna_search, search_report
from cifar_lab.sweeps.cell import DONE, Cell, sweep_cells
from cifar_lab.sweeps.outcome import Outcome, closing_table, detached_text
from cifar_lab.sweeps.pool import run_all
from cifar_lab.training.build import check_data
from cifar_lab.training.distributed import Group
from cifar_lab.training.preflight import compose_checked, run_folder
from cifar_lab.training.run import run_experiment
from cifar_lab.training.signals import Stop


def start_run(request: Request, stop: Stop, group: Group | None = None) -> RunDir:
    """Train and evaluate the one run of a request in this process; return its folder.

    `group` are the processes that train it together, of which this is the first.
    """
    config, options = request.runs[0].config, request.options
    folder = run_folder(request)
    _check_data({folder: config}, options.rerun)
    run = RunDir.create(config, folder)
    run_experiment(
        run, stop=stop, rerun=options.rerun, accept_code=options.accept_code, group=group
    )
    return run


def what_next(run: RunDir) -> str:
    """Return the last lines of `train`: what the run's folder has, and commands that use it."""
    folder = shlex.quote(str(run.path))
    lines = [f"run folder: {run.path}"]
    if drawn := run.read_summary().figures:
        lines.append(f"figures: {run.figures} ({listing([f'{name}.png' for name in drawn])})")
    lines.append(f"to classify pictures: python -m cifar_lab.predict {folder} IMAGE...")
    compared = shlex.quote(str(run.path.parent))
    lines.append(f"to compare with other runs: python -m cifar_lab.summarize {compared}")
    return "\n".join(lines)


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
    needed = [cell for cell in cells if rerun or cell.state() not in DONE]
    _check_data({cell.run.path: cell.config for cell in needed}, rerun)
    return run_all(cells, request.options, stop=stop, launcher=request.launcher, command=argv)


def closing_text(request: Request, outcomes: Sequence[Outcome]) -> str:
    """Return the lines with which a sweep or a search ends."""
    if request.space:
        return search_report.closing_lines(request.options.search, _search_folder(request))
    if request.options.detach:
        return detached_text(outcomes)
    return closing_table(outcomes)


def check_launch(request: Request) -> None:
    """Raise UsageError for a search that cannot work, and where nothing can be detached."""
    options = request.options
    if options.detach and request.launcher.get("cluster") != "slurm":
        raise UsageError(
            "detach=true needs hydra/launcher=submitit_slurm: other runs end with the command"
        )
    if options.detach and request.space:
        raise UsageError(
            "detach=true is wrong in a search: it chooses what to try by the results before"
        )
    if options.search.method != "none" and not request.space:
        raise UsageError(
            f"search={options.search.method} has no values to choose from: add -m and "
            "values such as optimizer=sgd,adam or 'optimizer.lr=tag(log,interval(1e-4,1e-1))'"
        )
    if any(dimension.key == "training.monitor" for dimension in request.space):
        raise UsageError(
            "training.monitor is wrong as an axis of a search: it is the score by which trials are "
            "compared; give it one value"
        )
    if request.space and options.rerun and not options.plan:
        raise UsageError("rerun=true is wrong in a search: choose another search.study instead")
    search = options.search
    if request.space and (search.seeds > 1 or search.confirm):
        _check_seeds(request, "search.seeds" if search.seeds > 1 else "search.confirm")


def _check_seeds(request: Request, key: str) -> None:
    """Refuse a search among seeds or folds whose trials have several seeds anyway."""
    axes = [d.key for d in request.space if d.key in ("seed", "split.seed", "split.fold")]
    count = getattr(request.options.search, key.partition(".")[2])
    if axes:
        raise UsageError(
            f"{key}={count} repeats every setting with other seeds, and {axes[0]} is an axis of "
            f"the search: leave out one of them"
        )
    first, search = request.runs[0].config.seed, request.options.search
    if first + search.seeds + search.confirm > 2**32:
        raise UsageError(f"{key}={count} counts seeds up from seed={first}: give a smaller seed")


def _search(request: Request, argv: Sequence[str], stop: Stop) -> list[Outcome]:
    flags = parse_command_line(argv).config_flags

    def cell_of(lines: Sequence[str]) -> Cell:
        (cell,) = sweep_cells([compose_checked([*flags, *request.fixed, *lines]).runs[0].config])
        return cell

    first = request.runs[0].config
    _check_data({address(first): first}, rerun=False)
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


def _check_data(runs: Mapping[Path, RunConfig], rerun: bool) -> None:
    """Refuse data that are wrong or unavailable before a folder is made, if they are needed."""
    for folder, config in runs.items():
        run = RunDir(folder)
        if rerun or not run.summary_file.exists() or run.status != "finished":
            check_data(config)
