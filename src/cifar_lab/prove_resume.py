"""Prove on this machine that a run stopped again and again ends as one that never stopped."""

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_lab import cli
from cifar_lab.errors import RunFailed, Stopped, UsageError

if TYPE_CHECKING:
    from cifar_lab.config.run_config import RunConfig
    from cifar_lab.runs.run_dir import RunDir


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
    with tempfile.TemporaryDirectory(prefix="cifar_lab-proof-") as folder:
        lines = prove(request.runs[0].config, Path(folder), arguments.stops, arguments.seed)
    print("\n".join(lines))
    return 0


def prove(config: "RunConfig", folder: Path, stops: int, seed: int = 0) -> list[str]:
    """Train once without and once with stops at random steps; return what was compared.

    Each part of the stopped run starts from its files alone. RunFailed if the two differ.
    """
    import dataclasses
    import logging

    import numpy as np

    from cifar_lab.runs.run_dir import RunDir
    from cifar_lab.training.loop import Progress
    from cifar_lab.training.run import run_experiment
    from cifar_lab.training.signals import Stop

    class StopAfter(Stop):
        """Stops at the yield with this number; counts the yields where it is None."""

        def __init__(self, number: int | None) -> None:
            super().__init__()
            self.number = number
            self.yields = 0

        def is_wanted(self, progress: Progress) -> bool:
            self.yields += 1
            return super().is_wanted(progress) or self.yields == self.number

    def with_name(name: str) -> RunDir:
        training = dataclasses.replace(
            config.training,
            print_every=1,  # a yield, and so a possible stop, after each step
            keep_last=True,
            tensorboard=False,
        )
        return RunDir.create(
            dataclasses.replace(
                config, training=training, tracker=None, output_dir=str(folder), name=name
            )
        )

    log = logging.getLogger("cifar_lab")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        once, often = with_name("once"), with_name("often")
        count = StopAfter(None)
        with count.installed():
            run_experiment(once, stop=count)
        wanted = min(stops, count.yields)
        generator = np.random.default_rng(seed)
        positions = sorted(generator.choice(count.yields, wanted, replace=False) + 1)
        done: list[str] = []
        before = 0
        for position in positions:
            stop = StopAfter(int(position - before))
            before = position
            with stop.installed():
                try:
                    run_experiment(often, stop=stop)
                except Stopped as stopped:
                    if stop.yields != stop.number:
                        raise  # a real signal
                    done.append(str(stopped))
        with Stop().installed() as real:
            run_experiment(often, stop=real)
    finally:
        log.setLevel(level)
    found = differences(once, often)
    if found:
        raise RunFailed(f"after {len(done)} stops the run is another one: {'; '.join(found[:5])}")
    summary = often.read_summary()
    return [
        *(line.partition(";")[0] for line in done),
        f"{len(done)} stops on {summary.device_name}, {summary.precision}: weights, optimizer, "
        "schedule, generators, best.pt, metrics.csv but for times, and predictions are the same, "
        "bit for bit",
    ]


def differences(one: "RunDir", other: "RunDir") -> list[str]:
    """Return what differs between two runs' files, but for times, in words."""
    import numpy as np

    from cifar_lab.runs.metrics import TIMES, columns

    found = []
    for path in (one.last, one.best):
        mine, theirs = _lasting(one, path.name), _lasting(other, path.name)
        found += [f"{path.name}: {where}" for where in _unlike(mine, theirs)]
    rows = [
        [{k: getattr(r, k) for k in columns(type(r)) if k not in TIMES} for r in run.read_metrics()]
        for run in (one, other)
    ]
    if rows[0] != rows[1]:
        found.append("metrics.csv")
    for path in sorted(one.path.glob("predictions*.npz")):
        arrays = [run.read_arrays(run.path / path.name) for run in (one, other)]
        if any(not np.array_equal(arrays[0][k], arrays[1][k]) for k in arrays[0]):
            found.append(path.name)
    return found


def _lasting(run: "RunDir", name: str) -> dict[str, Any]:
    """Return a checkpoint without its times; {} if there is none."""
    from cifar_lab.runs.checkpoints import load_checkpoint
    from cifar_lab.runs.metrics import TIMES, EpochMetrics, columns

    path = run.path / name
    if not path.exists():
        return {}
    state = load_checkpoint(path)
    state.pop("seconds", None)
    for table in ("history", "best"):
        if table in state:
            names = columns(EpochMetrics)[: state[table].shape[1]]
            kept = [i for i, name in enumerate(names) if name not in TIMES]
            state[table] = state[table][:, kept]
    return state


def _unlike(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Yield where two nested containers of tensors and plain values differ in a bit."""
    import torch

    if isinstance(one, Mapping) and isinstance(other, Mapping) and one.keys() == other.keys():
        for key in one:
            yield from _unlike(one[key], other[key], f"{where}.{key}".lstrip("."))
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            yield where
        for index, pair in enumerate(zip(one, other, strict=False)):
            yield from _unlike(*pair, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same_kind = one.dtype == other.dtype and one.shape == other.shape
        bits = [t.contiguous().view(-1).view(torch.uint8) for t in (one, other)]
        if not same_kind or not torch.equal(*bits):
            yield where
    elif type(one) is not type(other) or one != other:
        yield where


if __name__ == "__main__":
    sys.exit(main())
