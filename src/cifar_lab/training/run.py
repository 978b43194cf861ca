"""One run, from the config.yaml in its folder to summary.json."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from cifar_lab.config import targets
from cifar_lab.config.identity import identity
from cifar_lab.config.launch import Request, sets_one
from cifar_lab.config.run_config import RunConfig, flatten, to_plain
from cifar_lab.errors import Stopped, Unavailable, listing, log
from cifar_lab.runs import summary as summaries
from cifar_lab.runs.metrics import BY_CLASS
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.summary import RunSummary, queued
from cifar_lab.training import build, console, sanity_checks
from cifar_lab.training.batches import Batches
from cifar_lab.training.device import configure, describe_device, explain_precision, select_device
from cifar_lab.training.group import Group
from cifar_lab.training.loop import Stop, fit
from cifar_lab.training.preflight import run_folder
from cifar_lab.training.scoring import draw_again, evaluate
from cifar_lab.training.splits import Splits
from cifar_lab.training.state import TrainState
from cifar_lab.version import RESULTS_VERSION

_SHARE_OF_TIME = 0.05  # that checkpoints at the ends of epochs may take


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
    stop, group = stop or Stop(), group or Group()
    with run.lock():  # before anything is read: another process could be writing it
        config = run.own_config()
        summary = queued(config) if rerun else run.read_summary()
        if summary.status == "running":  # and nobody held the lock: its process was killed
            summary = dataclasses.replace(summary, status="interrupted")
        code = summaries.code_version(config)
        has_result = summary.status == "finished" or run.last.exists()
        difference = summaries.other_code(summary, code) if has_result else None
        if difference is not None and not accept_code and not rerun:
            raise Unavailable(
                f"{run.path} was made by other code ({difference}): rerun=true runs it again, "
                "accept_code=true accepts it"
            )
        if summary.status == "finished" and not rerun:
            return _finished_before(run, config, summary)
        if rerun:
            run.discard_results()
        tracking: contextlib.AbstractContextManager[Callable[[], None]]
        tracking = contextlib.nullcontext(lambda: None)
        if config.tracker is not None:  # else nothing of it is imported
            from cifar_lab.trackers.sending import Follower

            tracking = Follower(run, config.name, config.tracker)
        with console.log_to(run), tracking as tell_tracker:
            try:
                training = _prepare(run, config, summary, code, group)
                console.log_start(config)
                since, epochs_before = time.perf_counter(), training.epochs_done
                train_to_end(training, stop, tell_tracker)
                seconds = time.perf_counter() - since
                return _finish(training, seconds, training.epochs_done - epochs_before)
            except (Exception, KeyboardInterrupt, Stopped, SystemExit) as error:
                # torchrun sends SIGTERM to all when one process has ended: the reason comes first.
                with stop.graceful():
                    raise console.record_end(run, summary, group.explain(error)) from error


def open_run(request: Request) -> RunDir:
    """Return the folder of the one run of a request, made once its data are known to be there.

    Of a finished run the figures are drawn again if the request changes them; whatever else it
    asks for that cannot be applied to a finished run is named.
    """
    config, run = request.runs[0].config, RunDir(run_folder(request))
    rerun = request.options.rerun
    if rerun or not run.summary_file.exists() or run.status != "finished":
        check_start(run, config, rerun=rerun)
        return RunDir.create(config, run.path, anew=rerun)
    before = run.read_config()
    if identity(before) != identity(config):
        return RunDir.create(config, run.path)
    dataset = dataclasses.replace(before.dataset, display_names=config.dataset.display_names)
    redrawn = dataclasses.replace(before, figures=config.figures, dataset=dataset)
    ignored = not_applied(redrawn, config, request.runs[0].overrides)
    if ignored:
        log.info(
            "%s is finished, and %s cannot be applied to it: rerun=true trains it again%s",
            run.path,
            listing(ignored),
            "; `cifar_lab.track` sends it as it is" * (config.tracker is not None),
        )
    run = RunDir.create(redrawn, run.path)
    if redrawn != before:
        drawn, _ = draw_again(run)
        log.info("drawn again: %s (%s)", run.figures, listing(drawn))
    return run


def not_applied(stored: RunConfig, config: RunConfig, words: Sequence[str]) -> list[str]:
    """Return the words of a command line that ask for another config than a finished run has."""
    before, asked = flatten(to_plain(stored)), flatten(to_plain(config))
    changed = [key for key in asked if asked[key] != before.get(key)]
    return [word for word in words if sets_one(word, changed)]


def check_start(run: RunDir, config: RunConfig, *, rerun: bool) -> None:
    """Raise what would end a run as it starts: its data, or the run that it continues, are gone."""
    build.check_data(config)
    if config.continue_from is not None and (rerun or not run.last.exists()):
        from cifar_lab.training.resume import check_source

        check_source(config, Path(config.continue_from))


def _finished_before(run: RunDir, config: RunConfig, summary: RunSummary) -> RunSummary:
    build.check_finished(config.dataset, summary.dataset, run.path)
    accuracy = summary.test_accuracy
    score = "no score" if accuracy is None else f"test accuracy {accuracy:.2%}"
    log.info("finished before: %s (%s); rerun=true runs it again", run.path, score)
    if (note := summaries.reuse_note(summary)) is not None:
        log.info("%s: %s", run.path.name, note)
    return summary


@dataclasses.dataclass(frozen=True)
class Training:
    """A run that trains: its data, its state, and its summary as training began."""

    run: RunDir
    config: RunConfig
    splits: Splits
    state: TrainState
    batches: Batches
    summary: RunSummary
    started: float

    @property
    def epochs_done(self) -> float:
        """How many epochs are trained, with the part of the present one that is done."""
        return self.state.epoch + self.state.step / len(self.batches)


def _prepare(
    run: RunDir, config: RunConfig, summary: RunSummary, code: str, group: Group
) -> Training:
    """Build the run, or restore it from its checkpoint, and check it; write its summary."""
    started = time.perf_counter()
    checkpoint = run.read_last()
    # Another number of threads adds up in another order, and so gives other bits: a run is resumed
    # with the number that it began with, on whatever machine.
    threads = config.threads if checkpoint is None else run.resumed_threads(config)
    device, threads = _configure(run, config, threads)
    if group.world > 1:
        log.info("processes: %d", group.world)
        others = {"code": code, "threads": threads, "trust": targets.trusted()}
        group.share({"config": to_plain(config), **others})
    splits = build.load_splits(config, device)
    fresh = checkpoint is None and config.continue_from is None
    state, batches = build.build_state(config, splits, device, initial_weights=fresh, group=group)
    for line in filter(None, (splits.checked, splits.storage)):
        log.info(line)
    state.dataset = build.data_record(config.dataset)
    continued = None
    if not fresh:
        from cifar_lab.training.resume import restore

        continued = restore(run, config, state, len(batches), checkpoint)
        console.check_best(run, state)
    if group.world > 1:
        group.share(state.state_dict())
    warnings = sanity_checks.before(config, splits, state, batches)
    before = group.world if checkpoint is None else checkpoint.get("processes", 1)
    if before != group.world:
        warnings.append(
            f"the number of processes changes from {before} to {group.world}: sums are rounded "
            "differently, and batch norm sees other parts of a batch"
        )
    summary = dataclasses.replace(
        queued(config),
        status="running",
        device=device,
        device_name=describe_device(device),
        threads=threads,
        parameters=sum(p.numel() for p in state.model.parameters()),
        continued_from=continued or summary.continued_from,
        versions=summaries.versions(),
        commit=summaries.commit(),
        results_version=RESULTS_VERSION,
        targets_hash=code.partition("-")[2],
        warnings=console.log_warnings([], warnings),
        dataset=state.dataset | ({} if splits.verified == "all" else {"verified": splits.verified}),
    )
    run.write_summary(summary)
    # Rows past the checkpoint go: their epochs and steps will be done again.
    by_class = config.training.monitor in BY_CLASS
    run.rewrite_metrics(state.history, watched=config.evaluation.watch_test, by_class=by_class)
    if config.training.step_history:
        done = (state.epoch, state.step)
        run.rewrite_steps([r for r in run.read_steps() if (r.epoch - 1, r.step) <= done])
    return Training(run, config, splits, state, batches, summary, started)


def _configure(run: RunDir, config: RunConfig, threads: int | None) -> tuple[str, int]:
    """Set what torch keeps for the process; return the device and the number of threads."""
    device = select_device(config.device)
    threads = configure(device, threads, config.deterministic)
    torch.manual_seed(config.seed)  # for models of one's own that draw from torch's generator
    log.info("run folder: %s", run.path)
    name = f" ({describe_device(device)})" if device != "cpu" else ""
    precision = config.precision + explain_precision(config.precision, device)
    log.info("device: %s%s, precision: %s, threads: %d", device, name, precision, threads)
    return device, threads


def train_to_end(training: Training, stop: Stop, tell_tracker: Callable[[], None]) -> None:
    """Drive `fit` to its end: the one place that handles rows, checkpoints and signals."""
    run, config, splits, state = training.run, training.config, training.splits, training.state
    saved, cost = time.monotonic(), 0.0  # when the last checkpoint was written, and its seconds
    kept = (state.epoch, state.step) if run.last.exists() else None
    watched = splits.test if config.evaluation.watch_test else None
    settings = config.training, config.evaluation
    steps_of_run = fit(state, training.batches, splits.validation, *settings, watched=watched)
    tell_tracker()
    bars, pace = console.Bars(config.training.epochs), console.StepPace(config)
    with contextlib.closing(bars), stop.graceful():
        for progress in steps_of_run:
            run.check_owner()
            # Rows first: one that is newer than the checkpoint is dropped when the run is resumed.
            bars.show(progress)
            pace.notice(state, progress)
            if progress.step_rows:
                run.append_steps(progress.step_rows)
            console.log_step(config, progress)
            if progress.row is not None:
                run.append_metrics(progress.row)
                tell_tracker()
                console.log_epoch(config, state, progress.row)
                if progress.improved:
                    console.write_best(run, config, state, progress.row)
            stopping = state.group.any(stop.is_wanted(progress))
            began = time.monotonic()
            due = began - saved >= 60 * config.training.checkpoint_minutes
            # An epoch of two seconds on a GPU is not worth a checkpoint of half a second.
            cheap = progress.row is not None and cost <= _SHARE_OF_TIME * (began - saved)
            if stopping or due or cheap:
                run.write_last(state.state_dict())
                kept, saved = (state.epoch, state.step), time.monotonic()
                cost = saved - began
            if stopping:
                raise Stopped(
                    stop.signal or signal.SIGTERM,
                    f"stopped in epoch {progress.epoch}, step {progress.step} of {progress.steps}; "
                    "everything is saved, the same command resumes from there",
                )
    if kept != (state.epoch, state.step):  # of zero epochs, the untrained weights are the result
        run.write_last(state.state_dict())
    if stop.signal is not None:  # it came after the last yield
        raise Stopped(stop.signal, "stopped after training; the same command evaluates the run")
    if state.stopped_early:
        log.info(
            "Early stopping triggered at epoch %d. No significant improvement in the validation "
            "metric for %d epochs.",
            state.epoch,
            config.training.patience,
        )
    console.check_best(run, state)


def _finish(training: Training, seconds: float, epochs: float) -> RunSummary:
    """Score the trained run, check the result, draw the figures; return the final summary.

    `seconds` and `epochs` are those of this process's training.
    """
    run, config, splits, state = training.run, training.config, training.splits, training.state
    summary = dataclasses.replace(training.summary, **console.training_fields(state))
    run.write_summary(summary)
    log.info("evaluating the run")
    summary = dataclasses.replace(summary, **evaluate(run, splits=splits))
    questionable = sanity_checks.after(run, splits, state, training.batches)
    warnings = console.log_warnings(summary.warnings, questionable)
    run.write_summary(dataclasses.replace(summary, warnings=warnings))
    if figures := [name for name, figure in config.figures.items() if figure is not None]:
        log.info("drawing figures: %s", listing(figures))
    drawn, problems = console.draw_figures(run)
    total = time.perf_counter() - training.started
    summary = dataclasses.replace(
        summary,
        status="finished",
        figures=drawn,
        warnings=warnings + problems,
        seconds=summary.seconds or total,
        epoch_seconds=seconds / epochs if epochs > 0.5 else None,
        overhead_seconds=total - seconds,
    )
    console.log_result(config, state, summary)
    run.write_summary(summary)
    keep = config.training.keep_last
    if keep == "auto":  # where training may go on
        keep = state.stopped_early
    # After all else: without it, a run that is not finished trains anew. It may hold the only
    # weights, where there are no validation images or the last ones are scored.
    if not keep and summary.scored_weights == "best":
        run.last.unlink(missing_ok=True)
    return summary
