"""`plan=true`: what would run and how long it takes. Nothing here starts a process or writes."""

from collections.abc import Sequence

from cifar_lab.runs.text import align, duration
from cifar_lab.sweeps.cell import DONE, Cell, short_names
from cifar_lab.sweeps.timing import timed


def plan(cells: Sequence[Cell], jobs: int, *, rerun: bool = False) -> str:
    """Return what would run: cells, states, the time left of each and of all; run nothing.

    Times come from finished runs of the same kind, in these folders and beside them, else from a
    probe of each kind.
    """
    states = [cell.state() for cell in cells]
    wanted = [rerun or state not in DONE for state in states]
    to_run = [cell for cell, needed in zip(cells, wanted, strict=True) if needed]
    pace, source = timed(to_run, beside=cells)
    rows = [[*short_names(list(cells[0].axes)), "state", "time left", "folder"]]
    for cell, state, needed in zip(cells, states, wanted, strict=True):
        left = pace.seconds(cell.config, 0 if rerun else cell.epochs_done()) if needed else None
        time_left = duration(left) if left is not None else "-"
        rows.append([*cell.axes.values(), state, time_left, str(cell.run.path)])
    closing = f"{len(to_run)} of {len(cells)} cells to run"
    total = pace.time_left(to_run, jobs, rerun=rerun)
    if total is not None:
        at_a_time = min(jobs, len(to_run))
        closing += f", {at_a_time} at a time: about {duration(total)}, as timed by {source}"
    return "\n".join([*align(rows), f"{closing}; nothing was run"])
