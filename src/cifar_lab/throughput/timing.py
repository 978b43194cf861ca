"""Time variants of a computation in turns, so that what else the machine does affects all alike.

The variants run as A B C A B C ..., and a ratio is the median of the ratios within each round.
Absolute times of two runs of this program are hardly comparable.
"""

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from cifar_lab.errors import UsageError, first_line

_ROUNDS = 5
_FEWEST_ROUNDS = 3
_SLICE_SECONDS = (0.05, 2.0)
# What an option raises that this machine does not support: it becomes a row with the reason.
_UNSUPPORTED = (RuntimeError, OSError, ImportError, UsageError)


@dataclass(frozen=True)
class Variant:
    """Something to measure: `start` returns an iterator that yields each step's number of images.

    `restart` asks for a new iterator in each turn, whose first `warm_up` steps are not timed, so
    that worker processes neither deliver images prepared before the turn nor go on working after
    it. `start_seconds` is about how long the first start takes, where that is long.
    """

    name: str
    group: str
    label: str
    start: Callable[[], Iterator[int]]
    warm_up: int = 2
    restart: bool = False
    threads: int | None = None
    start_seconds: float = 0.0


@dataclass
class Speed:
    """What was measured: images per second of each round, or the problem that prevented it.

    `left_out`: there was not enough time.
    """

    name: str
    group: str
    label: str
    rates: list[float] = field(default_factory=list)
    problem: str | None = None
    left_out: bool = False

    @property
    def median(self) -> float:
        """Images per second, the median of the rounds."""
        return statistics.median(self.rates) if self.rates else float("nan")

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper quartile of the rounds."""
        return _quartiles(self.rates)


@dataclass(frozen=True)
class Ratio:
    """How much faster `name` is than `over`: median and quartiles of the rounds' ratios."""

    name: str
    over: str
    median: float
    low: float
    high: float


def measure(
    variants: Sequence[Variant],
    *,
    seconds: float,
    synchronise: Callable[[], None],
    required: Collection[str] = (),
    show: Callable[[str], None] = lambda label: None,
) -> list[Speed]:
    """Time the variants in turns, for about `seconds` from the first start to the last turn.

    The first variant that works and those in `required` are measured at least three times, however
    long that takes. Of the others, those that do not fit into the time are left out. `show` is
    called with the label of each variant when its turn begins.
    """
    return _Measurement(variants, seconds, synchronise, required, show).run()


@dataclass(frozen=True)
class _Turn:
    """Images per second, and the seconds that such a turn takes, warm-up steps included."""

    rate: float
    seconds: float


class _Measurement:
    def __init__(
        self,
        variants: Sequence[Variant],
        seconds: float,
        synchronise: Callable[[], None],
        required: Collection[str],
        show: Callable[[str], None],
    ) -> None:
        self._variants = variants
        self._deadline = time.perf_counter() + seconds
        self._synchronise = synchronise
        self._required = set(required)
        self._show = show
        self._speeds = {v.name: Speed(v.name, v.group, v.label) for v in variants}
        self._running: dict[str, Iterator[int]] = {}

    def run(self) -> list[Speed]:
        self._start_all()
        low, high = _SLICE_SECONDS
        share = self._left() / (_ROUNDS * max(len(self._ready()), 1))
        slice_seconds = min(max(share, low), high)
        rounds, round_seconds = 0, 0.0
        while self._ready() and (rounds < _FEWEST_ROUNDS or round_seconds < self._left()):
            started = time.perf_counter()
            for variant in self._ready():
                turn = self._turn(variant, slice_seconds)
                if turn is not None:
                    self._speeds[variant.name].rates.append(turn.rate)
            round_seconds = time.perf_counter() - started
            rounds += 1
        return list(self._speeds.values())

    def _ready(self) -> list[Variant]:
        """Return the variants that work here and are not left out."""
        speeds = self._speeds
        return [
            v for v in self._variants if not (speeds[v.name].problem or speeds[v.name].left_out)
        ]

    def _start_all(self) -> None:
        """Start the variants, and leave those out that do not fit into the time."""
        planned = 0.0  # for the shortest possible turns of the variants that are in
        for variant in self._variants:
            is_optional = variant.name not in self._required and planned > 0
            if is_optional and self._left() < planned + variant.start_seconds:
                self._speeds[variant.name].left_out = True
                continue
            first = self._turn(variant, 0.0)  # compiles and allocates
            if first is not None and variant.restart:  # later turns do not start a process
                first = self._turn(variant, 0.0)
            if first is None:
                continue
            turn = max(first.seconds, _SLICE_SECONDS[0])
            if is_optional and self._left() < planned + _FEWEST_ROUNDS * turn:
                self._speeds[variant.name].left_out = True
            else:
                planned += _FEWEST_ROUNDS * turn

    def _left(self) -> float:
        return self._deadline - time.perf_counter()

    def _turn(self, variant: Variant, seconds: float) -> "_Turn | None":
        """Do at least one step; return None if the variant does not work here."""
        self._show(variant.label)
        threads = torch.get_num_threads()
        if variant.threads is not None:
            torch.set_num_threads(variant.threads)
        try:
            return self._time(variant, seconds)
        except _UNSUPPORTED as error:
            speed = self._speeds[variant.name]
            speed.problem = f"{type(error).__name__}: {first_line(error, 120)}"
            speed.rates.clear()
            return None
        finally:
            if variant.threads is not None:
                torch.set_num_threads(threads)

    def _time(self, variant: Variant, seconds: float) -> "_Turn":
        began = time.perf_counter()
        if variant.name not in self._running or variant.restart:
            self._running[variant.name] = variant.start()
            for _ in range(variant.warm_up):
                next(self._running[variant.name])
        steps = self._running[variant.name]
        self._synchronise()
        started = time.perf_counter()
        images = next(steps)
        while time.perf_counter() - started < seconds:
            images += next(steps)
        self._synchronise()
        rate = images / (time.perf_counter() - started)
        if not variant.restart:
            return _Turn(rate, time.perf_counter() - started)
        self._running.pop(variant.name).close()  # type: ignore[attr-defined]
        return _Turn(rate, time.perf_counter() - began)


def ratio(speeds: Sequence[Speed], name: str, over: str) -> Ratio | None:
    """Return how much faster one speed is than another, round by round; None if one is missing."""
    found = {speed.name: speed.rates for speed in speeds}
    if not found.get(name) or not found.get(over):
        return None
    ratios = [a / b for a, b in zip(found[name], found[over], strict=False)]
    return Ratio(name, over, statistics.median(ratios), *_quartiles(ratios))


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return (values[0], values[0]) if values else (float("nan"), float("nan"))
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
