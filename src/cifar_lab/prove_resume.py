"""Prove on this machine that a run stopped again and again ends as one that never stopped."""

import tempfile
from pathlib import Path

from cifar_lab import cli


@cli.command
def main(argv: list[str]) -> int:
    """Run `python -m cifar_lab.prove_resume [GROUP=OPTION] [key=value] [--stops N]`."""
    parser = cli.Parser("prove_resume", __doc__, takes_overrides=True)
    parser.add_number("--stops", "how often to stop (20)", 1, 1000, 20)
    parser.add_number("--seed", "seed of where it stops (0)", 0, 2**32, 0)
    arguments, overrides = parser.parse_known_args(argv)
    config = cli.one_run(["device=auto", *overrides], "a proof")
    if config is None:
        return 0

    from cifar_lab.analysis.resume_proof import prove

    with tempfile.TemporaryDirectory(prefix="cifar_lab-proof-") as folder:
        lines = prove(config, Path(folder), arguments.stops, arguments.seed)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
