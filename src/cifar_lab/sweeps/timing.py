"""How long runs take, as finished ones did or as a probe measures; `plan=true` shows it."""

import contextlib
import dataclasses
import heapq
import importlib
import json
import time
from collections.abc import Sequence

from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import RunFailed, UsageError, shows_bars
from cifar_lab.runs.run_dir import find_runs
from cifar_lab.runs.text import align, duration
from cifar_lab.sweeps.cell import DONE, Cell, short_names
from cifar_lab.training import device
from cifar_lab.training.batches import Batches
from cifar_lab.training.build import build_state, normalisation
from cifar_lab.training.data import load_splits
from cifar_lab.training.loop import fit
from cifar_lab.training.scoring import predict
from cifar_lab.training.splits import Split
from cifar_lab.training.state import TrainState

SLOW_IMPORTS = (
    "torch._dynamo",  # the first optimizer imports it
    "sklearn.metrics",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
)
"""What a run imports when it first needs it."""

_PROBE_SECONDS = 4.0


class Pace:
    """Wall clock seconds of runs, learnt from finished ones and probes.

    A run is timed by its finished siblings of the same model, dataset, device, precision and batch
    size; those with the same optimizer and activation too count first.
    """

    def __init__(self) -> None:
        self._known: dict[str, list[tuple[float, float]]] = {}

    def learn(self, cell: Cell) -> None:
        """Note what a finished cell took."""
        try:
            summary = cell.summary()
        except (UsageError, RunFailed):
            return
        if summary is None or summary.status != "finished" or summary.epoch_seconds is None:
            return
        self.note(cell.config, summary.epoch_seconds, summary.overhead_seconds or 0.0)

    def note(self, config: RunConfig, epoch_seconds: float, overhead_seconds: float) -> None:
        """Note seconds per epoch, and those before the first and after the last."""
        for key in _kinds(config):
            self._known.setdefault(key, []).append((epoch_seconds, overhead_seconds))

    def seconds(self, config: RunConfig, epochs_done: int = 0) -> float | None:
        """Return what a run still takes if it does not stop early; None if nothing is known."""
        for key in _kinds(config):
            if key in self._known:
                epochs, overheads = zip(*self._known[key], strict=True)
                left = max(config.training.epochs - epochs_done, 0)
                return float(left * sum(epochs) / len(epochs) + sum(overheads) / len(overheads))
        return None

    def time_left(self, cells: Sequence[Cell], jobs: int, *, rerun: bool = False) -> float | None:
        """Return the seconds until all cells are done, `jobs` at a time; None without any pace.

        Kinds of which nothing is known yet count as the mean of the others.
        """
        each = [self.seconds(c.config, 0 if rerun else c.epochs_done()) for c in cells]
        known = [seconds for seconds in each if seconds is not None]
        if not known:
            return None
        mean = sum(known) / len(known)
        slots = [0.0] * max(jobs, 1)
        for seconds in each:
            heapq.heappush(slots, heapq.heappop(slots) + (mean if seconds is None else seconds))
        return max(slots)


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


def timed(cells: Sequence[Cell], *, beside: Sequence[Cell]) -> tuple[Pace, str]:
    """Return the pace of cells, and as text what it was learnt from.

    Finished runs of the same kind, among the cells `beside` and in their folders, count; a kind
    without any is probed, once for all of its cells.
    """
    from tqdm import tqdm

    pace = Pace()
    for cell in _finished_beside(beside):
        pace.learn(cell)
    unknown = [cell for cell in cells if pace.seconds(cell.config) is None]
    with tqdm(unknown, unit="run", leave=False, disable=not shows_bars()) as bar:
        for cell in bar:
            if pace.seconds(cell.config) is None:
                bar.set_description(f"timing {cell.config.choices.get('model', 'a run')}")
                pace.note(cell.config, *probe(cell.config))
    sources = ["a probe"] * bool(unknown) + ["finished runs"] * (len(unknown) < len(cells))
    return pace, " and ".join(sources)


def probe(config: RunConfig) -> tuple[float, float]:
    """Time some training steps and one evaluation batch, a few seconds in all; write nothing.

    Returns the seconds per epoch, and the seconds of loading and scoring around the epochs.
    """
    for module in SLOW_IMPORTS:
        importlib.import_module(module)  # now, so that their time is not measured
    where, _ = device.select_device(config.device)
    device.configure(where, config.threads, config.deterministic)
    started = time.perf_counter()
    splits = load_splits(config, where)
    state, batches = build_state(config, splits, where)
    loading = time.perf_counter() - started
    step_seconds = _step_seconds(state, batches, config)
    image_seconds = _image_seconds(state, splits.test, config)
    validation = len(splits.validation) if splits.validation else 0
    watched = len(splits.test) if config.evaluation.watch_test else 0
    epoch_seconds = len(batches) * step_seconds + (validation + watched) * image_seconds
    weights = 1 if config.evaluation.scored_weights == "last" else 2
    scored = weights * len(splits.test) + validation
    return epoch_seconds, loading + scored * image_seconds


def _step_seconds(state: TrainState, batches: Batches, config: RunConfig) -> float:
    """Return the seconds per step; where there is time for it, without the first ones."""
    started = time.perf_counter()
    marks = [(0, started)]
    for progress in fit(state, batches, None, dataclasses.replace(config.training, epochs=1)):
        device.wait_for(state.device)
        marks.append((progress.step, time.perf_counter()))
        if marks[-1][1] - started >= _PROBE_SECONDS:
            break
    first, last = marks[1] if len(marks) > 2 and marks[1][0] < marks[-1][0] else marks[0], marks[-1]
    return (last[1] - first[1]) / (last[0] - first[0])


def _image_seconds(state: TrainState, split: Split, config: RunConfig) -> float:
    """Return the seconds per image of a second evaluation batch: the first one warms up."""
    batch = dataclasses.replace(split, indices=split.indices[: config.evaluation.batch_size])
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        predict(
            state.model,
            batch,
            normalisation(config),
            config.evaluation,
            precision=config.precision,
        )
        seconds = time.perf_counter() - started
    return seconds / len(batch)


def _finished_beside(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells, and the other runs in the folders where cells go."""
    found = {cell.run.path: cell for cell in cells}
    for folder in {cell.run.path.parent for cell in cells}:
        for run in find_runs(folder) if folder.is_dir() else ():
            if run.path not in found and run.summary_file.exists():
                with contextlib.suppress(UsageError, RunFailed):
                    found[run.path] = Cell(run, run.read_config(), {}, "")
    return list(found.values())


def _kinds(config: RunConfig) -> list[str]:
    """Return what decides how long an epoch takes, the finer key first."""
    coarse = [
        config.model,
        config.dataset.name,
        config.dataset.image_shape,
        config.device.split(":")[0],
        config.precision,
        config.threads,
        config.training.batch_size,
        config.split.validation,
        config.evaluation.watch_test,
    ]
    activation = config.activation["_target_"] if config.activation else None
    fine = [
        *coarse,
        config.optimizer["_target_"],
        activation,
        dataclasses.asdict(config.dropout),
        dataclasses.asdict(config.augmentation),
    ]
    return [json.dumps(key, sort_keys=True) for key in (fine, coarse)]
