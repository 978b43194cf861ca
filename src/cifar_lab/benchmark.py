"""Measure images per second of training and of its parts, beside two plain PyTorch loops.

They are that of the tutorials and a careful one. Everything is measured in turns, in one run; a
ratio is the median of the rounds' ratios.
"""

import json

from cifar_lab import cli


@cli.command
def main(argv: list[str]) -> int:
    """Run `python -m cifar_lab.benchmark [GROUP=OPTION] [key=value] [--seconds N] ...`."""
    parser = cli.Parser("benchmark", __doc__, takes_overrides=True)
    seconds = "about how long to measure (60); what does not fit is left out"
    parser.add_number("--seconds", seconds, 0.1, 86_400.0, 60.0)
    parser.add_output("--json", "write everything measured")
    parser.add_flag("--profile", "then show which operations the steps consist of")
    some = "measure some: epoch, careful, matmul, bound, data, plain, plain_data, or one by name"
    parser.add("--only", some, metavar="NAME,...")
    arguments, overrides = parser.parse_known_args(argv)
    config = cli.one_run(overrides, "a benchmark")
    if config is None:
        return 0

    from cifar_lab.runs.files import write_text
    from cifar_lab.throughput.report import benchmark, table

    only = arguments.only.split(",") if arguments.only is not None else []
    report = benchmark(config, seconds=arguments.seconds, only=only, profile=arguments.profile)
    print(table(report))
    if arguments.json is not None:
        write_text(arguments.json, json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
