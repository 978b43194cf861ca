"""The learning-rate schedule: a torch scheduler, when it steps and what it monitors."""

from dataclasses import dataclass
from typing import Any

import torch

from cifar_lab.config.run_config import RunConfig, SchedulerConfig
from cifar_lab.config.targets import build
from cifar_lab.errors import UsageError, did_you_mean
from cifar_lab.runs.metrics import BY_CLASS, EpochMetrics, epoch_columns
from cifar_lab.training.batches import batch_bounds

STEPS_OF_THE_RUN = ("T_max", "total_steps", "total_iters")
"""Arguments of schedulers that, left null, are the number of steps of the whole run."""


@dataclass
class Schedule:
    """A torch scheduler, when it steps and what it monitors; without one, a constant rate."""

    scheduler: Any = None
    step: str = "epoch"
    monitor: str | None = None

    def after_step(self, steps: int) -> None:
        """Step a scheduler that counts batches."""
        if self.scheduler is not None and self.step == "batch":
            self.scheduler.step()

    def after_epoch(self, row: EpochMetrics) -> None:
        """Step a scheduler that counts epochs, or one that monitors a column of metrics.csv."""
        if self.scheduler is None or self.step != "epoch":
            return
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(getattr(row, self.monitor or "val_accuracy"))
        else:
            self.scheduler.step()


def make_schedule(
    config: SchedulerConfig | None, optimizer: Any, epochs: int, steps: int
) -> Schedule:
    """Build the scheduler of `epochs` of so many `steps`; a length left null means all of it."""
    if config is None:
        return Schedule()
    length = max(epochs * (steps if config.step == "batch" else 1), 1)
    filled = {
        key: length if key in STEPS_OF_THE_RUN and value is None else value
        for key, value in config.target.items()
    }
    return Schedule(build(filled, "scheduler", optimizer=optimizer), config.step, config.monitor)


def check_scheduler(config: RunConfig, scheduler: SchedulerConfig, optimizer: Any) -> None:
    """Raise UsageError for a scheduler that does not fit its run or its optimizer."""
    step, monitor = scheduler.step, scheduler.monitor
    by_class = config.training.monitor in BY_CLASS
    scores = epoch_columns([], watched=True, by_class=by_class)
    known = [name for name in scores if name.endswith(("loss", "accuracy", "f1"))]
    if monitor is not None and monitor not in known:
        raise UsageError(
            f"scheduler.monitor={monitor} is wrong: it must be one of {', '.join(known)}"
            f"{did_you_mean(monitor, known)}"
        )
    if monitor is not None and monitor.startswith("test"):
        raise UsageError(f"scheduler.monitor={monitor} is wrong: nothing is chosen on the test set")
    if monitor is not None and step == "batch":
        raise UsageError("scheduler.step=batch is wrong: with a monitor it must be epoch")
    is_plateau = str(scheduler["_target_"]).endswith(".ReduceLROnPlateau")
    watched = monitor or ("val_accuracy" if is_plateau else "")
    if watched.startswith("val") and config.split.validation == 0:
        raise UsageError(
            f"scheduler.monitor={watched} is wrong: split.validation is 0; watch train_loss"
        )
    total, needed = scheduler.get("total_steps"), _steps(config, step)
    if total is not None and needed is not None and total < needed:
        raise UsageError(
            f"scheduler.total_steps={total} is wrong: the run takes {needed:,} steps; null counts "
            "them"
        )
    rates = {group["lr"] for group in optimizer.param_groups}
    make_schedule(scheduler, optimizer, 1, 1)
    if len({group["lr"] for group in optimizer.param_groups}) < len(rates):
        backbone = config.optimizer.backbone_lr
        cause = f"optimizer.backbone_lr={backbone}" if backbone is not None else "the scheduler"
        raise UsageError(
            f"{cause} is wrong: {scheduler['_target_']} sets one rate for all parameters, and "
            "the optimizer has two; choose another scheduler"
        )


def _steps(config: RunConfig, step: str) -> int | None:
    """Return how often a run's scheduler steps; None if the number of images is not known yet."""
    epochs, split, images = config.training.epochs, config.split, config.dataset.training_images
    if step == "epoch":
        return epochs
    if images is None:
        return None
    if split.source == "train":
        images -= split.held_out(images)
    return epochs * len(batch_bounds(images, config.training.batch_size))
