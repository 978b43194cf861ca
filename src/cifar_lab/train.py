"""Train and evaluate one run, or with -m (or an experiment that is a grid) many."""

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cifar_lab import cli
from cifar_lab.config import RunConfig
from cifar_lab.door import Request, compose, read_arguments
from cifar_lab.errors import RequestError


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m cifar_lab.train [RUN_DIR] [GROUP=OPTION] [key=value] [-m]`."""
    return cli.run(_train, argv)


def _train(argv: list[str]) -> int:
    arguments = read_arguments(argv)
    asked = (arguments.help, arguments.hydra_help, arguments.info, arguments.shell_completion)
    if any(asked):
        return _ask_hydra(argv)
    request = compose(argv)
    if request.shown is not None:
        print(request.shown)
        return 0
    if request.options.search.method != "none" and not request.space:
        raise RequestError(
            f"search={request.options.search.method} has nothing to choose: add -m and values such "
            "as optimizer=sgd,adam or 'optimizer.lr=tag(log,interval(1e-4,1e-1))'"
        )
    if request.options.plan:
        return _plan(request)
    if request.space:
        return _search(request, arguments)
    is_job = "cluster" in request.launcher
    return _sweep(request, argv) if request.is_sweep or is_job else _launch(request)


# torch is imported from here on, for those requests that need it


def _launch(request: Request) -> int:
    from cifar_lab.execute import Stop, execute
    from cifar_lab.run_dir import RunDir

    options = request.options
    with Stop().installed() as stop:
        _look_at_data([request.cells[0].config])
        run = RunDir.create(request.cells[0].config)
        execute(run, stop=stop, rerun=options.rerun, accept_code=options.accept_code)
    return 0


def _look_at_data(configs: Sequence[RunConfig]) -> None:
    """Refuse data that are wrong or out of reach before a folder is made, if they are needed."""
    from cifar_lab.building import check_data
    from cifar_lab.config import address
    from cifar_lab.run_dir import RunDir

    for config in configs:
        run = RunDir(address(config))
        if not run.summary_file.exists() or run.status != "finished":
            check_data(config)


def _sweep(request: Request, argv: Sequence[str]) -> int:
    from cifar_lab import sweep
    from cifar_lab.execute import Stop
    from cifar_lab.planning import DONE, sweep_cells

    options = request.options
    cells = sweep_cells(
        [cell.config for cell in request.cells], [cell.overrides for cell in request.cells]
    )
    run_all: Callable[..., list[sweep.Outcome]] = sweep.run_all
    if "cluster" in request.launcher:
        from cifar_lab import cluster

        run_all = functools.partial(cluster.run_all, launcher=request.launcher)
    with Stop().installed() as stop:
        _look_at_data([cell.config for cell in cells if cell.state() not in DONE])
        outcomes = run_all(
            cells,
            stop=stop,
            jobs=options.jobs,
            jobs_per_gpu=options.jobs_per_gpu,
            rerun=options.rerun,
            accept_code=options.accept_code,
            trust=options.trust,
            command=argv,
        )
        print(sweep.closing_table(outcomes), flush=True)
        sweep.raise_for(outcomes, stop)
    return 0


def _search(request: Request, arguments: Any) -> int:
    from cifar_lab import search, sweep
    from cifar_lab.execute import Stop
    from cifar_lab.planning import SweepCell, sweep_cells

    options = request.options
    if "cluster" in request.launcher:
        raise RequestError("search=optuna runs on this machine: leave hydra/launcher out")
    if options.rerun:
        raise RequestError("rerun=true is wrong in a search: choose another search.study instead")
    flags = []
    for flag, value in (
        ("--config-dir", arguments.config_dir),
        ("--config-name", arguments.config_name),
    ):
        flags += [flag, value] if value is not None else []

    def cell_of(lines: Sequence[str]) -> SweepCell:
        (cell,) = sweep_cells([compose([*flags, *request.fixed, *lines]).cells[0].config])
        return cell

    first = request.cells[0].config
    folder = Path(first.output_dir) / first.name / ".search"
    with Stop().installed() as stop:
        _look_at_data([first])
        outcomes = search.run_search(
            request.space,
            cell_of,
            options.search,
            folder,
            stop=stop,
            jobs=options.jobs,
            jobs_per_gpu=options.jobs_per_gpu,
            accept_code=options.accept_code,
            trust=options.trust,
        )
        print(search.closing_lines(options.search, folder), flush=True)
        sweep.raise_for(outcomes, stop)
    return 0


def _plan(request: Request) -> int:
    from cifar_lab.planning import plan, sweep_cells
    from cifar_lab.sweep import fitting_jobs

    cells = sweep_cells(
        [cell.config for cell in request.cells],
        [cell.overrides for cell in request.cells],
        alone=not request.is_sweep,
    )
    options = request.options
    jobs, _ = fitting_jobs([cell.config for cell in cells], options.jobs, options.jobs_per_gpu)
    print(plan(cells, jobs, rerun=options.rerun))
    if request.space:
        print(f"a search: {options.search.trials} trials such as these")
    return 0


def _ask_hydra(argv: list[str]) -> int:
    """Let Hydra answer what is its own: --help, --info, --version, shell completion."""
    import hydra

    from cifar_lab.door import config_path

    sys.argv[1:] = argv
    hydra.main(config_path=config_path(), config_name="config", version_base="1.3")(
        lambda _: None
    )()
    return 0


if __name__ == "__main__":
    sys.exit(main())
