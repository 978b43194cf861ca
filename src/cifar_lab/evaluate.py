"""Evaluate past runs from their folders alone."""

import sys
from collections.abc import Sequence

from cifar_lab import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m cifar_lab.evaluate RUN_DIR...`."""
    return cli.run(_evaluate, argv)


def _evaluate(argv: list[str]) -> int:
    parser = cli.Parser(prog="python -m cifar_lab.evaluate", description=__doc__)
    parser.add_argument("run_dir", nargs="+", help="a run folder")
    parser.add_argument("--device", default=None, help="auto, cuda, cuda:N, mps or cpu")
    parser.add_argument(
        "--trust", default=[], action="append", help="a module of your own that the run names"
    )
    arguments = parser.parse_args(argv)

    import dataclasses

    from cifar_lab import components
    from cifar_lab.evaluation import evaluate
    from cifar_lab.execute import draw_figures
    from cifar_lab.run_dir import RunDir

    components.trust(arguments.trust)
    for folder in arguments.run_dir:
        run = RunDir(folder)
        summary = run.read_summary()
        with run.lock():
            fields = evaluate(run, on=arguments.device)
            run.write_summary(dataclasses.replace(summary, **fields))
            draw_figures(run)
        print(
            f"{folder}: test accuracy of the {fields['scored_weights']} weights: "
            f"{fields['test_accuracy']:.2%}, loss {fields['test_loss']:.4f}, "
            f"{fields['test_size']:,} images"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
