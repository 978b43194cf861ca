"""Where a run starts: at its own checkpoint, at that of a finished run, or at step 0."""

import logging
from typing import Any

from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import Unavailable, UsageError
from cifar_lab.runs.files import load_checkpoint
from cifar_lab.runs.metrics import gain
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.build import optimizer_settings
from cifar_lab.training.data import check_same_data, recorded_data
from cifar_lab.training.state import (
    STEPS_OF_THE_RUN,
    TrainState,
    build_optimizer,
    make_schedule,
)

log = logging.getLogger("cifar_lab")


def restore(
    run: RunDir,
    config: RunConfig,
    state: TrainState,
    steps: int,
    checkpoint: dict[str, Any] | None,
) -> str | None:
    """Load the run's checkpoint into a state, or that of the run that `continue_from` names.

    `steps` is the number of steps per epoch. Returns the folder that the run continues from, if
    any. Raises Unavailable if the data are not those that the checkpoint was trained on.
    """
    if checkpoint is not None:
        trained_on = recorded_data(checkpoint, run.read_summary())
        check_same_data(config.dataset, trained_on, run.path)
        state.load_state_dict(checkpoint)
        log.info("resumed at epoch %d, step %d", state.epoch + 1, state.step)
        return None
    if config.continue_from is None:
        return None
    source = RunDir(config.continue_from)
    found = _final_checkpoint(source)
    check_same_data(config.dataset, recorded_data(found, source.read_summary()), source.path)
    if _keeps_rates(config, source.read_config()):
        state.load_state_dict(found)
        rates = "the learning rate continues too"
    else:
        left = config.training.epochs - found["epoch"]
        _load_with_new_rates(state, found, config, left, steps)
        rates = f"the learning rate is as configured, over the {left} additional epochs"
    state.stopped_early, state.stale_epochs = False, 0
    if source.read_config().training.monitor != config.training.monitor and state.best is not None:
        state.best_monitored = gain(state.best, config.training.monitor)
    if state.best is not None:
        run.write_best(load_checkpoint(source.best))
    log.info("continues from %s, epoch %d; %s", source.path, state.epoch, rates)
    return str(source.path)


def _final_checkpoint(source: RunDir) -> dict[str, Any]:
    if source.status != "finished":
        raise Unavailable(
            f"continue_from={source.path} is {source.status}; finish it first: "
            f"python -m cifar_lab.train {source.path}"
        )
    found = source.read_last(log.warning)
    if found is None:
        raise UsageError(
            f"continue_from={source.path}: it has no last.pt to continue from "
            "(training.keep_last=true keeps it)"
        )
    return found


def _keeps_rates(config: RunConfig, before: RunConfig) -> bool:
    """Whether optimizer and schedule are the same and the schedule does not span the whole run."""
    spans_run = any(
        key in STEPS_OF_THE_RUN and value is None for key, value in (config.scheduler or {}).items()
    )
    same = (before.optimizer, before.scheduler) == (config.optimizer, config.scheduler)
    return same and not spans_run


def _load_with_new_rates(
    state: TrainState, found: dict[str, Any], config: RunConfig, epochs: int, steps: int
) -> None:
    """Load a checkpoint, but not its learning rates: the schedule starts anew over `epochs`."""
    # The schedule of the whole run has changed the settings of the optimizer that was built.
    optimizer = optimizer_settings(config.optimizer, state.device)
    state.optimizer = build_optimizer(optimizer, state.model)
    state.schedule = make_schedule(config.scheduler, state.optimizer, epochs, steps)
    fresh = [
        {key: value for key, value in group.items() if key != "params"}
        for group in state.optimizer.param_groups
    ]
    state.load_state_dict({**found, "scheduler": None})
    for group, values in zip(state.optimizer.param_groups, fresh, strict=True):
        group.update(values)
