"""Measure images per second of training and of its parts, beside a plain PyTorch loop."""

import json
import sys
import time
from collections.abc import Sequence

from cifar_lab import cli
from cifar_lab.errors import shows_bars


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m cifar_lab.benchmark [GROUP=OPTION] [key=value] [--seconds N] ...`."""
    return cli.run(_benchmark, argv)


def _parser() -> cli.Parser:
    parser = cli.Parser(
        "benchmark",
        "Measure images per second of training and of its parts, beside two plain PyTorch loops:\n"
        "that of the tutorials, and a careful one.\n"
        "Everything is measured in turns, in one run; a ratio is the median of the rounds' ratios.",
        takes_overrides=True,
    )
    seconds = "about how long to measure (60); what does not fit is left out"
    parser.add_number("--seconds", 0.1, 86_400.0, default=60.0, help=seconds)
    parser.add_output("--json", help="write everything measured")
    parser.add_argument(
        "--profile", action="store_true", help="then show which operations the steps consist of"
    )
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=[],
        metavar="NAME,...",
        help="measure some: epoch, careful, matmul, bound, data, plain, plain_data, or one by name",
    )
    return parser


def _benchmark(argv: list[str]) -> int:
    arguments, overrides = _parser().parse_known_args(argv)
    config = cli.one_run(overrides, "a benchmark")
    if config is None:
        return 0
    from tqdm.auto import tqdm

    from cifar_lab.runs.files import write_text
    from cifar_lab.throughput.report import benchmark, table

    form, began = "{bar:20} {n:.0f}/{total:.0f} s  {desc}", time.monotonic()
    with tqdm(
        total=arguments.seconds, disable=not shows_bars(), leave=False, bar_format=form
    ) as bar:

        def show(label: str) -> None:
            bar.n = min(time.monotonic() - began, arguments.seconds)
            bar.set_description_str(label)

        report = benchmark(
            config,
            seconds=arguments.seconds,
            only=arguments.only,
            profile=arguments.profile,
            show=show,
        )
    print(table(report))
    if arguments.json is not None:
        write_text(arguments.json, json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
