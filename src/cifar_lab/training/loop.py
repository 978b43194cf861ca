"""The training loop: `fit` advances a TrainState and yields.

`fit` touches no files. It yields about twice a second and at the end of each epoch; its caller
writes rows, saves the state, draws bars, and stops where a signal has come, all in one place.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from cifar_lab.config.run_config import EvaluationConfig, TrainingConfig
from cifar_lab.errors import RunFailed, Stopped
from cifar_lab.runs.metrics import BY_CLASS, EpochMetrics, StepMetrics, gain, scores_by_class
from cifar_lab.training.batches import Batches, in_order
from cifar_lab.training.device import autocast, derive_seed
from cifar_lab.training.group import Group
from cifar_lab.training.splits import Split
from cifar_lab.training.state import TrainState
from cifar_lab.training.step import Step, make_criterion


class Diverged(RunFailed):
    """The training loss became NaN or infinite."""


@dataclass(frozen=True)
class Progress:
    """What `fit` yields: its position, running loss and accuracy, a row at the end of an epoch."""

    kind: Literal["train", "validation", "epoch"]
    epoch: int
    step: int
    steps: int
    loss: float
    accuracy: float
    row: EpochMetrics | None = None
    improved: bool = False
    step_rows: tuple[StepMetrics, ...] = ()


def fit(
    state: TrainState,
    batches: Batches,
    validation: Split | None,
    config: TrainingConfig,
    evaluation: EvaluationConfig | None = None,
    *,
    watched: Split | None = None,
) -> Iterator[Progress]:
    """Train until `config.epochs` epochs are done or patience ends; yield on the way.

    The state is consistent at every yield: saved there and loaded again, training continues
    exactly. `validation` is scored after each epoch, by the settings of `evaluation` (the defaults
    if it is None). So is `watched`, a test split that a study looks at (S3, S4), but nothing is
    chosen by its scores. Raises Diverged when a loss is no longer finite.
    """
    evaluation = evaluation or EvaluationConfig()
    if state.compiled:
        # One graph per batch size: an epoch has two, and kernels for any size are slower.
        state.model.compile(dynamic=False)
    step = Step(state, make_criterion(config, batches.split, batches.num_classes), config)
    while state.epoch < config.epochs and not state.stopped_early:
        epoch = state.epoch + 1
        yield from train_epoch(state, batches, config, step)
        train_loss, train_accuracy, images = _means(state, epoch)
        # Each process's batch norm has seen other parts of the batches; the first one's is scored.
        state.group.share_buffers(state.model, state.scored_weights())
        scores: dict[str, float | None] = {"val_loss": None, "val_accuracy": None}
        for name, split in (("val", validation), ("test", watched)):
            if split is not None:
                by_class = name == "val" and config.monitor in BY_CLASS
                measured = yield from score_split(
                    state, split, batches, evaluation, by_class=by_class
                )
                scores |= {f"{name}_{quantity}": value for quantity, value in measured.items()}
                if not math.isfinite(measured["loss"]):
                    raise Diverged(
                        f"the {name} loss became {measured['loss']} in epoch {epoch}; "
                        f"try a smaller optimizer.lr (it is {state.used_rate:g})"
                    )
        row = EpochMetrics(
            epoch=epoch,
            learning_rate=state.used_rate,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            seconds=state.seconds,
            images_per_second=images / state.seconds if state.seconds > 0 else 0.0,
            **scores,
        )
        improved = _close_epoch(state, row, config)
        steps = len(batches)
        yield Progress("epoch", epoch, steps, steps, train_loss, train_accuracy, row, improved)


def train_epoch(
    state: TrainState, batches: Batches, config: TrainingConfig, step: Step
) -> Iterator[Progress]:
    """Train the rest of an epoch, from the step that the state is at; yield on the way."""
    epoch, group = state.epoch + 1, state.group
    if state.step == 0:  # else the epoch goes on: the generators' states came with the checkpoint
        seed = derive_seed(state.seed, "dropout", epoch)
        state.generator.manual_seed(seed)
        if state.compiled:
            torch.manual_seed(seed + group.rank)
        state.sums.zero_()
        state.seconds = 0.0
    # Validation, or whoever was yielded to, left the model in evaluation mode.
    state.train_mode(head_only=epoch <= config.frozen_epochs)
    started, seconds_before = time.perf_counter(), state.seconds
    group.yielded()
    recent: list[Tensor] = []  # loss and accuracy of the steps since the last yield
    followers = state.followers
    for images, labels in batches.epoch(epoch, start=state.step):
        group.part = batches.part(state.step)
        loss, sums = step.passes(images, labels)
        step.update()
        # On the device: reading the sums would wait for a GPU at every step.
        state.sums += sums
        if config.step_history:
            recent.append(torch.stack([loss, sums[1] / sums[2]]))
        state.step += 1
        state.used_rate = state.learning_rate  # before the schedule moves it for the next step
        for follower in followers:
            follower.after_step(state.epoch * len(batches) + state.step)
        state.seconds = seconds_before + time.perf_counter() - started
        wanted = config.print_every is not None and (state.step - 1) % config.print_every == 0
        if group.is_due() or wanted or state.step == len(batches):
            train_loss, accuracy, _ = _means(state, epoch)
            rows, steps = _step_rows(recent, epoch, state.step), len(batches)
            yield Progress("train", epoch, state.step, steps, train_loss, accuracy, step_rows=rows)
            recent.clear()
            group.yielded()


def score_split(
    state: TrainState,
    split: Split,
    batches: Batches,
    evaluation: EvaluationConfig,
    *,
    by_class: bool,
) -> Generator[Progress, None, dict[str, float]]:
    """Yield as the split is scored; return its mean loss and accuracy.

    With `by_class`, also its balanced accuracy and macro F1. In a group of processes each scores
    some of the batches, and nothing is yielded.
    """
    state.model.eval()
    epoch, group = state.epoch + 1, state.group
    sums = torch.zeros_like(state.sums)
    classes = [torch.zeros(2, 0, dtype=torch.long, device=sums.device)]  # labels over predictions
    clock, steps = Group(), math.ceil(len(split) / evaluation.batch_size)
    ordered = in_order(
        split,
        evaluation,
        # The training images' numbers: a network has learnt what they mean, and held-out images
        # may not decide anything, not even their own mean.
        batches.normalisation,
        crop_seed=derive_seed(state.seed, "evaluation", epoch),
        every=(group.rank, group.world),
    )
    for done, (images, labels) in enumerate(ordered, start=1):
        with torch.no_grad(), autocast(state.device, state.precision):
            logits = state.scored_logits(images).float()
            # A sum, since the last batch is smaller; plain cross-entropy whatever is trained on, so
            # that runs with label smoothing or class weights can be compared with others.
            loss = functional.cross_entropy(logits, labels, reduction="sum")
            predicted = logits.argmax(1)
            correct = (predicted == labels).sum()
            sums += torch.stack([loss, correct, torch.full_like(correct, len(labels))])
            if by_class:
                classes.append(torch.stack([labels, predicted]))
        if group.world == 1 and (clock.is_due() or done == steps):
            total, right, count = sums.tolist()
            yield Progress("validation", epoch, done, steps, total / count, right / count)
            clock.yielded()
            state.model.eval()  # whoever was yielded to may have used the model
    total, right, count = group.sum(sums).tolist()
    scores = {"loss": total / count, "accuracy": right / count}
    if by_class:
        pairs = group.gather(torch.cat(classes, dim=1).cpu())
        balanced, macro_f1 = scores_by_class(*pairs.numpy())
        scores |= {"balanced_accuracy": balanced, "macro_f1": macro_f1}
    return scores


def _close_epoch(state: TrainState, row: EpochMetrics, config: TrainingConfig) -> bool:
    """Record an epoch: history, best, schedule, patience. Return whether it is the best so far."""
    state.history.append(row)
    state.epoch, state.step = row.epoch, 0
    now = gain(row, config.monitor)
    before = None if state.best is None else gain(state.best, config.monitor)
    improved = now is not None and (before is None or now > before)  # of equal ones, the first
    if improved:
        state.best = row
    state.schedule.after_epoch(row)
    if config.patience is not None and now is not None:
        if state.best_monitored is None or now > state.best_monitored + config.min_delta:
            state.best_monitored, state.stale_epochs = now, 0
        else:
            state.stale_epochs += 1
        state.stopped_early = state.stale_epochs >= config.patience
    return improved


def _means(state: TrainState, epoch: int) -> tuple[float, float, int]:
    loss, correct, images = state.sums.tolist()
    if not math.isfinite(loss):
        raise Diverged(
            f"the training loss became {loss} in epoch {epoch}, by step {state.step}; "
            f"try a smaller optimizer.lr (it is {state.learning_rate:g})"
        )
    return loss / images, correct / images, int(images)


def _step_rows(recent: list[Tensor], epoch: int, step: int) -> tuple[StepMetrics, ...]:
    if not recent:
        return ()
    cells = torch.stack(recent).tolist()
    first = step - len(cells) + 1
    return tuple(StepMetrics(epoch, first + i, *values) for i, values in enumerate(cells))


# --- signals --------------------------------------------------------------------------------------


class Stop:
    """Receives SIGINT, SIGTERM and, when a terminal is closed, SIGHUP.

    Inside `graceful` a signal waits until training checks `is_wanted`; elsewhere it raises Stopped
    at once. A second signal always raises Stopped at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._graceful = False

    @contextlib.contextmanager
    def installed(self) -> Iterator["Stop"]:
        """Handle the signals of this process while the block runs.

        SIGHUP stays ignored if it is, as under nohup. Python delivers signals to its main thread
        only: in another thread nothing is handled.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        hang_up = getattr(signal, "SIGHUP", None)  # Windows has none
        if hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN:
            numbers.append(hang_up)
        before = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                # None: installed by a program around Python, which cannot be asked for it.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextlib.contextmanager
    def graceful(self) -> Iterator[None]:
        """Let a signal wait until `is_wanted` is called."""
        self._graceful = True
        try:
            yield
        finally:
            self._graceful = False

    def is_wanted(self, progress: Progress) -> bool:
        """Whether training is to stop where `fit` is now."""
        return self.signal is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.signal is not None
        self.signal = number
        if again or not self._graceful:
            raise Stopped(number)
