"""One run, from the config.yaml in its folder to summary.json."""

import contextlib
import dataclasses
import logging
import signal
import time
from collections.abc import Callable

import torch

from cifar_lab.config import targets
from cifar_lab.config.run_config import RunConfig, to_plain
from cifar_lab.errors import Stopped, Unavailable, listing
from cifar_lab.runs import provenance
from cifar_lab.runs.checkpoints import weights_checksum
from cifar_lab.runs.metrics import BY_CLASS, EpochMetrics, best_row
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.second_name import second_name
from cifar_lab.runs.summary import RunSummary, queued
from cifar_lab.training import console, sanity_checks
from cifar_lab.training.batches import Batches
from cifar_lab.training.build import build_state, load_splits
from cifar_lab.training.data_record import check_finished, data_record
from cifar_lab.training.device import configure, describe_device, release_memory, select_device
from cifar_lab.training.distributed import Group
from cifar_lab.training.loop import Progress, fit
from cifar_lab.training.precision import explain
from cifar_lab.training.resume import check_best, check_processes, restore
from cifar_lab.training.run_record import log_to, record_end, training_fields
from cifar_lab.training.scoring import draw_figures, evaluate
from cifar_lab.training.signals import Stop
from cifar_lab.training.splits import Splits
from cifar_lab.training.state import TrainState
from cifar_lab.version import RESULTS_VERSION

log = logging.getLogger("cifar_lab")


def run_experiment(
    run: RunDir,
    *,
    stop: Stop | None = None,
    rerun: bool = False,
    accept_code: bool = False,
    group: Group | None = None,
) -> RunSummary:
    """Train (or resume) the run in a folder, evaluate it, draw its figures; return its summary.

    A finished run is left as it is unless `rerun`. Raises Unavailable if another process holds the
    folder or if other code made the result; Stopped, with everything saved, on a signal; RunFailed
    or the run's own error if it failed, with status `failed` and the error in its folder. `group`
    are the processes that train it together, of which this is the first.
    """
    with run.lock():
        settings = run.own_config()
        summary = queued(settings) if rerun else run.read_summary()
        if summary.status == "running":  # and nobody held the lock: its process was killed
            summary = dataclasses.replace(summary, status="interrupted")
        code = provenance.code_version(settings)
        if summary.status == "finished" and not rerun:
            return _finished_before(run, summary, code, accept_code)
        if rerun:
            run.discard_results()
        with log_to(run), _tracking(run, settings) as tell_tracker:
            try:
                prepared = _prepare(run, settings, summary, code, accept_code, group)
                return _run(run, settings, prepared, stop or Stop(), tell_tracker)
            except (Exception, KeyboardInterrupt, Stopped) as error:
                cause = error if group is None else group.explain(error)
                raise record_end(run, summary, cause) from error


def _tracking(
    run: RunDir, settings: RunConfig
) -> contextlib.AbstractContextManager[Callable[[], None]]:
    """Return what lets a tracker follow the run; without a tracker, nothing of it is imported."""
    if settings.tracker is None:
        return contextlib.nullcontext(lambda: None)
    from cifar_lab.trackers.process import tracking

    return tracking(run, settings, settings.tracker)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A run that is about to train: its data, its state, and its summary with status running."""

    splits: Splits
    state: TrainState
    batches: Batches
    summary: RunSummary
    started: float


def _run(
    run: RunDir,
    settings: RunConfig,
    prepared: _Prepared,
    stop: Stop,
    tell_tracker: Callable[[], None],
) -> RunSummary:
    started = prepared.started
    state, batches = prepared.state, prepared.batches
    console.log_start(settings)
    epochs_before, training_since = state.epoch + state.step / len(batches), time.perf_counter()
    _train(run, settings, prepared, stop, tell_tracker)
    training = time.perf_counter() - training_since
    release_memory()
    summary = dataclasses.replace(prepared.summary, **training_fields(state))
    summary = _evaluate(run, summary, prepared.splits, state, batches)
    run.drop_checkpoints(last=not settings.training.keep_last)
    epochs = state.epoch - epochs_before
    summary = dataclasses.replace(
        summary,
        status="finished",
        seconds=summary.seconds or time.perf_counter() - started,
        epoch_seconds=training / epochs if epochs > 0.5 else None,
        overhead_seconds=time.perf_counter() - started - training,
    )
    run.write_summary(summary)
    console.log_result(settings, state, summary)
    return summary


def _prepare(
    run: RunDir,
    settings: RunConfig,
    summary: RunSummary,
    code: str,
    accept_code: bool,
    group: Group | None,
) -> _Prepared:
    """Build the run, or restore it from its checkpoint, and check it; write its summary."""
    started = time.perf_counter()
    checkpoint = run.read_last(log.warning)
    if checkpoint is not None and not accept_code:
        _check_code(run, summary, code)
    threads = settings.threads if checkpoint is None else run.resumed_threads(settings)
    device, threads = _configure(run, settings, threads)
    if group is not None:
        log.info("processes: %d", group.world)
        group.start(to_plain(settings), code=code, threads=threads, trust=targets.trusted())
    splits = load_splits(settings, device)
    fresh = checkpoint is None and settings.continue_from is None
    state, batches = build_state(settings, splits, device, initial_weights=fresh, group=group)
    log.info(splits.checked)
    if splits.storage is not None:
        log.info(splits.storage)
    state.dataset = data_record(settings.dataset)
    continued = restore(run, settings, state, len(batches), checkpoint)
    if group is not None:
        group.share(state.state_dict())
    summary = dataclasses.replace(
        queued(settings),
        status="running",
        device=device,
        device_name=describe_device(device),
        threads=threads,
        parameters=sum(p.numel() for p in state.model.parameters()),
        initial_learning_rate=settings.optimizer.get("lr"),
        continued_from=continued or summary.continued_from,
        versions=provenance.versions(),
        commit=provenance.commit(),
        results_version=RESULTS_VERSION,
        targets_hash=code.partition("-")[2],
        dataset=state.dataset,
    )
    run.write_summary(summary)
    found = check_processes(checkpoint, group)
    found += sanity_checks.before(settings, splits, state, batches, run)
    summary = dataclasses.replace(summary, warnings=console.log_warnings([], found))
    run.write_summary(summary)
    _rewrite_rows(run, settings, state)
    return _Prepared(splits, state, batches, summary, started)


def _rewrite_rows(run: RunDir, settings: RunConfig, state: TrainState) -> None:
    """Remove rows of epochs and steps that are past the checkpoint, which will be done again."""
    run.rewrite_metrics(
        state.history,
        watched=settings.evaluation.watch_test,
        by_class=settings.training.monitor in BY_CLASS,
    )
    if settings.training.step_history:
        run.rewrite_steps([r for r in run.read_steps() if _is_done(r.epoch, r.step, state)])


def _configure(run: RunDir, settings: RunConfig, threads: int | None) -> tuple[str, int]:
    """Set what torch keeps for the process; return the device and the number of threads."""
    device, reason = select_device(settings.device)
    threads = configure(device, threads, settings.deterministic)
    torch.manual_seed(settings.seed)
    log.info("run folder: %s", run.path)
    precision = settings.precision + explain(settings.precision, device)
    log.info("device: %s (%s), precision: %s, threads: %d", device, reason, precision, threads)
    return device, threads


def _evaluate(
    run: RunDir, summary: RunSummary, splits: Splits, state: TrainState, batches: Batches
) -> RunSummary:
    """Score the trained run, check the result and draw the figures; return the summary."""
    run.write_summary(summary)
    log.info("evaluating: %s", " and ".join(_counts(run.read_config(), splits)))
    summary = dataclasses.replace(summary, **evaluate(run, splits=splits))
    found = sanity_checks.after(run, splits, state, batches)
    warnings = console.log_warnings(summary.warnings, found)
    run.write_summary(dataclasses.replace(summary, warnings=warnings))
    if figures := [
        name for name, figure in run.read_config().figures.items() if figure is not None
    ]:
        log.info("drawing figures: %s", listing(figures))
    drawn, problems = draw_figures(run)
    return dataclasses.replace(summary, figures=drawn, warnings=warnings + problems)


def _counts(settings: RunConfig, splits: Splits) -> list[str]:
    """Return how many images of which split are scored, in words."""
    official = settings.evaluation.test == "official"
    test = splits.official_test if official else splits.test
    named = {"test": test, "validation": splits.validation}
    return [f"{len(split):,} {name} images" for name, split in named.items() if split is not None]


def _train(
    run: RunDir,
    settings: RunConfig,
    prepared: _Prepared,
    stop: Stop,
    tell_tracker: Callable[[], None],
) -> None:
    """Drive `fit` to its end: the one place that handles rows, checkpoints and signals."""
    saved = time.monotonic()
    splits, state = prepared.splits, prepared.state
    watched = splits.test if settings.evaluation.watch_test else None
    progress_of_run = fit(
        state,
        prepared.batches,
        splits.validation,
        settings.training,
        settings.evaluation,
        watched=watched,
    )
    tell_tracker()
    with console.Bars(settings.training.epochs) as bars, stop.graceful():
        for progress in progress_of_run:
            bars.show(progress)
            if progress.step_rows:
                run.append_steps(progress.step_rows)
            console.log_step(settings, progress)
            if progress.row is not None:
                run.append_metrics(progress.row)
                tell_tracker()
                console.log_epoch(settings, state, progress.row)
                if progress.improved:
                    _write_best(run, settings, state, progress.row)
            stopping = stop.is_wanted(progress)
            if state.group is not None:
                stopping = state.group.any(stopping)
            minutes = (time.monotonic() - saved) / 60
            due = minutes >= settings.training.checkpoint_minutes
            if progress.row is not None or stopping or due:
                run.write_last(state.state_dict())
                saved = time.monotonic()
            if stopping:
                raise _stopped_inside(stop, progress)
    if stop.signal is not None:  # it came after the last yield
        raise Stopped(stop.signal, "stopped after training; the same command evaluates the run")
    if state.stopped_early:
        log.info(
            "Early stopping triggered at epoch %d. No significant improvement in the validation "
            "metric for %d epochs.",
            state.epoch,
            settings.training.patience,
        )
    if not run.last.exists():  # zero epochs: the untrained weights are the result
        run.write_last(state.state_dict())
    check_best(run, state)


def _stopped_inside(stop: Stop, progress: Progress) -> Stopped:
    return Stopped(
        stop.signal or signal.SIGTERM,
        f"stopped in epoch {progress.epoch}, step {progress.step} of {progress.steps}; everything "
        "is saved, the same command resumes from there",
    )


def _finished_before(run: RunDir, summary: RunSummary, code: str, accept_code: bool) -> RunSummary:
    if not accept_code:
        _check_code(run, summary, code)
    check_finished(run.read_config().dataset, summary.dataset, run.path)
    score = f"test accuracy {summary.test_accuracy:.2%}" if summary.test_accuracy else "no score"
    log.info("finished before: %s (%s); rerun=true runs it again", run.path, score)
    if (note := provenance.reuse_note(summary)) is not None:
        log.info("%s: %s", run.path.name, note)
    return summary


def _check_code(run: RunDir, summary: RunSummary, code: str) -> None:
    if (difference := provenance.other_code(summary, code)) is not None:
        raise Unavailable(
            f"{run.path} was made by other code ({difference}): rerun=true runs it again, "
            "accept_code=true accepts it"
        )


def _is_done(epoch: int, step: int, state: TrainState) -> bool:
    return (epoch - 1, step) <= (state.epoch, state.step)


def _write_best(run: RunDir, settings: RunConfig, state: TrainState, row: EpochMetrics) -> None:
    """Write best.pt; its second name replaces that of the previous best epoch."""
    name = second_name(settings, row.epoch, row.val_accuracy or 0.0)
    weights = state.scored_weights()
    state.best_checksum = weights_checksum(weights)
    best = {
        "model": weights,
        "epoch": state.epoch,
        "val_accuracy": state.best.val_accuracy if state.best else None,
    }
    run.write_best(best, name)
    earlier = [r for r in state.history if r.epoch < row.epoch]
    best_before = best_row(earlier, settings.training.monitor)
    if name is not None and best_before is not None:
        former = second_name(settings, best_before.epoch, best_before.val_accuracy or 0.0)
        if former is not None and former != name:
            (run.path / former).unlink(missing_ok=True)
    if name is None:
        log.info("best epoch so far: its weights are in %s", run.best.name)
    else:  # the words of the reports' logs (S2)
        log.info("Best model saved to %s", run.path / name)
