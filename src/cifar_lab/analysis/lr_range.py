"""The learning-rate range test: the loss while the rate grows, and the rate that it suggests."""

import contextlib
import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import UsageError
from cifar_lab.training.build import build_state
from cifar_lab.training.data import load_splits
from cifar_lab.training.device import configure, select_device
from cifar_lab.training.loop import Diverged, fit
from cifar_lab.training.schedule import Schedule

LOWEST, HIGHEST = 1e-7, 10.0
"""The rates of the first and the last step, as in fastai's `lr_find`."""

_SMOOTHING = 0.98
_TOO_HIGH = 4.0  # times the lowest smoothed loss: the test ends there
_SKIPPED_AT_END = 5

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RangeTest:
    """Learning rates (n,), loss of each step (n,), the same smoothed (n,), the rate suggested.

    `suggestion` is None where the loss never falls.
    """

    rates: Floats
    losses: Floats
    smoothed: Floats
    suggestion: float | None


def check_settings(config: RunConfig) -> float:
    """Return the learning rate that the test scales; UsageError if there is none."""
    rate = config.optimizer.get("lr")
    if not isinstance(rate, int | float) or rate <= 0:
        raise UsageError(
            f"--lr-range needs an optimizer.lr above 0 to scale, and it is {rate}; choose "
            "optimizer=sgd, or set optimizer.lr"
        )
    return float(rate)


def range_test(config: RunConfig, steps: int) -> RangeTest:
    """Train for `steps` steps whose rate grows exponentially from LOWEST to HIGHEST (Smith 2017).

    Everything else is as the run has it, but for its scheduler; the rates of several groups of
    parameters grow together. The test ends early where the loss diverges.
    """
    base = check_settings(config)
    device, _ = select_device(config.device)
    configure(device, config.threads, config.deterministic)
    splits = load_splits(config, device)
    constant = dataclasses.replace(config, scheduler=None)
    state, batches = build_state(constant, splits, device, initial_weights=True)
    rates = np.geomspace(LOWEST, HIGHEST, steps)
    growing = torch.optim.lr_scheduler.LambdaLR(
        state.optimizer, lambda step: float(rates[min(step, steps - 1)] / base)
    )
    state.schedule = Schedule(growing, "batch")
    training = dataclasses.replace(
        config.training,
        epochs=math.ceil(steps / len(batches)),
        patience=None,
        step_history=True,
        print_every=1,
    )
    losses: list[float] = []
    with contextlib.suppress(Diverged):  # a loss that is not finite has no place in a figure
        for progress in fit(state, batches, None, training):
            losses += [row.loss for row in progress.step_rows]
            smoothed = smooth(losses)
            diverged = len(losses) > 0 and smoothed[-1] > _TOO_HIGH * smoothed.min()
            if len(losses) >= steps or diverged:
                break
    rates, smoothed = rates[: len(losses)], smooth(losses[:steps])
    return RangeTest(rates, np.array(losses[:steps]), smoothed, suggest(rates, smoothed))


def smooth(losses: npt.ArrayLike) -> Floats:
    """Return the exponentially weighted mean of the losses so far, without the bias of its start.

    A loss counts 0.98 times as much as the one after it, as in fastai.
    """
    smoothed, total, weight = [], 0.0, 0.0
    for loss in np.asarray(losses, dtype=np.float64):
        total = _SMOOTHING * total + (1 - _SMOOTHING) * loss
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        smoothed.append(total / weight)
    return np.array(smoothed)


def suggest(rates: Floats, smoothed: Floats) -> float | None:
    """Return the rate at which the smoothed loss falls most steeply, None if it never falls.

    Steepness is the change per factor in the rate. As in fastai, the first tenth of the steps and
    the last five do not count.
    """
    chosen = slice(len(rates) // 10, -_SKIPPED_AT_END)
    slopes = np.diff(smoothed[chosen]) / np.diff(np.log(rates[chosen]))
    if not len(slopes) or slopes.min() >= 0:
        return None
    return float(rates[chosen][slopes.argmin()])
