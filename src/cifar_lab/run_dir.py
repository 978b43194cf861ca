"""A run's folder: every file that a run leaves, each written and read back here.

Files appear whole or not at all (temporary file, fsync, rename, fsync of the folder). Only
`metrics.csv`, `steps.csv` and `train.log` grow by appending; a line torn by a crash is dropped
by the reader and rewritten when the run goes on.
"""

import contextlib
import csv
import dataclasses
import io
import json
import os
import re
import time
import types
import typing
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import numpy as np

from cifar_lab import config as config_module
from cifar_lab.config import RunConfig
from cifar_lab.errors import NotNow, RequestError, RunFailed
from cifar_lab.files import (
    append_text,
    copy_at_once,
    remove_leftovers,
    replacing,
    sync_file,
    try_lock,
    write_text,
)
from cifar_lab.metrics import EpochMetrics, Predictions, StepMetrics, columns
from cifar_lab.schema import shorten

Status = Literal["queued", "running", "interrupted", "failed", "finished"]
Row = TypeVar("Row", EpochMetrics, StepMetrics)
CHECKPOINT_FORMAT = 1


class Damaged(RunFailed):
    """A file of the run is not what was written; the message names it."""


@dataclass(frozen=True)
class RunSummary:
    """What a run came to (`summary.json`): accuracies are fractions, losses means per image."""

    status: Status
    seed: int
    choices: dict[str, str]
    protocol: str
    device: str
    precision: str
    threads: int | None = None
    device_name: str | None = None
    epochs: int = 0
    best_epoch: int | None = None
    best_val_accuracy: float | None = None
    best_val_loss: float | None = None
    scored_weights: str | None = None
    test_accuracy: float | None = None
    test_loss: float | None = None
    test_accuracy_last: float | None = None
    test_size: int | None = None
    per_class_accuracy: dict[str, float] = field(default_factory=dict)
    most_confused: list[dict[str, Any]] = field(default_factory=list)
    diagnosis: dict[str, float | int] = field(default_factory=dict)
    separation: dict[str, float | None] = field(default_factory=dict)
    initial_learning_rate: float | None = None
    effective_learning_rate: float | None = None
    parameters: int | None = None
    seconds: float = 0.0
    images_per_second: float | None = None
    epoch_seconds: float | None = None
    overhead_seconds: float | None = None
    stopped_early: bool = False
    continued_from: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    code_hash: str | None = None
    dataset: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    error: str | None = None


class RunDir:
    """The folder of one run. Knows files, not training."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.csv"
        self.steps_file = self.path / "steps.csv"
        self.summary_file = self.path / "summary.json"
        self.log_file = self.path / "train.log"
        self.last = self.path / "last.pt"
        self.previous = self.path / "last.previous.pt"
        self.best = self.path / "best.pt"
        self.samples_file = self.path / "samples.npz"
        self.features_file = self.path / "features.npz"
        self.report_text = self.path / "classification_report.txt"
        self.report_json = self.path / "classification_report.json"
        self.figures = self.path / "figures"
        self.lock_file = self.path / ".lock"

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    @classmethod
    def create(cls, config: RunConfig) -> "RunDir":
        """Make the folder at a config's address, queued; one that is there keeps its results.

        Settings that are not part of the address (figures, checkpoint_minutes, ...) are taken over
        into a folder that is there.
        """
        run = cls(config_module.address(config))
        if run.config_file.exists():
            run._take_over(config)
        else:
            try:
                run.path.mkdir(parents=True, exist_ok=True)
                write_text(run.config_file, config_module.dump(config))
            except (FileExistsError, NotADirectoryError):
                raise RequestError(
                    f"output_dir={config.output_dir}: a file is in the way of {run.path}"
                ) from None
        if not run.summary_file.exists():
            run.write_summary(queued(config))
        return run

    @property
    def config(self) -> RunConfig:
        """The config that made the folder, checked as strictly as the shell's."""
        return config_module.load(self.config_file)

    def own_config(self) -> RunConfig:
        """Return the config; RequestError if it was edited into that of another run."""
        settings = self.config
        address = config_module.address(settings)
        digest = re.search(r"-[0-9a-f]{8}$", self.path.resolve().name)
        if digest is not None and not address.name.endswith(digest[0]):
            raise RequestError(
                f"{self.config_file} was edited: its settings are those of another run; put them "
                f"back, or run them in a folder of their own: python -m cifar_lab.train {self.path}"
            )
        return settings

    def threads_to_go_on(self, config: RunConfig) -> int | None:
        """Return the threads of a run that goes on; RequestError if the config asks for others."""
        before = self.read_summary().threads
        if before is None or config.threads in (None, before):
            return before or config.threads
        raise RequestError(
            f"threads={config.threads} is wrong: {self.path} was trained with {before}, another "
            f"number gives other weights; threads={before} goes on, rerun=true starts anew"
        )

    def _take_over(self, config: RunConfig) -> None:
        stored = self.config
        if config.threads is None:
            config = dataclasses.replace(config, threads=stored.threads)
        same_run = config_module.identity(stored) == config_module.identity(config)
        if not same_run or stored == config:  # an edited one is refused when it is to run
            return
        with contextlib.suppress(NotNow), self.lock():  # a process at work keeps what it has read
            if config.threads != stored.threads and self.last.exists():
                self.threads_to_go_on(config)
            write_text(self.config_file, config_module.dump(config))

    # --- the summary and the status -------------------------------------------------------------

    def write_summary(self, summary: RunSummary) -> None:
        """Replace summary.json."""
        text = json.dumps(dataclasses.asdict(summary), indent=2, ensure_ascii=False)
        write_text(self.summary_file, text + "\n")

    def read_summary(self) -> RunSummary:
        """Return summary.json; a `running` whose lock nobody holds reads as `interrupted`."""
        try:
            text = self.summary_file.read_bytes()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise RequestError(
                f"{shorten(str(self.path))} is no run folder: its summary.json "
                f"cannot be read ({why})"
            ) from None
        try:
            data = json.loads(text)
            known = {k: data[k] for k in columns(RunSummary) if k in data}
            summary = RunSummary(**known)
            _check_kinds(summary)
        except (ValueError, TypeError, RecursionError) as error:
            first = str(error).splitlines()[0][:200]
            raise Damaged(
                f"{self.summary_file} is damaged ({first}); rerun=true runs it again"
            ) from None
        if summary.status == "running" and not self.is_locked():
            return dataclasses.replace(summary, status="interrupted")
        return summary

    @property
    def status(self) -> Status:
        """queued, running, interrupted, failed or finished."""
        return self.read_summary().status

    # --- the lock -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; NotNow if another one does.

        RequestError where what is written by appending leads out of the folder by a link.
        """
        grown = (self.lock_file, self.log_file, self.metrics_file, self.steps_file, self.figures)
        for path in (*grown, self.path / "tensorboard"):
            if path.is_symlink():
                raise RequestError(f"{path} is a link; a run writes into its own folder only")
        with self.lock_file.open("a+") as handle:
            for attempt in range(10):
                if try_lock(handle, exclusive=True):
                    break
                if attempt == 9:
                    handle.seek(0)
                    owner = handle.read(100).strip() or "another process"
                    raise NotNow(f"{self.path} is in use by {owner}; wait for it or stop it")
                time.sleep(0.05)
            handle.truncate(0)
            handle.write(f"process {os.getpid()}")
            handle.flush()
            yield

    def is_locked(self) -> bool:
        """Whether a process holds the folder now."""
        try:
            with self.lock_file.open("r") as handle:
                return not try_lock(handle, exclusive=False)
        except OSError:
            return False

    # --- rows -----------------------------------------------------------------------------------

    def rewrite_metrics(self, rows: Sequence[EpochMetrics], *, watched: bool = False) -> None:
        """Replace metrics.csv by these rows; `watched` if rows with test scores will follow."""
        write_text(self.metrics_file, _csv_text(EpochMetrics, rows, header=True, watched=watched))

    def append_metrics(self, row: EpochMetrics) -> None:
        """Add a row to metrics.csv, safely on disk when this returns."""
        append_text(self.metrics_file, _csv_text(EpochMetrics, [row], header=False))

    def read_metrics(self) -> list[EpochMetrics]:
        """Return the rows of metrics.csv; none if there is no file, nor a torn last line."""
        return _read_rows(self.metrics_file, EpochMetrics)

    def rewrite_steps(self, rows: Sequence[StepMetrics]) -> None:
        """Replace steps.csv by these rows."""
        write_text(self.steps_file, _csv_text(StepMetrics, rows, header=True))

    def append_steps(self, rows: Sequence[StepMetrics]) -> None:
        """Add rows to steps.csv."""
        append_text(self.steps_file, _csv_text(StepMetrics, rows, header=False))

    def read_steps(self) -> list[StepMetrics]:
        """Return the rows of steps.csv; none if per-step history was not asked for."""
        return _read_rows(self.steps_file, StepMetrics)

    def append_log(self, text: str) -> None:
        """Add lines to train.log."""
        append_text(self.log_file, text + "\n", safely=False)

    # --- checkpoints ----------------------------------------------------------------------------

    def write_last(self, state: Mapping[str, Any]) -> None:
        """Replace last.pt, keeping the one before it as last.previous.pt."""
        with replacing(self.last) as handle:
            _save(state, handle)
            sync_file(handle)
            if self.last.exists():
                copy_at_once(self.last, self.previous)  # at no moment is there no last.pt

    def write_best(self, state: Mapping[str, Any], extra_name: str | None = None) -> None:
        """Replace best.pt; `extra_name` is a second name for the same file (S2-10, S2-11)."""
        with replacing(self.best) as handle:
            _save(state, handle)
        if extra_name is not None:
            copy_at_once(self.best, self.path / extra_name)

    def read_checkpoint(self, path: Path) -> dict[str, Any]:
        """Return a checkpoint's tensors and plain values; Damaged if a bit of it is wrong.

        Loads with weights_only=True, so it cannot run code.
        """
        import torch

        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken is not None:
                raise Damaged(f"{path} is damaged: the checksum of {broken} is wrong")
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise Damaged(f"{path} is missing") from None
        except Damaged:
            raise
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Damaged(f"{path} is damaged: {first[:200]}") from None
        found = state.get("format") if isinstance(state, dict) else None
        if not isinstance(found, int):
            raise Damaged(f"{path} is no checkpoint of cifar_lab")
        if found > CHECKPOINT_FORMAT:
            raise RequestError(
                f"{path} has format {found}, this version reads up to {CHECKPOINT_FORMAT}: "
                "use the newer cifar_lab that wrote it"
            )
        return state

    def read_last(self, report: Callable[[str], object] = print) -> dict[str, Any] | None:
        """Return last.pt, or where it is damaged the one before it; None if there is neither.

        Damaged if none of them can be read: training is not started anew without a word.
        """
        problem: Damaged | None = None
        for path in (self.last, self.previous):
            if not path.exists():
                continue
            try:
                state = self.read_checkpoint(path)
            except Damaged as error:
                problem = problem or error
                continue
            if problem is not None:
                report(f"{problem}; going on from the checkpoint before it, {path.name}")
            return state
        if problem is not None:
            raise Damaged(f"{problem}, and there is no older one; rerun=true starts anew")
        return None

    def remove_leftovers(self) -> None:
        """Remove the temporary files of a process that was killed; for who holds the lock."""
        for folder in (self.path, self.figures):
            remove_leftovers(folder)

    def drop_checkpoints(self, *, last: bool) -> None:
        """Remove last.previous.pt, and last.pt too if `last`."""
        for path in (self.previous, self.last) if last else (self.previous,):
            path.unlink(missing_ok=True)

    # --- predictions, samples, features ---------------------------------------------------------

    def predictions_file(self, split: str, weights: str) -> Path:
        """Return predictions.npz for what the run is scored by ("test", "scored"), else by name."""
        plain = (split, weights) == ("test", "scored")
        return self.path / ("predictions.npz" if plain else f"predictions_{split}_{weights}.npz")

    def write_predictions(self, predictions: Predictions, split: str, weights: str) -> None:
        """Write logits, labels and indices of one split with one set of weights."""
        self.write_arrays(
            self.predictions_file(split, weights),
            logits=predictions.logits.astype(np.float32),
            labels=predictions.labels,
            indices=predictions.indices,
        )

    def read_predictions(self, split: str = "test", weights: str = "scored") -> Predictions:
        """Return what write_predictions wrote."""
        path = self.predictions_file(split, weights)
        arrays = self.read_arrays(path)
        try:
            read = Predictions(arrays["logits"], arrays["labels"], arrays["indices"])
            kinds = [array.dtype.kind for array in (read.logits, read.labels, read.indices)]
            shapes = (read.logits.ndim, read.labels.shape, read.indices.shape)
        except (KeyError, AttributeError) as error:
            raise Damaged(f"{path} is damaged: it has no array {error}") from None
        if kinds != ["f", "i", "i"] or shapes != (2, (n := len(read.logits),), (n,)):
            raise Damaged(
                f"{path} is damaged: it holds no logits (N, C), labels (N,), indices (N,)"
            )
        return read

    def read_report(self) -> dict[str, dict[str, float]]:
        """Return the rows of classification_report.json, {} without one; Damaged if it is none."""
        if not self.report_json.exists():
            return {}
        try:
            data = json.loads(self.report_json.read_text(encoding="utf-8"))
            rows = {name: row for name, row in data.items() if isinstance(row, dict)}
            columns = ("precision", "recall", "f1-score", "support")
            return {name: {c: float(row[c]) for c in columns} for name, row in rows.items()}
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise Damaged(f"{self.report_json} is damaged: {error}") from None

    def write_arrays(self, path: Path, **arrays: np.ndarray[Any, Any]) -> None:
        """Write named arrays as one .npz."""
        with replacing(path) as handle:
            np.savez_compressed(handle, **arrays)  # type: ignore[arg-type]

    def read_arrays(self, path: Path) -> dict[str, np.ndarray[Any, Any]]:
        """Return the arrays of an .npz, which cannot hold code; Damaged if it is not whole."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except FileNotFoundError:
            raise RequestError(
                f"{path} is missing; `python -m cifar_lab.evaluate {self.path}` makes it"
            ) from None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise Damaged(f"{path} is damaged: {error}") from None

    # --- figures --------------------------------------------------------------------------------

    def write_figure(self, name: str, figure: Any) -> Path:
        """Save a matplotlib figure as figures/<name>.png (150 dots per inch)."""
        path = self.figures / f"{name}.png"
        self.figures.mkdir(exist_ok=True)
        with replacing(path) as handle:
            figure.savefig(handle, dpi=150, format="png")
        return path


def queued(config: RunConfig) -> RunSummary:
    """Return the summary of a run that has not started."""
    return RunSummary(
        status="queued",
        seed=config.seed,
        choices=config.choices,
        protocol=config.protocol,
        device=config.device,
        precision=config.precision,
        threads=config.threads,
        initial_learning_rate=config.optimizer.get("lr"),
    )


def find_runs(folder: Path) -> list[RunDir]:
    """Return the run folders at and below `folder`, sorted by path; links are not followed."""
    if not folder.is_dir():
        raise RequestError(f"{folder} is no folder")
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if "config.yaml" in files and "summary.json" in files:
            found.append(RunDir(parent))
            folders.clear()
    return found


def _save(state: Mapping[str, Any], handle: IO[bytes]) -> None:
    import torch

    # through memory: on a full disk torch's own writer raises no OSError
    buffer = io.BytesIO()
    torch.save({"format": CHECKPOINT_FORMAT, **state}, buffer)
    handle.write(buffer.getbuffer())


def _csv_text(kind: type, rows: Iterable[Any], *, header: bool, watched: bool = False) -> str:
    rows = list(rows)
    names = columns(kind)
    if kind is EpochMetrics and not watched and all(r.test_loss is None for r in rows):
        names = [name for name in names if not name.startswith("test_")]
    lines = [",".join(names)] if header else []
    for row in rows:
        cells = (getattr(row, name) for name in names)
        lines.append(",".join("" if cell is None else _cell_text(cell) for cell in cells))
    return "".join(line + "\n" for line in lines)


def _cell_text(cell: float) -> str:
    """Return a number with all its digits, a numpy scalar like Python's own."""
    return str(int(cell)) if isinstance(cell, int | np.integer) else repr(float(cell))


def _read_rows(path: Path, kind: type[Row]) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise Damaged(f"{path} is damaged: {error}") from None
    whole = text[: text.rfind("\n") + 1]
    rows: list[Row] = []
    integers = ("epoch", "step")
    for cells in csv.DictReader(whole.splitlines()):
        try:
            values = {
                k: None if v == "" else int(v) if k in integers else float(v)
                for k, v in cells.items()
            }
            rows.append(kind(**values))  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise Damaged(f"{path} is damaged: line {len(rows) + 2} cannot be read") from None
    return rows


def _check_kinds(summary: RunSummary) -> None:
    """Raise TypeError where a summary, which may be a stranger's, holds something else."""
    for name, kind in typing.get_type_hints(RunSummary).items():
        value = getattr(summary, name)
        if not _is_kind(value, kind):
            raise TypeError(f"{name} is {str(value)[:40]!r}")


def _is_kind(value: Any, kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin is Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(_is_kind(value, option) for option in arguments)
    if origin is dict:
        return isinstance(value, dict) and all(_is_kind(v, arguments[1]) for v in value.values())
    if origin is list:
        return isinstance(value, list) and all(_is_kind(v, arguments[0]) for v in value)
    return type(value) is kind or (kind is float and type(value) is int)
