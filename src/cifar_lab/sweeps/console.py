"""The live line of a sweep, or without a terminal a plain line for each cell that ends."""

import logging
import time
from collections.abc import Sequence
from typing import Any

from cifar_lab.errors import shows_bars
from cifar_lab.runs.text import duration
from cifar_lab.sweeps.cell import Cell
from cifar_lab.sweeps.outcome import Outcome
from cifar_lab.sweeps.timing import Pace
from cifar_lab.training.console import bar_class

log = logging.getLogger("cifar_lab")


class LiveLine:
    """How many of `total` cells are done, running and failed, and the time left."""

    def __init__(self, total: int, pace: Pace) -> None:
        self._total, self._pace = total, pace
        self._bar: Any = None
        self._shown = 0.0
        self._failed = 0

    def __enter__(self) -> "LiveLine":
        if shows_bars():
            self._bar = bar_class()(
                total=self._total,
                desc="cells",
                dynamic_ncols=True,
                leave=False,
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}",
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def ended(self, outcome: Outcome) -> None:
        """Report that a cell has ended; on a terminal only if it did not finish."""
        self._failed += outcome.has_failed
        self._pace.learn(outcome.cell)
        if self._bar is None or outcome.code:
            log.info(
                "%s: %s in %s%s",
                outcome.cell.run.path.name,
                outcome.after,
                duration(outcome.seconds),
                f" ({outcome.error})" if outcome.error else "",
            )

    def show(self, running: Sequence[Cell], waiting: Sequence[Cell], slots: int) -> None:
        """Bring the live line up to date, at most once a second."""
        if self._bar is None or time.monotonic() - self._shown < 1:
            return
        self._shown = time.monotonic()
        left = self._pace.time_left([*running, *waiting], slots)
        self._bar.set_postfix_str(
            f"{len(running)} running, {self._failed} failed"
            + (f", {duration(left)} left" if left is not None else ""),
            refresh=False,
        )
        self._bar.update(self._total - len(running) - len(waiting) - self._bar.n)
        self._bar.refresh()
