"""Measure images per second of training and of its parts, beside a plain PyTorch loop."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_lab import cli
from cifar_lab.errors import RequestError

if TYPE_CHECKING:
    from cifar_lab.speed import Report


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m cifar_lab.benchmark [GROUP=OPTION] [key=value] [--seconds N] ...`."""
    return cli.run(_benchmark, argv)


def _benchmark(argv: list[str]) -> int:
    parser = cli.Parser(
        prog="python -m cifar_lab.benchmark",
        usage="%(prog)s [GROUP=OPTION] [key=value] [options]",
        description=__doc__,
        epilog="All is measured in turns, in one run; a ratio is the median of the rounds' ratios.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--seconds", type=_seconds, default=60.0, help="time to measure, after warming up (60)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw a bar chart")
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=[],
        metavar="NAME,...",
        help="measure some: bound, epoch, data, plain, plain_data, options, matmul, or one by name",
    )
    arguments, overrides = parser.parse_known_args(argv)
    for file in (arguments.json, arguments.figure):
        if file is not None and not file.parent.is_dir():
            raise RequestError(f"{file} cannot be written: there is no folder {file.parent}")

    from cifar_lab.door import compose

    request = compose(overrides)
    if request.shown is not None:
        print(request.shown)
        return 0
    if len(request.cells) != 1:
        raise RequestError(f"a benchmark is of one run, but this is {len(request.cells)}")

    from cifar_lab.speed import benchmark

    report = benchmark(request.cells[0].config, seconds=arguments.seconds, only=arguments.only)
    print(table(report))
    if arguments.json is not None:
        from cifar_lab.files import write_text

        write_text(arguments.json, _to_json(report))
    if arguments.figure is not None:
        from cifar_lab.figures.speed import draw_speeds

        draw_speeds(report.to_plain()).savefig(arguments.figure, dpi=150)
    return 0


def table(report: "Report") -> str:
    """Return ratios, then speeds, as aligned text that is valid Markdown."""
    machine, run = report.machine, report.run
    labels = {speed.name: speed.label for speed in report.speeds}
    lines = [
        f"{run.get('model', 'model')} on {run['dataset']} ({run['images']} images), "
        f"batch {run['batch_size']}, {run['precision']}, {run['parameters']:,} parameters, "
        f"{report.multiply_adds / 1e6:,.1f} M multiply-adds an image and step",
        f"{machine['device']}, {machine['cores']} cores, {machine['instructions']}, "
        f"torch {machine['torch']}",
        "",
    ]
    ratios: list[tuple[str, ...]] = [("ratio of images/s", "median", "quartiles")]
    ratios += [
        (f"{labels[r.name]} / {labels[r.over]}", f"{r.median:.3g}", f"{r.low:.3g} to {r.high:.3g}")
        for r in report.ratios
    ]
    lines += [*_aligned(ratios), ""]
    speeds: list[tuple[str, ...]] = [
        ("", "images/s", "quartiles", "G multiply-adds/s", "share of matmul")
    ]
    speeds += [_speed_row(report, number) for number in range(len(report.speeds))]
    return "\n".join(lines + _aligned(speeds))


def _speed_row(report: "Report", number: int) -> tuple[str, ...]:
    speed = report.speeds[number]
    if speed.problem is not None:
        return (speed.label, "none", speed.problem, "", "")
    low, high = speed.quartiles
    if speed.group == "matmul":
        return (speed.label, "", "", f"{speed.median / 1e9:,.1f}", "1")
    row = (speed.label, f"{speed.median:,.0f}", f"{low:,.0f} to {high:,.0f}")
    if speed.group in ("data", "plain_data"):
        return (*row, "", "")
    reached = speed.median * report.multiply_adds
    share = f"{reached / report.ceiling:.2g}" if report.ceiling else ""
    return (*row, f"{reached / 1e9:,.1f}", share)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows = [rows[0], tuple("-" * width for width in widths), *rows[1:]]
    return [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]


def _to_json(report: "Report") -> str:
    import json

    return json.dumps(report.to_plain(), indent=2) + "\n"


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86_400:
        raise RequestError(f"--seconds {text} is wrong: it must be a number from 0 to 86400")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
