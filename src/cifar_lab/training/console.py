"""What a run shows and records of itself: bars, the log, best.pt, figures, and how it ended."""

import contextlib
import dataclasses
import logging
import math
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cifar_lab.config.run_config import RunConfig
from cifar_lab.config.targets import build
from cifar_lab.errors import (
    Damaged,
    RunFailed,
    Stopped,
    Unavailable,
    UsageError,
    first_line,
    log,
    shows_bars,
)
from cifar_lab.figures.style import Look, save
from cifar_lab.runs.files import check_inside, load_checkpoint, weights_checksum
from cifar_lab.runs.metrics import BY_CLASS, EpochMetrics, best_row, diagnosis, show_interval
from cifar_lab.runs.run_dir import RunDir, TakenOver
from cifar_lab.runs.run_files import second_name
from cifar_lab.runs.summary import RunSummary, Status
from cifar_lab.runs.text import align, class_name
from cifar_lab.training.loop import Progress
from cifar_lab.training.state import TrainState


def new_bar(*, disable: bool = False, **options: Any) -> Any:
    """Return tqdm's bar with these options; it shows in a terminal or a notebook only."""
    if disable or not shows_bars():
        from tqdm import tqdm as plain

        return plain(disable=True)
    from tqdm import TqdmWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmWarning)  # without ipywidgets it draws with text
        from tqdm.auto import tqdm
    return tqdm(leave=False, dynamic_ncols=True, **options)


class Bars:
    """Progress bars for training and validation; silent without a terminal or a notebook."""

    def __init__(self, epochs: int) -> None:
        self._epochs, self._bar = epochs, new_bar(disable=True)
        self._key: tuple[int, str] | None = None

    def show(self, progress: Progress) -> None:
        """Move the bar of training or of validation; the other one closes it."""
        if progress.kind == "epoch":
            return
        key = (progress.epoch, progress.kind)
        if key != self._key:
            self.close()
            self._key = key
            self._bar = new_bar(
                total=progress.steps,
                initial=progress.step,  # a resumed epoch does not start at 0
                desc=f"{progress.epoch}/{self._epochs} {progress.kind[:5]} progress",
                unit="step",
            )
        scores = {"acc": f"{progress.accuracy:.4f}", "loss": f"{progress.loss:.4f}"}
        self._bar.set_postfix(scores, refresh=False)
        self._bar.update(progress.step - self._bar.n)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


class StepPace:
    """Says once that training steps take more than twice as long as they did at first.

    So it is when another process computes on the machine: several threads then wait for the one
    that the other process delays, and two are 1.5 to 1.7 times slower than one alone.
    """

    def __init__(self, config: RunConfig) -> None:
        self._since: tuple[int, int, float] | None = None  # epoch, step, seconds of that epoch
        self._first: int | None = None
        self._best, self._slow, self._said = math.inf, 0, config.device != "cpu"

    def notice(self, state: TrainState, progress: Progress) -> None:
        """Compare the steps since the last yield with the best of the first epoch."""
        if self._said or progress.kind != "train":
            return
        before, self._since = self._since, (progress.epoch, progress.step, state.seconds)
        if before is None or before[0] != progress.epoch:
            return
        pace = (state.seconds - before[2]) / max(progress.step - before[1], 1)
        self._first = self._first or progress.epoch
        if progress.epoch == self._first:
            self._best = min(self._best, pace)
        # Three yields, some 1.5 seconds: shorter ones are a breath of the system.
        self._slow = self._slow + 1 if pace > 2 * self._best else 0
        if self._slow == 3:
            self._said = True
            log.warning(
                "a training step takes %.1f times as long as at best in epoch %d: is another "
                "process computing on this machine?%s",
                pace / self._best,
                self._first,
                " Beside it, threads=1 is the fastest" if torch.get_num_threads() > 1 else "",
            )


def log_start(config: RunConfig) -> None:
    """Log what is about to be trained, in S0's words."""
    log.info(
        "Training model %s with learning rate: %s, optimizer: %s and activation function: %s",
        class_name(config.model),
        config.optimizer.get("lr"),
        class_name(config.optimizer),
        class_name(config.activation),
    )


def log_step(config: RunConfig, progress: Progress) -> None:
    """Log a training step, every `training.print_every` steps."""
    every = config.training.print_every
    if every and progress.kind == "train" and (progress.step - 1) % every == 0:
        log.info(
            "epoch: %d, steps: %d, train_loss: %.3f, running_acc: %.1f %%",
            progress.epoch,
            progress.step - 1,
            progress.loss,
            100 * progress.accuracy,
        )


def log_epoch(config: RunConfig, state: TrainState, row: EpochMetrics) -> None:
    """Log the scores of an epoch, and the new learning rate if a plateau has reduced it."""
    log.info("Epoch %d/%d", row.epoch, config.training.epochs)
    log.info("train loss: %.4f accuracy: %.2f%%", row.train_loss, 100 * row.train_accuracy)
    if row.val_loss is not None and row.val_accuracy is not None:
        log.info("valid loss: %.4f accuracy: %.2f%%", row.val_loss, 100 * row.val_accuracy)
    if row.val_balanced_accuracy is not None and row.val_macro_f1 is not None:
        log.info(
            "valid balanced accuracy: %.2f%% macro F1: %.4f",
            100 * row.val_balanced_accuracy,
            row.val_macro_f1,
        )
    if state.learning_rate < row.learning_rate and state.schedule.monitor is not None:
        log.info(
            "Epoch %05d: reducing learning rate of group 0 to %.4e.", row.epoch, state.learning_rate
        )


def log_warnings(known: list[str], found: list[str]) -> list[str]:
    """Log the warnings that are not known yet; return all of them."""
    new = [warning for warning in dict.fromkeys(found) if warning not in known]
    for warning in new:
        log.warning("warning: %s", warning)
    return known + new


def log_result(config: RunConfig, state: TrainState, summary: RunSummary) -> None:
    """Log S2's table of a run (S0-18, S2-08), and the test score below it."""
    best = state.best
    cells = {
        "Model": class_name(config.model),
        "Best Validation Accuracy": f"{best.val_accuracy:.4f}" if best else "-",
        "Validation Loss": f"{best.val_loss:.4f}" if best else "-",
        "Learning Rate": f"{best.learning_rate:g}" if best else f"{config.optimizer.get('lr')}",
        "Optimizer": class_name(config.optimizer),
        "Activation": class_name(config.activation),
        "Epoch": str(best.epoch if best else summary.epochs),
    }
    lines = align([list(cells.keys()), list(cells.values())], separator=" | ")
    if summary.test_accuracy is not None and summary.test_size:
        interval = show_interval(summary.test_accuracy, summary.test_size)
        lines.append(
            f"test accuracy of the {summary.scored_weights} weights: {summary.test_accuracy:.2%} "
            f"({interval}, {summary.test_size:,} images)"
        )
        if summary.test_images_trained_on and summary.test_accuracy_without_them is not None:
            lines.append(
                f"without the {summary.test_images_trained_on:,} test images that are training "
                f"images, too: {summary.test_accuracy_without_them:.2%}"
            )
    log.info("\n".join(lines))


@contextlib.contextmanager
def log_to(run: RunDir) -> Iterator[None]:
    """Write the log to train.log too; a line that cannot be written ends the run."""

    class LogFile(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            run.append_log(self.format(record))

    handler = LogFile()
    log.addHandler(handler)
    level, disabled = log.level, logging.root.manager.disable
    log.setLevel(logging.INFO)  # whatever a program around the run has set
    logging.disable(logging.NOTSET)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        logging.disable(disabled)


def draw_figures(run: RunDir, look: Look | None = None) -> tuple[list[str], list[str]]:
    """Draw the figures that the config names; return those drawn, and a warning for each other."""
    drawn, warnings, look = [], [], look or Look()
    for name, target_config in run.read_config().figures.items():
        if target_config is None:
            continue
        try:
            figure = build(target_config, f"figures.{name}", run=run)
            look.apply(figure)
            path = check_inside(run.figures / f"{name}.{look.format}", run.path)
            save(figure, path, look.dpi)
            drawn.append(name)
        except Exception as error:  # a figure is no reason to lose a run
            warnings.append(f"figure {name} was not drawn: {type(error).__name__}: {error}")
            log.warning(warnings[-1])
    return drawn, warnings


def write_best(run: RunDir, config: RunConfig, state: TrainState, row: EpochMetrics) -> None:
    """Write best.pt of the epoch just done; its second name replaces that of the best before."""
    weights, name = state.scored_weights(), second_name(config, row)
    state.best_checksum = weights_checksum(weights)
    best = {"model": weights, "epoch": state.epoch, "val_accuracy": row.val_accuracy}
    run.write_best(best, name)
    if name is None:
        log.info("best epoch so far: its weights are in %s", run.best.name)
        return
    log.info("Best model saved to %s", run.path / name)  # the words of the reports' logs (S2)
    before = best_row(state.history[:-1], config.training.monitor)
    former = second_name(config, before) if before is not None else None
    if former is not None and former != name:
        (run.path / former).unlink(missing_ok=True)


def check_best(run: RunDir, state: TrainState) -> None:
    """Raise Damaged if best.pt does not hold the weights of the best epoch so far.

    After a process was killed, best.pt may be of an epoch that last.pt does not include yet; the
    resumed run trains that epoch again.
    """
    if state.best is None:
        return
    remedy = f"the best epoch, {state.best.epoch}, is lost: rerun=true trains again"
    try:
        best = load_checkpoint(run.best)
    except Damaged as error:
        raise Damaged(f"{error}; {remedy}") from None
    if best.get("epoch", 0) > state.epoch:
        return
    known = state.best_checksum  # older versions wrote none
    is_other = known is not None and weights_checksum(best["model"]) != known
    if is_other or best.get("epoch") != state.best.epoch:
        raise Damaged(f"{run.best} holds other weights than it should; {remedy}")


def training_fields(state: TrainState) -> dict[str, Any]:
    """Return the fields of summary.json that the state after training gives."""
    rows = state.history
    speeds = [row.images_per_second for row in rows]
    of_best = ("epoch", "val_accuracy", "val_loss", *BY_CLASS)
    return {
        "epochs": state.epoch,
        **{f"best_{name}": getattr(state.best, name, None) for name in of_best},
        "effective_learning_rate": rows[-1].learning_rate if rows else None,
        "seconds": sum(row.seconds for row in rows),
        "images_per_second": float(np.median(speeds)) if rows else None,
        "stopped_early": state.stopped_early,
        "diagnosis": diagnosis(rows),
    }


def record_end(run: RunDir, before: RunSummary, error: BaseException) -> BaseException:
    """Record why a run ended early; return what to raise: the error, or RunFailed with one line."""
    if isinstance(error, TakenOver):  # the folder is another process's now
        return error
    stopped = isinstance(error, Stopped | KeyboardInterrupt)
    expected = isinstance(error, UsageError | Unavailable | RunFailed | OSError)
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(run.path)
    first = "" if isinstance(error, SystemExit) else first_line(error)
    # MPS has no class of its own for it.
    if isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in first:
        first = f"the GPU's memory is full, try a smaller training.batch_size ({first})"
    name = type(error).__name__
    message = name if first in ("", name) else f"{name}: {first}"
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
        recorded, now = None if stopped else message, run.read_summary()
        if now.status != "finished":  # else its result is complete, and a signal came too late
            run.write_summary(dataclasses.replace(now, status=status, error=recorded))
    if expected or stopped:
        return error
    return RunFailed(f"{run.path} failed with {message}; see the traceback in its train.log")
