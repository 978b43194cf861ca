"""What became of the cells of a sweep: live, in the closing table, as the command's exit code."""

import contextlib
import logging
import os
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_lab.analysis import run_metrics
from cifar_lab.analysis.grouping import collect
from cifar_lab.analysis.load_runs import FoundRun
from cifar_lab.analysis.ranking import conclusion
from cifar_lab.errors import RunFailed, Stopped, Unavailable, UsageError, shorten, shows_bars
from cifar_lab.runs.text import align, duration
from cifar_lab.sweeps.cell import STOPPED, Cell, short_names
from cifar_lab.sweeps.timing import Pace
from cifar_lab.training.console import bar_class
from cifar_lab.training.signals import Stop

log = logging.getLogger("cifar_lab")


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: its state before and after, wall clock seconds, exit code, error."""

    cell: Cell
    before: str
    after: str
    seconds: float = 0.0
    code: int = 0
    error: str | None = None

    @property
    def has_failed(self) -> bool:
        """Whether the run failed, as opposed to being stopped or unavailable now."""
        return self.code not in (0, 3, *STOPPED)


class LiveLine:
    """How many of `total` cells are done, running and failed, and the time left.

    Without a terminal it is a plain line for each cell that ends.
    """

    def __init__(self, total: int, pace: Pace) -> None:
        self._total, self._pace = total, pace
        self._next = 0.0
        self._failed = 0
        self._left: float | None = None  # seconds until all is done
        self._bar: Any = None
        if shows_bars():
            layout = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}"
            self._bar = bar_class()(
                total=total, desc="cells", dynamic_ncols=True, leave=False, bar_format=layout
            )

    def close(self) -> None:
        """Remove the line."""
        if self._bar is not None:
            self._bar.close()

    def ended(self, outcome: Outcome, left: int) -> None:
        """Report that a cell has ended, and how many are left; on a terminal only if it failed."""
        self._failed += outcome.has_failed
        self._pace.learn(outcome.cell)
        if self._bar is None or outcome.code:
            parts = [f"{outcome.after} in {duration(outcome.seconds)}"]
            name, score = _score(outcome)
            parts += [f"{name.removesuffix(' accuracy')} {score}"] if score != "-" else []
            parts += [f"{duration(self._left)} left"] if left and self._left else []
            error = f" ({outcome.error})" if outcome.error else ""
            done, folder = self._total - left, outcome.cell.run.path.name
            log.info("[%d/%d] %s: %s%s", done, self._total, folder, ", ".join(parts), error)

    def show(self, running: Sequence[Cell], waiting: Sequence[Cell], slots: int) -> None:
        """Bring the live line up to date, about once a second; tell the time of all cells once.

        It is known from the start where such runs are finished, else after the first epoch.
        """
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 1 + len(waiting) / 1000  # a file of each is looked for
        is_new = self._left is None
        for cell in running if is_new else ():
            self._pace.learn_running(cell)
        self._left = self._pace.time_left([*running, *waiting], slots)
        time_left = f"{duration(self._left)} left" if self._left is not None else ""
        if is_new and time_left:
            log.info("about %s, if no run stops early", time_left)
        if self._bar is not None:
            text = f"{len(running)} running, {self._failed} failed"
            self._bar.set_postfix_str(", ".join(filter(None, [text, time_left])), refresh=False)
            self._bar.update(self._total - len(running) - len(waiting) - self._bar.n)
            self._bar.refresh()


def closing_table(outcomes: Sequence[Outcome]) -> str:
    """Return what became of each cell, what `summarize` says of the best, and that command."""
    names = short_names(list(outcomes[0].cell.axes))
    monitors = {_score(outcome)[0] for outcome in outcomes}
    monitor = monitors.pop() if len(monitors) == 1 else "score"
    rows = [[*names, "before", "after", monitor, "time", "folder", "error"]]
    finished: list[FoundRun] = []
    for outcome in outcomes:
        cell, (name, score) = outcome.cell, _score(outcome)
        score = score if name == monitor else f"{name} {score}"
        seconds = duration(outcome.seconds) if outcome.seconds else "-"
        error = shorten((outcome.error or "").replace(f"{cell.run.path}/", ""), 160)
        row = [outcome.before, outcome.after, score, seconds, str(cell.run.path), error]
        rows.append([*cell.axes.values(), *row])
        if outcome.after == "finished":
            with contextlib.suppress(UsageError, RunFailed):  # `summarize` names what is damaged
                finished.append(FoundRun(cell.run))
    counts = Counter(outcome.after for outcome in outcomes)
    folder = Path(os.path.commonpath([outcome.cell.run.path.parent for outcome in outcomes]))
    lines = [*align(rows), ", ".join(f"{number} {state}" for state, number in counts.items())]
    lines += conclusion(collect(folder, finished)) if finished else []
    return "\n".join(
        [*lines, f"to compare them: python -m cifar_lab.summarize {shlex.quote(str(folder))}"]
    )


def _score(outcome: Outcome) -> tuple[str, str]:
    """Return the score that a run monitors and its best value, - where there is none."""
    name = f"best_{outcome.cell.config.training.monitor}"
    summary = outcome.cell.summary() if outcome.after != "damaged" else None
    value = getattr(summary, name, None)
    shown = run_metrics.show(name, value) if value is not None else "-"
    return name.removeprefix("best_").replace("_", " "), shown


def raise_for(outcomes: Sequence[Outcome], stop: Stop) -> None:
    """Raise what the command ends with: Stopped, RunFailed or Unavailable, or nothing."""
    count = len(outcomes)
    if stop.signal is not None:
        left = sum(o.after not in ("finished", "failed") for o in outcomes)
        raise Stopped(
            stop.signal, f"stopped with {left} of {count} cells left; the same line goes on"
        )
    failed = [o for o in outcomes if o.has_failed]
    if failed:
        raise RunFailed(
            f"{len(failed)} of {count} cells failed (the table says why); the same line tries "
            "them again"
        )
    left_out = [o for o in outcomes if o.code in (3, *STOPPED)]
    if left_out:
        raise Unavailable(f"{len(left_out)} of {count} cells were left out: {left_out[0].error}")
