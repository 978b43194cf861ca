"""Prove on this machine that a run stopped again and again ends as one that never stopped."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cifar_lab import cli
from cifar_lab.errors import UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m cifar_lab.prove_resume [GROUP=OPTION] [key=value] [--stops N]`."""
    return cli.run(_prove, argv)


def _prove(argv: list[str]) -> int:
    parser = cli.Parser("prove_resume", __doc__, takes_overrides=True)
    parser.add_argument("--stops", type=int, default=20, metavar="N", help="how often to stop (20)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of where it stops (0)"
    )
    arguments, overrides = parser.parse_with_overrides(argv)
    if not 1 <= arguments.stops <= 1000:
        raise UsageError(f"--stops {arguments.stops} is wrong: it must be from 1 to 1000")

    from cifar_lab.training.preflight import compose_checked

    request = compose_checked(["device=auto", *overrides])
    if request.shown is not None:
        print(request.shown)
        return 0
    if len(request.runs) != 1:
        raise UsageError("one run is proven at a time: give each key one value")

    from cifar_lab.analysis.resume_proof import prove

    with tempfile.TemporaryDirectory(prefix="cifar_lab-proof-") as folder:
        lines = prove(request.runs[0].config, Path(folder), arguments.stops, arguments.seed)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
