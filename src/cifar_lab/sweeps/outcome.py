"""What became of the cells of a sweep: the closing table and the command's exit code."""

import contextlib
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cifar_lab.analysis.load_runs import FoundRun
from cifar_lab.analysis.ranking import rank
from cifar_lab.analysis.seed_groups import collect
from cifar_lab.analysis.texts import best_text
from cifar_lab.errors import RunFailed, Stopped, Unavailable, UsageError, shorten
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.text import align, duration
from cifar_lab.sweeps.cell import STOPPED, Cell, short_names
from cifar_lab.training.signals import Stop


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


def closing_table(outcomes: Sequence[Outcome]) -> str:
    """Return what became of each cell, the best setting by validation, and how to compare them."""
    names = short_names(list(outcomes[0].cell.axes))
    monitors = {outcome.cell.config.training.monitor for outcome in outcomes}
    monitor = monitors.pop() if len(monitors) == 1 else "val_accuracy"
    score = monitor.replace("_", " ")
    rows = [[*names, "before", "after", score, "time", "folder", "error"]]
    for outcome in outcomes:
        summary = outcome.cell.summary() if outcome.after != "damaged" else None
        validation = getattr(summary, f"best_{monitor}", None)
        rows.append(
            [
                *outcome.cell.axes.values(),
                outcome.before,
                outcome.after,
                f"{validation:.4f}" if validation is not None else "-",
                duration(outcome.seconds) if outcome.seconds else "-",
                str(outcome.cell.run.path),
                shorten((outcome.error or "").replace(f"{outcome.cell.run.path}/", ""), 160),
            ]
        )
    counts = Counter(outcome.after for outcome in outcomes)
    closing = [", ".join(f"{number} {state}" for state, number in counts.items())]
    finished = [outcome.cell.run for outcome in outcomes if outcome.after == "finished"]
    return "\n".join([*align(rows), *closing, *(_best_settings(finished) if finished else [])])


def detached_text(outcomes: Sequence[Outcome]) -> str:
    """Return the state of the cells whose jobs were sent, and how to follow them."""
    counts = Counter(outcome.after for outcome in outcomes)
    folder = Path(os.path.commonpath([outcome.cell.run.path.parent for outcome in outcomes]))
    return (
        f"{', '.join(f'{number} {state}' for state, number in counts.items())}\n"
        "the same line without detach waits for the jobs; with it, it shows their states again\n"
        f"to compare what is finished: python -m cifar_lab.summarize {shlex.quote(str(folder))}"
    )


def _best_settings(runs: Sequence[RunDir]) -> list[str]:
    """Return the best setting of each dataset, as `summarize` chooses it, and that command."""
    folder = Path(os.path.commonpath([run.path.parent for run in runs]))
    readable = []
    for run in runs:
        with contextlib.suppress(UsageError, RunFailed):  # `summarize` names what it cannot read
            readable.append(FoundRun(run))
    collection = collect(folder, readable)
    rank(collection, None, compare=False)
    best = [best_text(collection, one) for one in collection.ranking if one.chosen]
    return [*best, f"to compare them: python -m cifar_lab.summarize {shlex.quote(str(folder))}"]


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
