"""Time loops in turns, so that what else the machine does affects all alike.

The loops run as A B C A B C ..., and a ratio is the median of the ratios within each round.
Absolute times of two runs of this program are hardly comparable.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from cifar_lab.errors import UsageError, first_line

_ROUNDS = 5
_FEWEST_ROUNDS = 3
_TURN_SECONDS = (0.05, 2.0)
# What a loop raises that this machine does not support: it becomes a row with the reason.
_UNSUPPORTED = (RuntimeError, OSError, ImportError, UsageError)


@dataclass
class Loop:
    """Something to measure: `start` returns endless steps, which yield their number of images.

    `rates` are the images per second of its turns, none if a `problem` prevented them. `ahead`
    steps are ready when a turn begins, since workers made them meanwhile, and do not count.
    """

    name: str
    group: str
    label: str
    start: Callable[[], Iterator[int]]
    ahead: int = 0
    rates: list[float] = field(default_factory=list)
    problem: str | None = None


def measure(
    loops: Sequence[Loop], seconds: float, wait: Callable[[], None], *, all_of_them: bool = False
) -> None:
    """Let the loops take turns for about `seconds`, at least three each; fill in their rates.

    Loops that are not started within the first third of the time are left out, unless
    `all_of_them` are asked for. `wait` waits for the device, whose work would otherwise count for
    the next turn.
    """
    began = time.perf_counter()
    started: dict[str, Iterator[int]] = {}

    def turn(loop: Loop, length: float) -> None:
        try:
            steps = started.get(loop.name) or started.setdefault(loop.name, loop.start())
            for _ in range(loop.ahead):
                next(steps)
            wait()
            since = time.perf_counter()
            images = next(steps)
            while time.perf_counter() - since < length:
                images += next(steps)
            wait()
            loop.rates.append(images / (time.perf_counter() - since))
        except _UNSUPPORTED as error:
            loop.problem = f"{type(error).__name__}: {first_line(error, 120)}"

    for loop in loops:
        if loop is not loops[0] and not all_of_them and time.perf_counter() - began > seconds / 3:
            loop.problem = f"no time for it in {seconds:g} s"
        else:
            turn(loop, 0.0)  # allocates, compiles, starts workers
            loop.rates.clear()
    working = [loop for loop in loops if loop.problem is None]
    left = seconds - (time.perf_counter() - began)
    shortest, longest = _TURN_SECONDS
    length = min(max(left / (_ROUNDS * max(len(working), 1)), shortest), longest)
    rounds = 0
    while working and (rounds < _FEWEST_ROUNDS or time.perf_counter() - began < seconds):
        for loop in working:
            turn(loop, length)
        working = [loop for loop in working if loop.problem is None]
        rounds += 1


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile of two values or more."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def ratio(loop: Loop, other: Loop) -> tuple[float, float, float]:
    """Return how much faster a loop is than another, round by round: `quartiles`."""
    return quartiles([a / b for a, b in zip(loop.rates, other.rates, strict=True)])
