"""What a run records about itself: train.log, the fields of its training, and how it ended."""

import contextlib
import dataclasses
import logging
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cifar_lab.errors import RunFailed, Stopped, Unavailable, UsageError, first_line
from cifar_lab.runs.metrics import BY_CLASS, diagnosis
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.summary import RunSummary, Status
from cifar_lab.training.state import TrainState

log = logging.getLogger("cifar_lab")


@contextlib.contextmanager
def log_to(run: RunDir) -> Iterator[None]:
    """Write the log to train.log too."""
    handler = _LogFile(run)
    log.addHandler(handler)
    if log.level == logging.NOTSET:  # no command has set it: called as a function
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


class _LogFile(logging.Handler):
    """Writes train.log; a line that cannot be written ends the run, like any other file."""

    def __init__(self, run: RunDir) -> None:
        super().__init__()
        self._run = run

    def emit(self, record: logging.LogRecord) -> None:
        self._run.append_log(self.format(record))


def training_fields(state: TrainState) -> dict[str, Any]:
    """Return the fields of summary.json that the state after training gives."""
    rows = state.history
    return {
        "epochs": state.epoch,
        "best_epoch": state.best.epoch if state.best else None,
        "best_val_accuracy": state.best.val_accuracy if state.best else None,
        "best_val_loss": state.best.val_loss if state.best else None,
        **{f"best_{name}": getattr(state.best, name, None) for name in BY_CLASS},
        "effective_learning_rate": rows[-1].learning_rate if rows else None,
        "seconds": sum(row.seconds for row in rows),
        "images_per_second": (
            float(np.median([row.images_per_second for row in rows])) if rows else None
        ),
        "stopped_early": state.stopped_early,
        "diagnosis": diagnosis(rows),
    }


def record_end(run: RunDir, before: RunSummary, error: BaseException) -> BaseException:
    """Record why a run ended early; return what to raise: the error, or RunFailed with one line."""
    stopped = isinstance(error, Stopped | KeyboardInterrupt)
    expected = isinstance(error, UsageError | Unavailable | RunFailed | OSError)
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(run.path)
    first = first_line(error)
    if isinstance(error, torch.OutOfMemoryError):
        first = f"the GPU's memory is full, try a smaller training.batch_size ({first})"
    name = type(error).__name__
    message = name if first == name else f"{name}: {first}"
    if not run.config_file.exists():
        gone = RunFailed(f"{run.path} was moved or removed while it was running")
        return error if stopped else gone
    with contextlib.suppress(OSError):  # a disk too full to record it: the lock tells the reader
        if not expected and not stopped:
            run.append_log("".join(traceback.format_exception(error)))
        status: Status = "interrupted" if stopped else "failed"
        never_started = stopped and before.status == "queued" and not run.last.exists()
        if isinstance(error, Unavailable) or never_started:
            status = before.status
        recorded = None if stopped else message
        run.write_summary(dataclasses.replace(run.read_summary(), status=status, error=recorded))
    if expected or stopped:
        return error
    return RunFailed(f"{run.path} failed with {message}; see the traceback in its train.log")
