"""A run's folder: every file that a run leaves, each written and read back here.

Files appear whole or not at all (temporary file, fsync, rename, fsync of the folder). Only
`metrics.csv`, `steps.csv` and `train.log` grow by appending; a line torn by a crash is dropped
by the reader and rewritten when the run goes on.
"""

import contextlib
import csv
import dataclasses
import json
import os
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import numpy as np

from cifar_lab import config as config_module
from cifar_lab.config import RunConfig
from cifar_lab.errors import NotNow, RequestError, RunFailed
from cifar_lab.metrics import EpochMetrics, Predictions, StepMetrics, columns

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
        """Make the folder at a config's address, queued; leave one that is there as it is."""
        run = cls(config_module.address(config))
        if not run.config_file.exists():
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

    # --- the summary and the status -------------------------------------------------------------

    def write_summary(self, summary: RunSummary) -> None:
        """Replace summary.json."""
        text = json.dumps(dataclasses.asdict(summary), indent=2, ensure_ascii=False)
        write_text(self.summary_file, text + "\n")

    def read_summary(self) -> RunSummary:
        """Return summary.json; a `running` whose lock nobody holds reads as `interrupted`."""
        try:
            data = json.loads(self.summary_file.read_text(encoding="utf-8"))
            known = {k: data[k] for k in columns(RunSummary) if k in data}
            summary = RunSummary(**known)
        except FileNotFoundError:
            raise RequestError(f"{self.path} is no run folder: it has no summary.json") from None
        except (ValueError, TypeError, OSError) as error:
            raise Damaged(f"{self.summary_file} is damaged: {error}") from None
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
        """Hold the folder for this process; NotNow if another one does."""
        with self.lock_file.open("a+") as handle:
            for attempt in range(10):
                if _try_lock(handle, exclusive=True):
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
                return not _try_lock(handle, exclusive=False)
        except OSError:
            return False

    # --- rows -----------------------------------------------------------------------------------

    def rewrite_metrics(self, rows: Sequence[EpochMetrics]) -> None:
        """Replace metrics.csv by these rows."""
        write_text(self.metrics_file, _csv_text(EpochMetrics, rows, header=True))

    def append_metrics(self, row: EpochMetrics) -> None:
        """Add a row to metrics.csv, safely on disk when this returns."""
        _append(self.metrics_file, _csv_text(EpochMetrics, [row], header=False))

    def read_metrics(self) -> list[EpochMetrics]:
        """Return the rows of metrics.csv; none if there is no file, nor a torn last line."""
        return _read_rows(self.metrics_file, EpochMetrics)

    def rewrite_steps(self, rows: Sequence[StepMetrics]) -> None:
        """Replace steps.csv by these rows."""
        write_text(self.steps_file, _csv_text(StepMetrics, rows, header=True))

    def append_steps(self, rows: Sequence[StepMetrics]) -> None:
        """Add rows to steps.csv."""
        _append(self.steps_file, _csv_text(StepMetrics, rows, header=False))

    def read_steps(self) -> list[StepMetrics]:
        """Return the rows of steps.csv; none if per-step history was not asked for."""
        return _read_rows(self.steps_file, StepMetrics)

    # --- checkpoints ----------------------------------------------------------------------------

    def write_last(self, state: Mapping[str, Any]) -> None:
        """Replace last.pt, keeping the one before it as last.previous.pt."""
        with replacing(self.last) as handle:
            _save(state, handle)
            if self.last.exists():
                self.last.replace(self.previous)

    def write_best(self, state: Mapping[str, Any], extra_name: str | None = None) -> None:
        """Replace best.pt; `extra_name` is a second name for the same file (S2-10, S2-11)."""
        with replacing(self.best) as handle:
            _save(state, handle)
        if extra_name is not None:
            extra = self.path / extra_name
            with contextlib.suppress(FileNotFoundError):
                extra.unlink()
            try:
                os.link(self.best, extra)
            except OSError:  # a file system without hard links
                with replacing(extra) as handle:
                    handle.write(self.best.read_bytes())

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

    def read_last(self, report: Any = print) -> dict[str, Any] | None:
        """Return last.pt, or where it is damaged the one before it; None if there is neither."""
        for path in (self.last, self.previous):
            if not path.exists():
                continue
            try:
                return self.read_checkpoint(path)
            except Damaged as error:
                report(f"{error}; going on from the checkpoint before it")
        return None

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
        arrays = self.read_arrays(self.predictions_file(split, weights))
        return Predictions(arrays["logits"], arrays["labels"], arrays["indices"])

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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that becomes `path` when the block ends well, and vanishes if not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole."""
    with replacing(path) as handle:
        handle.write(text.encode("utf-8"))


def _save(state: Mapping[str, Any], handle: IO[bytes]) -> None:
    import torch

    torch.save({"format": CHECKPOINT_FORMAT, **state}, handle)


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8", newline="") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def _csv_text(kind: type, rows: Iterable[Any], *, header: bool) -> str:
    rows = list(rows)
    names = columns(kind)
    if kind is EpochMetrics:
        names = [n for n in names if not n.startswith("test_")] + [
            n
            for n in names
            if n.startswith("test_") and any(getattr(r, n) is not None for r in rows)
        ]
    lines = [",".join(names)] if header else []
    for row in rows:
        cells = (getattr(row, name) for name in names)
        lines.append(",".join("" if cell is None else repr(cell) for cell in cells))
    return "".join(line + "\n" for line in lines)


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


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(handle: IO[str], *, exclusive: bool) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
