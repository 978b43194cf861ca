"""One run, from the config.yaml in its folder to summary.json. Everything that happens is here."""

import contextlib
import dataclasses
import importlib.metadata
import logging
import platform
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from cifar_lab import components, device, guards, metrics
from cifar_lab.bars import Bars
from cifar_lab.building import build_state, load_splits
from cifar_lab.config import RunConfig
from cifar_lab.data import Batches, Splits
from cifar_lab.errors import NotNow, RequestError, RunFailed, Stopped
from cifar_lab.evaluation import evaluate
from cifar_lab.metrics import EpochMetrics, diagnosis
from cifar_lab.run_dir import RunDir, RunSummary, Status, queued
from cifar_lab.training import Progress, TrainState, fit, make_schedule

log = logging.getLogger("cifar_lab")


class Stop:
    """SIGINT and SIGTERM: inside `graceful` they wait for the next yield, elsewhere act at once.

    A second Ctrl-C always acts at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._patient = False

    @contextlib.contextmanager
    def installed(self) -> Iterator["Stop"]:
        """Handle the signals of this process while the block runs."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def graceful(self) -> Iterator[None]:
        """Let a signal wait until `check` is called."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def is_wanted(self, progress: Progress) -> bool:
        """Whether training is to stop at this yield."""
        return self.signal is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.signal is not None
        self.signal = number
        if again or not self._patient:
            raise Stopped(number)


def execute(
    run: RunDir, *, stop: Stop | None = None, rerun: bool = False, accept_code: bool = False
) -> RunSummary:
    """Train (or resume) the run in a folder, evaluate it, draw its figures; return its summary.

    A finished run is left as it is unless `rerun`. NotNow if another process holds the folder or
    if today's code is not the code that made the result; Stopped, with all saved, on a signal;
    RunFailed or what the run raised if it failed, with status `failed` and the error in its folder.
    """
    with run.lock():
        run.remove_leftovers()
        settings = run.own_config()
        summary = queued(settings) if rerun else run.read_summary()
        if summary.status == "running":  # and nobody held the lock: its process was killed
            summary = dataclasses.replace(summary, status="interrupted")
        code = components.code_hash(settings)
        if summary.status == "finished" and not rerun:
            return _finished(run, summary, code, accept_code)
        if rerun:
            _forget(run)
        with _log_to(run):
            try:
                return _run(run, settings, summary, code, stop or Stop(), accept_code)
            except (Exception, KeyboardInterrupt, Stopped) as error:
                raise _note_end(run, summary, error) from error


def note_killed(run: RunDir, error: str) -> None:
    """Note in a run's folder that its process ended before it could: the run counts as failed."""
    with run.lock():
        summary = run.read_summary()
        if summary.status != "finished":
            run.write_summary(dataclasses.replace(summary, status="failed", error=error))


def draw_figures(run: RunDir) -> list[str]:
    """Draw every figure that the config names; return a warning for each that failed."""
    warnings = []
    for name, component in run.config.figures.items():
        if component is None:
            continue
        try:
            run.write_figure(name, components.build(component, f"figures.{name}", run=run))
        except Exception as error:  # a picture is no reason to lose a run
            warnings.append(f"figure {name} was not drawn: {type(error).__name__}: {error}")
            log.warning(warnings[-1])
    return warnings


def _run(
    run: RunDir,
    settings: RunConfig,
    summary: RunSummary,
    code: str,
    stop: Stop,
    accept_code: bool,
) -> RunSummary:
    started = time.perf_counter()
    checkpoint = run.read_last(log.warning)
    if checkpoint is not None and summary.code_hash not in (None, code) and not accept_code:
        raise _other_code(run, summary.code_hash, code)
    threads = settings.threads if checkpoint is None else run.threads_to_go_on(settings)
    where, reason = device.select_device(settings.device)
    threads = device.configure(where, threads, settings.deterministic)
    torch.manual_seed(settings.seed)
    splits = load_splits(settings, where)
    state, batches = build_state(settings, splits, where)
    log.info("run folder: %s", run.path)
    log.info(
        "device: %s (%s), precision: %s, threads: %d", where, reason, settings.precision, threads
    )
    log.info(splits.checked)
    continued = _continue(run, settings, state, len(batches), checkpoint)
    summary = dataclasses.replace(
        queued(settings),
        status="running",
        device=where,
        device_name=device.describe_device(where),
        threads=threads,
        parameters=sum(p.numel() for p in state.model.parameters()),
        initial_learning_rate=settings.optimizer.get("lr"),
        continued_from=continued or summary.continued_from,
        versions=_versions(),
        commit=_commit(),
        code_hash=code,
        dataset={"name": settings.dataset.name, **settings.dataset.checksums},
    )
    run.write_summary(summary)
    warnings = _warn([], guards.before(settings, splits, state, batches, run))
    summary = dataclasses.replace(summary, warnings=warnings)
    run.write_summary(summary)
    run.rewrite_metrics(state.history, watched=settings.evaluation.watch_test)
    if settings.training.step_history:
        run.rewrite_steps([r for r in run.read_steps() if _is_done(r.epoch, r.step, state)])
    log.info(_banner(settings))
    epochs_before, training_since = state.epoch + state.step / len(batches), time.perf_counter()
    _train(run, settings, splits, state, batches, stop)
    training = time.perf_counter() - training_since
    device.release_memory()
    summary = dataclasses.replace(summary, **_training_fields(state))
    run.write_summary(summary)
    summary = dataclasses.replace(summary, **evaluate(run, splits=splits))
    warnings = _warn(warnings, guards.after(run, splits, state, batches))
    run.write_summary(dataclasses.replace(summary, warnings=warnings))
    warnings += draw_figures(run)
    run.drop_checkpoints(last=not settings.training.keep_last)
    summary = dataclasses.replace(
        summary,
        status="finished",
        warnings=warnings,
        seconds=summary.seconds or time.perf_counter() - started,
        epoch_seconds=training / epochs if (epochs := state.epoch - epochs_before) > 0.5 else None,
        overhead_seconds=time.perf_counter() - started - training,
    )
    run.write_summary(summary)
    log.info(_closing_table(settings, state, summary))
    return summary


def _train(
    run: RunDir,
    settings: RunConfig,
    splits: Splits,
    state: TrainState,
    batches: Batches,
    stop: Stop,
) -> None:
    """Drive `fit` to its end: the one place where rows, checkpoints and signals are dealt with."""
    saved = time.monotonic()
    progress_of_run = fit(
        state,
        batches,
        splits.validation,
        settings.training,
        watched=splits.test if settings.evaluation.watch_test else None,
        evaluation_batch_size=settings.evaluation.batch_size,
        evaluation_crop=settings.evaluation.crop_padding,
    )
    with (
        Bars(settings.training.epochs) as bars,
        _event_writer(run, settings) as events,
        stop.graceful(),
    ):
        for progress in progress_of_run:
            bars.show(progress)
            _note_steps(run, settings, progress)
            if progress.row is not None:
                run.append_metrics(progress.row)
                events(progress.row)
                _announce(settings, state, progress.row)
                if progress.improved:
                    _write_best(run, settings, state, progress.row)
            stopping = stop.is_wanted(progress)
            minutes = (time.monotonic() - saved) / 60
            if (
                progress.row is not None
                or stopping
                or minutes >= settings.training.checkpoint_minutes
            ):
                run.write_last(state.state_dict())
                saved = time.monotonic()
            if stopping:
                raise Stopped(
                    stop.signal or signal.SIGTERM,
                    f"stopped in epoch {progress.epoch}, step {progress.step} of "
                    f"{progress.steps}; all is saved, the same line goes on from there",
                )
    if stop.signal is not None:  # it came after the last yield
        raise Stopped(stop.signal, "stopped after training; the same line evaluates the run")
    if state.stopped_early:
        log.info(
            "Early stopping triggered at epoch %d. No significant improvement in the validation "
            "metric for %d epochs.",
            state.epoch,
            settings.training.patience,
        )
    if not run.last.exists():  # zero epochs: the untrained weights are the result
        run.write_last(state.state_dict())


def _warn(said: list[str], found: list[str]) -> list[str]:
    """Log the warnings that have not been said; return all of them."""
    news = [warning for warning in dict.fromkeys(found) if warning not in said]
    for warning in news:
        log.warning("warning: %s", warning)
    return said + news


def _finished(run: RunDir, summary: RunSummary, code: str, accept_code: bool) -> RunSummary:
    if summary.code_hash not in (None, code) and not accept_code:
        raise _other_code(run, summary.code_hash, code)
    score = f"test accuracy {summary.test_accuracy:.2%}" if summary.test_accuracy else "no score"
    log.info("finished before: %s (%s); rerun=true runs it again", run.path, score)
    return summary


def _other_code(run: RunDir, before: str | None, code: str) -> NotNow:
    return NotNow(
        f"{run.path} was made by other code ({before}, today's is {code}): rerun=true runs it "
        "again, accept_code=true takes it as it is"
    )


def _forget(run: RunDir) -> None:
    """Remove what an earlier execution left, but for config, log and lock."""
    keep = {run.config_file, run.log_file, run.lock_file, run.summary_file}
    for path in sorted(run.path.rglob("*")):
        if path.is_file() and path not in keep:
            path.unlink()
    run.write_summary(queued(run.config))


def _continue(
    run: RunDir,
    settings: RunConfig,
    state: TrainState,
    steps: int,
    checkpoint: dict[str, Any] | None,
) -> str | None:
    """Put the state where the run was; return the folder that it trains on from, if any."""
    if checkpoint is not None:
        state.load_state_dict(checkpoint)
        log.info("resumed at epoch %d, step %d", state.epoch + 1, state.step)
        return None
    if settings.continue_from is None:
        return None
    source = RunDir(settings.continue_from)
    if source.status != "finished":
        raise NotNow(
            f"continue_from={source.path} is {source.status}; finish it first: "
            f"python -m cifar_lab.train {source.path}"
        )
    found = source.read_last(log.warning)
    if found is None:
        raise RequestError(
            f"continue_from={source.path}: it has no last.pt to train on from "
            "(training.keep_last=true keeps it)"
        )
    before = source.config
    same_rates = (before.optimizer, before.scheduler) == (settings.optimizer, settings.scheduler)
    spans_run = any(
        key in ("T_max", "total_steps") and value is None
        for key, value in (settings.scheduler or {}).items()
    )
    rates = "the learning rate goes on from there"
    if spans_run or not same_rates:
        left = settings.training.epochs - found["epoch"]
        for group in state.optimizer.param_groups:  # as before the schedule of the whole run
            group.update({k: v for k, v in state.optimizer.defaults.items() if k in group})
        state.schedule = make_schedule(settings.scheduler, state.optimizer, left, steps)
        fresh = [{**group, "params": None} for group in state.optimizer.param_groups]
        found = {**found, "scheduler": None}
        rates = f"the learning rate is as configured, over the {left} epochs that are added"
    state.load_state_dict(found)
    if spans_run or not same_rates:
        for group, settings_of_group in zip(state.optimizer.param_groups, fresh, strict=True):
            group.update({k: v for k, v in settings_of_group.items() if k != "params"})
    state.stopped_early, state.stale_epochs = False, 0
    if source.best.exists():
        run.write_best(source.read_checkpoint(source.best))
    log.info("trains on from %s, epoch %d; %s", source.path, state.epoch, rates)
    return str(source.path)


def _is_done(epoch: int, step: int, state: TrainState) -> bool:
    return (epoch - 1, step) <= (state.epoch, state.step)


def _note_steps(run: RunDir, settings: RunConfig, progress: Progress) -> None:
    if progress.step_rows:
        run.append_steps(progress.step_rows)
    every = settings.training.print_every
    in_training = progress.phase == "train" and progress.kind == "step"
    if every and in_training and (progress.step - 1) % every == 0:
        log.info(
            "epoch: %d, steps: %d, train_loss: %.3f, running_acc: %.1f %%",
            progress.epoch,
            progress.step - 1,
            progress.loss,
            100 * progress.accuracy,
        )


def _announce(settings: RunConfig, state: TrainState, row: EpochMetrics) -> None:
    log.info("Epoch %d/%d", row.epoch, settings.training.epochs)
    log.info("train loss: %.4f accuracy: %.2f%%", row.train_loss, 100 * row.train_accuracy)
    if row.val_loss is not None and row.val_accuracy is not None:
        log.info("valid loss: %.4f accuracy: %.2f%%", row.val_loss, 100 * row.val_accuracy)
    if state.learning_rate < row.learning_rate and state.schedule.monitor is not None:
        log.info(
            "Epoch %05d: reducing learning rate of group 0 to %.4e.", row.epoch, state.learning_rate
        )


def _write_best(run: RunDir, settings: RunConfig, state: TrainState, row: EpochMetrics) -> None:
    """Write best.pt; its second name replaces that of the epoch that was the best before."""
    name = _best_name(settings, row)
    earlier = [r for r in state.history if r.epoch < row.epoch and r.val_accuracy is not None]
    run.write_best(_best_checkpoint(state), name)
    if name is not None and earlier:
        former = _best_name(settings, max(earlier, key=lambda r: r.val_accuracy or 0.0))
        if former is not None and former != name:
            (run.path / former).unlink(missing_ok=True)
    log.info("Best model saved to %s", run.best if name is None else run.path / name)


def _best_checkpoint(state: TrainState) -> dict[str, Any]:
    return {
        "model": state.model.state_dict(),
        "epoch": state.epoch,
        "val_accuracy": state.best.val_accuracy if state.best else None,
    }


def _best_name(settings: RunConfig, row: EpochMetrics) -> str | None:
    """Return best.pt's second name by the run's template (S2-10, S2-11)."""
    if settings.training.best_file_name is None:
        return None
    values = {
        "model": _class_name(settings.model),
        "acc": row.val_accuracy or 0.0,
        "lr": settings.optimizer.get("lr", 0.0),
        "opt": _class_name(settings.optimizer),
        "act": _class_name(settings.activation),
        "epoch": row.epoch,
    }
    return settings.training.best_file_name.format(**values)


@contextlib.contextmanager
def _event_writer(run: RunDir, settings: RunConfig) -> Iterator[Callable[[EpochMetrics], None]]:
    """Yield a function that notes a row for TensorBoard, or one that does nothing."""
    if not settings.training.tensorboard:
        yield lambda row: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RequestError(
            "training.tensorboard=true needs TensorBoard: pip install cifar-lab[tensorboard]"
        ) from None
    writer = SummaryWriter(str(run.path / "tensorboard"))

    def note(row: EpochMetrics) -> None:
        for name, value in dataclasses.asdict(row).items():
            if value is not None and name != "epoch":
                writer.add_scalar(name, value, row.epoch)

    try:
        yield note
    finally:
        writer.close()


@contextlib.contextmanager
def _log_to(run: RunDir) -> Iterator[None]:
    """Let the log reach train.log too."""
    handler = _LogFile(run)
    log.addHandler(handler)
    if log.level == logging.NOTSET:  # no command has set it: execute is called as a function
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


class _LogFile(logging.Handler):
    """Writes train.log; a line that cannot be written ends the run, as any other file's would."""

    def __init__(self, run: RunDir) -> None:
        super().__init__()
        self._run = run

    def emit(self, record: logging.LogRecord) -> None:
        self._run.append_log(self.format(record))


def _note_end(run: RunDir, before: RunSummary, error: BaseException) -> BaseException:
    """Write how a run ended early; return what to raise: itself, or RunFailed with one line."""
    stopped = isinstance(error, Stopped | KeyboardInterrupt)
    expected = isinstance(error, RequestError | NotNow | RunFailed | OSError)
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(run.path)
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError):
        first = f"the GPU's memory is full, try a smaller training.batch_size ({first})"
    message = f"{type(error).__name__}: {first}"
    with contextlib.suppress(OSError):  # a disk too full to note it: the reader sees a dead lock
        if not expected and not stopped:
            run.append_log("".join(traceback.format_exception(error)))
        status: Status = "interrupted" if stopped else "failed"
        if isinstance(error, NotNow):  # it did not start
            status = before.status
        noted = None if stopped else message
        run.write_summary(dataclasses.replace(run.read_summary(), status=status, error=noted))
    if expected or stopped:
        return error
    return RunFailed(f"{run.path} failed with {message}; train.log there says where")


def _training_fields(state: TrainState) -> dict[str, Any]:
    rows = state.history
    return {
        "epochs": state.epoch,
        "best_epoch": state.best.epoch if state.best else None,
        "best_val_accuracy": state.best.val_accuracy if state.best else None,
        "best_val_loss": state.best.val_loss if state.best else None,
        "effective_learning_rate": rows[-1].learning_rate if rows else None,
        "seconds": sum(row.seconds for row in rows),
        "images_per_second": (
            float(np.median([row.images_per_second for row in rows])) if rows else None
        ),
        "stopped_early": state.stopped_early,
        "diagnosis": diagnosis(rows),
    }


def _banner(settings: RunConfig) -> str:
    return (
        f"Training model {_class_name(settings.model)} with learning rate: "
        f"{settings.optimizer.get('lr')}, optimizer: {_class_name(settings.optimizer)} and "
        f"activation function: {_class_name(settings.activation)}"
    )


def _closing_table(settings: RunConfig, state: TrainState, summary: RunSummary) -> str:
    """Return S2's table of a run (S0-18, S2-08), and the test score below it."""
    best = state.best
    cells = {
        "Model": _class_name(settings.model),
        "Best Validation Accuracy": f"{best.val_accuracy:.4f}" if best else "-",
        "Validation Loss": f"{best.val_loss:.4f}" if best else "-",
        "Learning Rate": f"{best.learning_rate:g}" if best else f"{settings.optimizer.get('lr')}",
        "Optimizer": _class_name(settings.optimizer),
        "Activation": _class_name(settings.activation),
        "Epoch": str(best.epoch if best else summary.epochs),
    }
    widths = [max(len(name), len(cell)) for name, cell in cells.items()]
    lines = [
        " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in (cells.keys(), cells.values())
    ]
    if summary.test_accuracy is not None and summary.test_size:
        half = metrics.binomial_half_width(summary.test_accuracy, summary.test_size)
        lines.append(
            f"test accuracy of the {summary.scored_weights} weights: {summary.test_accuracy:.2%} "
            f"(95 % interval ±{half:.2%}, {summary.test_size:,} images)"
        )
    return "\n".join(lines)


def _class_name(component: dict[str, Any] | None) -> str:
    return component["_target_"].rpartition(".")[2] if component else "none"


def _versions() -> dict[str, str]:
    packages = ("cifar-lab", "torch", "torchvision", "numpy", "scikit-learn")
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _commit() -> str | None:
    """Return the git commit of the checkout that this code runs from, "+" if it is changed."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--dirty=+"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
