"""Where a run starts: at its own checkpoint, at that of a finished run, or at step 0."""

import dataclasses
from pathlib import Path
from typing import Any

from cifar_lab.config.run_config import RunConfig, load, to_plain
from cifar_lab.errors import Unavailable, UsageError, log, shorten_path
from cifar_lab.optimizers import build_optimizer, optimizer_settings
from cifar_lab.runs.files import load_checkpoint, weights_checksum
from cifar_lab.runs.metrics import gain
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.build import STEPS_OF_THE_RUN, check_same_data, make_schedule
from cifar_lab.training.state import TrainState


def restore(
    run: RunDir, config: RunConfig, state: TrainState, steps: int, checkpoint: dict[str, Any] | None
) -> str | None:
    """Load the run's checkpoint into a state, or that of the run that `continue_from` names.

    `steps` is the number of steps per epoch. Returns the folder that the run continues from, if
    any. Raises Unavailable if the data are not those that the checkpoint was trained on.
    """
    if checkpoint is not None:
        record = checkpoint.get("dataset") or run.read_summary().dataset  # older ones have none
        check_same_data(config.dataset, record, run.path)
        state.load_state_dict(checkpoint)
        log.info("resumed at epoch %d, step %d", state.epoch + 1, state.step)
        return None
    if config.continue_from is None:
        return None
    source = RunDir(config.continue_from)
    summary, before = source.read_summary(), source.read_config()
    if summary.status != "finished":
        raise Unavailable(
            f"continue_from={source.path} is {summary.status}; finish it first: "
            f"python -m cifar_lab.train {source.path}"
        )
    spans_run = any(
        key in STEPS_OF_THE_RUN and value is None for key, value in (config.scheduler or {}).items()
    )
    same = (before.optimizer, before.scheduler) == (config.optimizer, config.scheduler)
    last = source.read_last()
    check_same_data(config.dataset, (last or {}).get("dataset") or summary.dataset, source.path)
    if last is None:
        rates = _start_from_best(state, source, config, steps)
    elif same and not spans_run:
        state.load_state_dict(last)
        rates = "the learning rate continues too"
    else:
        left = config.training.epochs - last["epoch"]
        _build_anew(state, config, left, steps)
        fresh = [{**group} for group in state.optimizer.param_groups]
        state.load_state_dict({**last, "scheduler": None})
        for group, values in zip(state.optimizer.param_groups, fresh, strict=True):
            group.update(values)  # the checkpoint has the rates of the whole run's schedule
        rates = f"the learning rate is as configured, over the {left} additional epochs"
    state.stopped_early, state.stale_epochs = False, 0
    if before.training.monitor != config.training.monitor and state.best is not None:
        state.best_monitored = gain(state.best, config.training.monitor)
    if state.best is not None:
        run.write_best(load_checkpoint(source.best))
    log.info("continues from %s, epoch %d; %s", source.path, state.epoch, rates)
    return str(source.path)


def _start_from_best(state: TrainState, source: RunDir, config: RunConfig, steps: int) -> str:
    """Load best.pt of a run that kept no last.pt; return what starts anew, in words."""
    if not source.best.exists():
        raise UsageError(f"continue_from={source.path}: it has neither last.pt nor best.pt")
    best = load_checkpoint(source.best)
    state.model.load_state_dict(best["model"])
    for following in (state.average, state.lookahead):
        if following is not None:
            following.load_state_dict(None)  # from these weights on
    state.epoch = best["epoch"]
    state.history = [row for row in source.read_metrics() if row.epoch <= state.epoch]
    state.best, state.best_checksum = state.history[-1], weights_checksum(best["model"])
    state.best_monitored = gain(state.best, config.training.monitor)
    left = config.training.epochs - state.epoch
    _build_anew(state, config, left, steps)
    return (
        f"from best.pt, as last.pt was not kept: optimizer and rate start anew over {left} epochs"
    )


def _build_anew(state: TrainState, config: RunConfig, epochs: int, steps: int) -> None:
    """Build optimizer and schedule for `epochs`: that of the whole run has changed the rates."""
    settings = optimizer_settings(config.optimizer, state.device, config.precision)
    state.optimizer = build_optimizer(settings, state.model)
    state.schedule = make_schedule(config.scheduler, state.optimizer, epochs, steps)


def check_source(config: RunConfig, folder: Path) -> None:
    """Refuse to continue from a run that is not the beginning of this one."""
    source = load(folder / "config.yaml")
    # The same images give the same numbers for `auto`, wherever they are.
    taken = ["computed", "storage", "relative_to"]
    taken += [name for name in ("mean", "std") if getattr(config.dataset, name) == "auto"]
    values = {name: getattr(source.dataset, name) for name in taken}
    dataset = dataclasses.replace(config.dataset, **values)
    name = f"continue_from={shorten_path(folder)}"
    # with another split, images that were trained on would validate
    for role, mine, theirs in (
        ("dataset", dataset, source.dataset),
        ("split", config.split, source.split),
        ("model", config.model, source.model),
        ("optimizer._target_", config.optimizer["_target_"], source.optimizer["_target_"]),
    ):
        if to_plain(mine) != to_plain(theirs):
            raise UsageError(f"{name} has another {role}; it must be the same")
    if config.training.epochs <= source.training.epochs:
        raise UsageError(
            f"training.epochs={config.training.epochs} is wrong: {name} was to train "
            f"{source.training.epochs} epochs, which count as well; set a larger number"
        )
