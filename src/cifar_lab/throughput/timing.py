"""Time loops in turns, so that what else the machine does affects all alike.

The loops run as A B C A B C ..., and a ratio is the median of the ratios within each round.
Absolute times of two runs of this program are hardly comparable.
"""

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from cifar_lab.errors import UsageError, first_line

_ROUNDS = 5
_FEWEST_ROUNDS = 3
_SLICE_SECONDS = (0.05, 2.0)
# What a loop raises that this machine does not support: it becomes a row with the reason.
_UNSUPPORTED = (RuntimeError, OSError, ImportError, UsageError)


@dataclass(frozen=True)
class Loop:
    """Something to measure: `turn` works for so many seconds and returns images per second.

    `start_seconds` is about how long the first turn takes to start, where that is long.
    """

    name: str
    group: str
    label: str
    turn: Callable[[float], float]
    start_seconds: float = 0.0


@dataclass
class Speed:
    """What was measured: images per second of each round, their median and quartiles.

    Nothing, if a `problem` prevented it, or if it was `left_out` for lack of time.
    """

    name: str
    group: str
    label: str
    rates: list[float] = field(default_factory=list)
    images_per_second: float | None = None
    quartiles: tuple[float, float] | None = None
    problem: str | None = None
    left_out: bool = False


@dataclass(frozen=True)
class Ratio:
    """How much faster `name` is than `over`: median and quartiles of the rounds' ratios."""

    name: str
    over: str
    median: float
    low: float
    high: float


def rate(steps: Iterator[int], seconds: float, synchronise: Callable[[], None]) -> float:
    """Do steps, at least one, for so many seconds; return images per second.

    `synchronise` waits for the device, whose work would otherwise count for the next turn.
    """
    synchronise()
    started = time.perf_counter()
    images = next(steps)
    while time.perf_counter() - started < seconds:
        images += next(steps)
    synchronise()
    return images / (time.perf_counter() - started)


def measure(
    loops: Sequence[Loop],
    *,
    seconds: float,
    required: Collection[str] = (),
    show: Callable[[str], None] = lambda label: None,
) -> list[Speed]:
    """Time the loops in turns, for about `seconds` from the first start to the last turn.

    The first loop that works and those in `required` are measured at least three times, however
    long that takes. Of the others, those that do not fit into the time are left out. `show` is
    called with the label of each loop when its turn begins.
    """
    deadline = time.perf_counter() + seconds
    speeds = [Speed(loop.name, loop.group, loop.label) for loop in loops]
    shortest, longest = _SLICE_SECONDS

    def turn(loop: Loop, speed: Speed, slice_seconds: float) -> None:
        show(loop.label)
        try:
            speed.rates.append(loop.turn(slice_seconds))
        except _UNSUPPORTED as error:
            speed.problem = f"{type(error).__name__}: {first_line(error, 120)}"

    chosen: list[tuple[Loop, Speed]] = []
    planned = 0.0  # seconds of the shortest possible turns of the chosen loops
    for loop, speed in zip(loops, speeds, strict=True):
        is_optional = loop.name not in required and planned > 0
        speed.left_out = is_optional and _until(deadline) < planned + loop.start_seconds
        if speed.left_out:
            continue
        turn(loop, speed, 0.0)  # starts processes, allocates and compiles
        started = time.perf_counter()
        if speed.problem is None:
            turn(loop, speed, 0.0)
        speed.rates.clear()
        needed = _FEWEST_ROUNDS * max(time.perf_counter() - started, shortest)
        speed.left_out = is_optional and _until(deadline) < planned + needed
        if speed.problem is None and not speed.left_out:
            chosen.append((loop, speed))
            planned += needed

    share = _until(deadline) / (_ROUNDS * max(len(chosen), 1))
    rounds, round_seconds = 0, 0.0
    while chosen and (rounds < _FEWEST_ROUNDS or round_seconds < _until(deadline)):
        started = time.perf_counter()
        for loop, speed in chosen:
            turn(loop, speed, min(max(share, shortest), longest))
        chosen = [(loop, speed) for loop, speed in chosen if speed.problem is None]
        round_seconds = time.perf_counter() - started
        rounds += 1
    for speed in speeds:
        if speed.problem is None and speed.rates:
            speed.images_per_second, speed.quartiles = _middle(speed.rates)
    return speeds


def _until(deadline: float) -> float:
    return deadline - time.perf_counter()


def ratio(speeds: Sequence[Speed], name: str, over: str) -> Ratio | None:
    """Return how much faster one speed is than another, round by round; None if one is missing."""
    rates = {speed.name: speed.rates for speed in speeds if speed.images_per_second}
    if name not in rates or over not in rates:
        return None
    median, (low, high) = _middle([a / b for a, b in zip(rates[name], rates[over], strict=False)])
    return Ratio(name, over, median, low, high)


def _middle(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return the median and the quartiles."""
    if len(values) == 1:
        return values[0], (values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, (low, high)
