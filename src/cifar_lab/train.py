"""Train and evaluate one run, or with -m (or an experiment that is a grid) many."""

import sys
from collections.abc import Sequence

from cifar_lab import cli
from cifar_lab.door import Request, compose, read_arguments


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
    return _launch(request)


def _launch(request: Request) -> int:
    # torch is imported from here on
    from cifar_lab.execute import Stop, execute
    from cifar_lab.run_dir import RunDir

    options = request.options
    with Stop().installed() as stop:
        run = RunDir.create(request.cells[0].config)
        execute(run, stop=stop, rerun=options.rerun, accept_code=options.accept_code)
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
