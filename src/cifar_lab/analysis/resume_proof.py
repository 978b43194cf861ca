"""A run that is stopped again and again, beside one that never stopped: what differs."""

import dataclasses
import logging
from pathlib import Path

import numpy as np

from cifar_lab.analysis.run_differences import differences
from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import RunFailed, Stopped
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
        """Return whether a signal came, or this is the yield to stop at."""
        self.yields += 1
        return super().is_wanted(progress) or self.yields == self.number


def prove(config: RunConfig, folder: Path, stops: int, seed: int = 0) -> list[str]:
    """Train once without and once with stops at random steps; return what was compared.

    Each part of the stopped run starts from its files alone. RunFailed if the two differ.
    """
    once, often = (_new_run(config, folder, name) for name in ("once", "often"))
    log = logging.getLogger("cifar_lab")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        count = StopAfter(None)
        with count.installed():
            run_experiment(once, stop=count)
        wanted = min(stops, count.yields)
        generator = np.random.default_rng(seed)
        positions = sorted(generator.choice(count.yields, wanted, replace=False) + 1)
        steps = np.diff(positions, prepend=0)
        done = [line for line in (_run_until(often, int(step)) for step in steps) if line]
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


def _new_run(config: RunConfig, folder: Path, name: str) -> RunDir:
    training = dataclasses.replace(
        config.training,
        print_every=1,  # a yield, and so a possible stop, after each step
        keep_last=True,
    )
    return RunDir.create(
        dataclasses.replace(
            config, training=training, tracker=None, output_dir=str(folder), name=name
        )
    )


def _run_until(run: RunDir, number: int) -> str | None:
    """Continue a run from its files until the yield with this number; return how it stopped."""
    stop = StopAfter(number)
    with stop.installed():
        try:
            run_experiment(run, stop=stop)
        except Stopped as stopped:
            if stop.yields != stop.number:
                raise  # a real signal
            return str(stopped)
    return None
