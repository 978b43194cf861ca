"""The learning-rate range test: the loss while the rate grows, and the rates that it suggests."""

import contextlib
import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import RunFailed, UsageError
from cifar_lab.training.build import build_state
from cifar_lab.training.data import load_splits
from cifar_lab.training.device import configure, select_device
from cifar_lab.training.loop import Diverged, fit
from cifar_lab.training.schedule import Schedule

LOWEST, HIGHEST = 1e-7, 10.0
"""The rates of the first and the last step, as in fastai's `lr_find`."""

STEPS = 300
_WINDOW = 6.0  # steps on either side, about, whose losses are averaged: a sixth of a decade
_TOO_HIGH = 4.0  # times the lowest smoothed loss: the test ends there, as in fastai
_HARDLY = 0.1  # of the loss at the start: where it fell by less, the test says little

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Advice:
    """Learning rates worth a try.

    The loss begins to fall at `low`, and is lowest at `high`, beyond which it rises; `suggestion`
    is well below that. `fall` is the share of the loss at the start that it fell by.
    """

    low: float
    high: float
    suggestion: float
    fall: float


@dataclass(frozen=True)
class RangeTest:
    """Learning rates (n,), loss of each step (n,), the same smoothed (n,), and what they suggest.

    `advice` is None where the loss never falls.
    """

    rates: Floats
    losses: Floats
    smoothed: Floats
    advice: Advice | None

    def lines(self) -> list[str]:
        """Return what was measured, in words."""
        advice = self.advice
        ended = "" if self.rates[-1] == HIGHEST else f", at {self.rates[-1]:.2g} the loss diverged"
        lines = [f"learning rate from {LOWEST:g} to {HIGHEST:g} in {STEPS} steps{ended}"]
        if advice is None:
            return [*lines, "no suggestion: the smoothed loss never falls"]
        lines += [
            f"range: {advice.low:.2g}, where the loss begins to fall, to {advice.high:.2g}, where "
            f"it is lowest ({self.smoothed.min():.4f})",
            f"suggestion: optimizer.lr={advice.suggestion:.2g}",
        ]
        if advice.fall < _HARDLY:
            lines.append(
                f"warning: the loss fell by {advice.fall:.0%} only, so that this says little: try "
                "a grid of rates, or a larger batch"
            )
        return lines


def check_settings(config: RunConfig) -> float:
    """Return the learning rate that the test scales; UsageError if there is none."""
    rate = config.optimizer.get("lr")
    if not isinstance(rate, int | float) or rate <= 0:
        raise UsageError(
            f"--lr-range needs an optimizer.lr above 0 to scale, and it is {rate}; choose "
            "optimizer=sgd, or set optimizer.lr"
        )
    return float(rate)


def range_test(config: RunConfig, steps: int = STEPS) -> RangeTest:
    """Train for `steps` steps whose rate grows exponentially from LOWEST to HIGHEST (Smith 2017).

    Everything else is as the run has it, but for its scheduler; the rates of several groups of
    parameters grow together. The test ends early where the loss diverges; RunFailed if that is in
    the first step.
    """
    base = check_settings(config)
    device = select_device(config.device)
    configure(device, config.threads, config.deterministic)
    splits = load_splits(config, device)
    constant = dataclasses.replace(config, scheduler=None)
    state, batches = build_state(constant, splits, device, initial_weights=True)
    rates = np.geomspace(LOWEST, HIGHEST, steps)
    growing = torch.optim.lr_scheduler.LambdaLR(
        state.optimizer, lambda step: float(rates[min(step, steps - 1)] / base)
    )
    state.schedule = Schedule(growing, "batch")
    epochs = math.ceil(steps / len(batches))
    training = dataclasses.replace(config.training, epochs=epochs, patience=None)
    training = dataclasses.replace(training, step_history=True, print_every=1)
    losses: list[float] = []
    with contextlib.suppress(Diverged):  # a loss that is not finite has no place in a figure
        for progress in fit(state, batches, None, training):
            losses += [row.loss for row in progress.step_rows]
            recent = losses[-int(_WINDOW) :]
            diverged = losses and np.mean(recent) > _TOO_HIGH * smooth(losses).min()
            if len(losses) >= steps or diverged:
                break
    if not losses:
        raise RunFailed(f"the loss is not finite in the first step, at a rate of {LOWEST:g}")
    rates, smoothed = rates[: len(losses)], smooth(losses[:steps])
    return RangeTest(rates, np.array(losses[:steps]), smoothed, advise(rates, smoothed))


def smooth(losses: npt.ArrayLike) -> Floats:
    """Return the mean of the losses around each step, weighted by a Gaussian.

    Both neighbours count, so that the curve does not lag behind the rate; at the ends the weights
    of the steps that there are add up to one.
    """
    values = np.asarray(losses, dtype=np.float64)
    steps = np.arange(len(values))
    weights = np.exp(-0.5 * ((steps[:, None] - steps) / _WINDOW) ** 2)
    smoothed: Floats = weights @ values / weights.sum(axis=1)
    return smoothed


def advise(rates: Floats, smoothed: Floats) -> Advice | None:
    """Return the range of rates at which the loss falls, and one to train with, or None.

    That one lies at two thirds of the way, on the log axis, as in fastai's `valley`.
    """
    start = float(smoothed[: max(len(rates) // 10, 1)].mean())
    lowest = int(smoothed.argmin())
    fall = start - float(smoothed[lowest])
    if fall <= 0 or lowest == 0:
        return None
    fallen = np.flatnonzero(smoothed[: lowest + 1] <= start - 0.1 * fall)
    low, high = float(rates[fallen[0]]), float(rates[lowest])
    return Advice(low, high, low ** (1 / 3) * high ** (2 / 3), fall / start)
