"""What a sweep is before it runs: its cells, their states, the time they take, its tables.

Nothing here starts a process or writes into a run's folder.
"""

import contextlib
import dataclasses
import heapq
import importlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cifar_lab import components, config, device
from cifar_lab.config import RunConfig
from cifar_lab.errors import RequestError, RunFailed
from cifar_lab.run_dir import RunDir, RunSummary, find_runs

THREADS = 1
"""CPU threads of a cell that asks for no number: the same for every cell, machine and `jobs`."""

DONE = ("finished", "other code", "damaged")
"""States of cells that a sweep leaves alone."""

SLOW_IMPORTS = (
    "torch._dynamo",  # the first optimizer imports it
    "sklearn.metrics",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
)
"""What a run imports when it first needs it."""

_PROBE_SECONDS = 4.0
_PROBE_IMAGES = 512


@dataclass(frozen=True)
class SweepCell:
    """One run of a sweep: its folder, config, what tells it from the others, today's code."""

    run: RunDir
    config: RunConfig
    axes: Mapping[str, str]
    code: str

    def summary(self) -> RunSummary | None:
        """Return summary.json, or None if the folder is not there yet."""
        return self.run.read_summary() if self.run.summary_file.exists() else None

    def state(self) -> str:
        """new, queued, running, interrupted, failed, finished, other code or damaged."""
        try:
            summary = self.summary()
        except (RequestError, RunFailed):
            return "damaged"
        if summary is None:
            return "new"
        has_result = summary.status == "finished" or self.run.last.exists()
        if (
            has_result
            and summary.code_hash not in (None, self.code)
            and summary.status != "running"
        ):
            return "other code"
        return summary.status

    def is_finished(self) -> bool:
        """Whether there is a result, whichever code made it."""
        summary = self.summary()
        return summary is not None and summary.status == "finished"

    def problem(self) -> str:
        """Return what is wrong with a damaged folder."""
        try:
            self.summary()
        except (RequestError, RunFailed) as error:
            return str(error)
        return ""

    def epochs_done(self) -> int:
        """Return how many epochs metrics.csv holds."""
        try:
            return len(self.run.read_metrics())
        except RunFailed:
            return 0


def sweep_cells(
    configs: Sequence[RunConfig],
    overrides: Sequence[Sequence[str]] | None = None,
    *,
    alone: bool = False,
) -> list[SweepCell]:
    """Return the cells of a sweep; two configs with one address are one cell.

    A cell that asks for no number of threads gets THREADS, so that results do not depend on how
    many run at once; a run `alone` keeps its own default. `overrides` name the axes for the tables.
    """
    overrides = overrides or [() for _ in configs]
    settings = [dict(_key_value(line) for line in lines) for lines in overrides]
    keys = {key: None for one in settings for key in one}
    axes = [key for key in keys if len({one.get(key) for one in settings}) > 1]
    cells: dict[Path, SweepCell] = {}
    codes: dict[str, str] = {}
    for plain, one in zip(configs, settings, strict=True):
        threads = plain.threads or (None if alone else THREADS)
        settled = dataclasses.replace(plain, threads=threads)
        run = RunDir(config.address(settled))
        roles = (settled.model, settled.activation, settled.optimizer, settled.scheduler)
        targets = json.dumps([settled.dataset.source, *roles], sort_keys=True)
        if targets not in codes:
            codes[targets] = components.code_hash(settled)
        labels = {key: one.get(key, "") for key in axes}
        cells.setdefault(run.path, SweepCell(run, settled, labels, codes[targets]))
    return list(cells.values())


class Pace:
    """Wall clock seconds of runs, learnt from finished ones and probes.

    A run is timed by its finished siblings of the same model, dataset, device, precision and batch
    size; those with the same optimizer and activation too count first.
    """

    def __init__(self) -> None:
        self._known: dict[str, list[tuple[float, float]]] = {}

    def learn(self, cell: SweepCell) -> None:
        """Take down what a finished cell took."""
        try:
            summary = cell.summary()
        except (RequestError, RunFailed):
            return
        if summary is None or summary.status != "finished" or summary.epoch_seconds is None:
            return
        self.note(cell.config, summary.epoch_seconds, summary.overhead_seconds or 0.0)

    def note(self, settings: RunConfig, epoch_seconds: float, overhead_seconds: float) -> None:
        """Take down seconds per epoch, and those before the first and after the last."""
        for key in _kinds(settings):
            self._known.setdefault(key, []).append((epoch_seconds, overhead_seconds))

    def seconds(self, settings: RunConfig, epochs_done: int = 0) -> float | None:
        """Return what a run still takes if it does not stop early; None if nothing is known."""
        for key in _kinds(settings):
            if key in self._known:
                epochs, overheads = zip(*self._known[key], strict=True)
                left = max(settings.training.epochs - epochs_done, 0)
                return float(left * sum(epochs) / len(epochs) + sum(overheads) / len(overheads))
        return None

    def time_left(
        self, cells: Sequence[SweepCell], jobs: int, *, rerun: bool = False
    ) -> float | None:
        """Return the seconds until all cells are done, `jobs` at a time; None without any pace.

        Kinds of which nothing is known yet are taken for the mean of the others.
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


def probe(settings: RunConfig) -> tuple[float, float]:
    """Measure a run for some seconds: return its seconds per epoch and those around its epochs.

    Loads, trains some steps, evaluates some images and draws, as a run does, in a folder of its own
    that is removed at the end.
    """
    for module in SLOW_IMPORTS:
        importlib.import_module(module)  # now, so that their time is not measured
    from cifar_lab.building import build_state, load_splits
    from cifar_lab.data import Split
    from cifar_lab.evaluation import evaluate
    from cifar_lab.execute import draw_figures
    from cifar_lab.files import write_text
    from cifar_lab.training import fit

    where, _ = device.select_device(settings.device)
    device.configure(where, settings.threads, settings.deterministic)
    started = time.perf_counter()
    splits = load_splits(settings, where)
    state, batches = build_state(settings, splits, where)
    loading = time.perf_counter() - started

    one_epoch = dataclasses.replace(settings.training, epochs=1)
    started = time.perf_counter()
    first = (0, started)
    step, now = 0, started
    for progress in fit(state, batches, None, one_epoch):
        if progress.kind == "epoch":
            break
        device.wait_for(where)
        step, now = progress.step, time.perf_counter()
        if first[0] == 0 and step < len(batches):
            first = (step, now)  # the steps before were warming up
        if now - started >= _PROBE_SECONDS:
            break
    steps, seconds = (step - first[0], now - first[1]) if step > first[0] else (step, now - started)
    step_seconds = seconds / max(steps, 1)

    def part(split: Split) -> Split:
        return dataclasses.replace(split, indices=split.indices[:_PROBE_IMAGES])

    few = dataclasses.replace(
        splits,
        test=part(splits.test),
        official_test=part(splits.official_test),
        validation=part(splits.validation) if splits.validation else None,
    )
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder))
        write_text(run.config_file, config.dump(settings))
        saving = time.perf_counter()
        run.write_last(state.state_dict())
        saving = time.perf_counter() - saving
        run.write_best({"model": state.model.state_dict(), "epoch": 1, "val_accuracy": None})
        model = state.model
        started = time.perf_counter()
        _score(model, few.test, settings, where)
        _score(model, few.test, settings, where)
        image_seconds = (time.perf_counter() - started) / (2 * len(few.test))
        started = time.perf_counter()
        evaluate(run, splits=few)
        draw_figures(run)
        around = time.perf_counter() - started
    validation = len(splits.validation) if splits.validation else 0
    watched = len(splits.test) if settings.evaluation.watch_test else 0
    epoch_seconds = (
        len(batches) * step_seconds + (validation + watched) * image_seconds + 2 * saving
    )
    tests = 1 if settings.evaluation.scored_weights == "last" else 2
    scored = tests * len(splits.test) + validation
    tried = tests * len(few.test) + (len(few.validation) if few.validation else 0)
    return epoch_seconds, loading + around + (scored - tried) * image_seconds


def _score(model: object, split: object, settings: RunConfig, where: str) -> None:
    from cifar_lab.building import normalisation
    from cifar_lab.training import predict

    predict(
        model,  # type: ignore[arg-type]
        split,  # type: ignore[arg-type]
        normalisation=normalisation(settings),
        batch_size=settings.evaluation.batch_size,
        memory_format=device.memory_format(where),
        precision=settings.precision,
        views=settings.evaluation.views,
    )


def plan(cells: Sequence[SweepCell], jobs: int, *, rerun: bool = False) -> str:
    """Return what would run: cells, states, the time left of each and of all; run nothing.

    Times come from finished runs of the same kind, in these folders and beside them, else from a
    probe of each kind.
    """
    states = [cell.state() for cell in cells]
    wanted = [rerun or state not in DONE for state in states]
    to_run = [cell for cell, needed in zip(cells, wanted, strict=True) if needed]
    pace, source = timed(to_run, beside=cells)
    rows = []
    for cell, state, needed in zip(cells, states, wanted, strict=True):
        left = pace.seconds(cell.config, 0 if rerun else cell.epochs_done()) if needed else None
        time_left = duration(left) if left is not None else "-"
        rows.append([*cell.axes.values(), state, time_left, str(cell.run.path)])
    text = table([*short_names(cells), "state", "time left", "folder"], rows)
    closing = f"{len(to_run)} of {len(cells)} cells to run"
    total = pace.time_left(to_run, jobs, rerun=rerun)
    if total is not None:
        at_a_time = min(jobs, len(to_run))
        closing += f", {at_a_time} at a time: at most {duration(total)}, as timed by {source}"
    return f"{text}\n{closing}; nothing was run"


def timed(cells: Sequence[SweepCell], *, beside: Sequence[SweepCell]) -> tuple[Pace, str]:
    """Return the pace of cells, and in words where it is from.

    Finished runs of the same kind, among the cells `beside` and in their folders, count; a kind
    without any is probed, once for all of its cells.
    """
    from tqdm import tqdm

    pace = Pace()
    for cell in _finished_beside(beside):
        pace.learn(cell)
    unknown = [cell for cell in cells if pace.seconds(cell.config) is None]
    with tqdm(unknown, unit="run", leave=False, disable=None) as bar:
        for cell in bar:
            if pace.seconds(cell.config) is None:
                bar.set_description(f"timing {cell.config.choices.get('model', 'a run')}")
                pace.note(cell.config, *probe(cell.config))
    sources = ["a probe"] * bool(unknown) + ["finished runs"] * (len(unknown) < len(cells))
    return pace, " and ".join(sources)


def _finished_beside(cells: Sequence[SweepCell]) -> list[SweepCell]:
    """Return the finished cells, and the other finished runs in the folders where cells go."""
    found = {cell.run.path: cell for cell in cells}
    for folder in {cell.run.path.parent for cell in cells}:
        for run in find_runs(folder) if folder.is_dir() else ():
            if run.path not in found and run.summary_file.exists():
                with contextlib.suppress(RequestError, RunFailed):
                    found[run.path] = SweepCell(run, run.config, {}, "")
    return list(found.values())


def short_names(cells: Sequence[SweepCell]) -> list[str]:
    """Return the names of the axes, `lr` for `optimizer.lr` where that is clear."""
    keys = list(cells[0].axes) if cells else []
    last = [key.rpartition(".")[2] for key in keys]
    return [s if last.count(s) == 1 else key for key, s in zip(keys, last, strict=True)]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return columns of text, each as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Return seconds as people say them: 4.2 s, 3:07, 2:04:09."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _key_value(line: str) -> tuple[str, str]:
    key, _, value = line.partition("=")
    return key.lstrip("+"), value


def _kinds(settings: RunConfig) -> list[str]:
    """Return what decides how long an epoch takes, the finer key first."""
    coarse = [
        settings.model,
        settings.dataset.name,
        settings.dataset.image_shape,
        settings.device.split(":")[0],
        settings.precision,
        settings.threads,
        settings.training.batch_size,
        settings.split.validation,
        settings.evaluation.watch_test,
    ]
    activation = settings.activation["_target_"] if settings.activation else None
    fine = [
        *coarse,
        settings.optimizer["_target_"],
        activation,
        dataclasses.asdict(settings.dropout),
        dataclasses.asdict(settings.augmentation),
    ]
    return [json.dumps(key, sort_keys=True) for key in (fine, coarse)]
