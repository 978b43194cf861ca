"""The loop: `fit` moves a TrainState forward and yields; `predict` turns a model into logits.

`fit` knows no files. It yields about twice a second and at the end of each epoch; whoever iterates
writes rows, saves the state, draws bars, answers signals and stops, all in one visible place.
"""

import math
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from cifar_lab.components import build_scheduler
from cifar_lab.config import Component, TrainingConfig
from cifar_lab.data import Batches, Normalisation, Split, in_order
from cifar_lab.device import autocast, derive_seed
from cifar_lab.errors import RequestError, RunFailed
from cifar_lab.metrics import EpochMetrics, Predictions, StepMetrics, columns

_YIELD_SECONDS = 0.5


class Diverged(RunFailed):
    """The training loss became NaN or infinite."""


class KeyedDropout(nn.Dropout):
    """Dropout whose mask comes from the run's own generator, never from torch's global one."""

    def __init__(self, p: float, generator: torch.Generator) -> None:
        super().__init__(p)
        self.generator = generator

    def forward(self, input: Tensor) -> Tensor:
        """Zero each element with probability p and scale the others by 1 / (1 - p)."""
        if not self.training or self.p == 0:
            return input
        return input * dropout_mask(input, self.p, self.generator)


def dropout_mask(like: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Return a tensor shaped as `like` that is 0 with probability p and else 1 / (1 - p).

    On a CPU the draw is the cost of dropout (`bernoulli_` draws one number per element), so four
    elements share one 64-bit draw: p is rounded to a multiple of 2**-16.
    """
    if like.device.type != "cpu":
        mask = torch.empty_like(like, dtype=torch.float32)
        return mask.bernoulli_(1 - p, generator=generator).div_(1 - p).to(like.dtype)
    count = like.numel()
    bits = torch.empty((count + 3) // 4, dtype=torch.int64)
    bits.random_(-(2**63), None, generator=generator)
    threshold = round(p * 65536) - 32768
    kept = bits.view(torch.int16)[:count] >= threshold
    mask = torch.empty_like(like)
    if not _is_dense(mask):  # a transposed view, say
        mask = torch.empty(like.shape, dtype=like.dtype)
    # as_strided keeps the draw in memory order, so that no layout needs a copy of the mask
    flat = mask.as_strided((count,), (1,))
    torch.mul(kept, 1 / (1 - p), out=flat)
    return mask


def key_dropout(model: nn.Module, generator: torch.Generator) -> None:
    """Replace each nn.Dropout within a model by a KeyedDropout; no name of a parameter changes."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                keyed = KeyedDropout(child.p, generator)
                keyed.train(child.training)
                setattr(parent, name, keyed)


class Schedule:
    """A torch scheduler with when it steps and what it watches; without one, a constant rate."""

    def __init__(self, scheduler: Any = None, step: str = "epoch", monitor: str | None = None):
        self.scheduler = scheduler
        self.step = step
        self.monitor = monitor

    def after_batch(self) -> None:
        """Step a scheduler that counts batches."""
        if self.scheduler is not None and self.step == "batch":
            self.scheduler.step()

    def after_epoch(self, row: EpochMetrics) -> None:
        """Step a scheduler that counts epochs, or one that watches a column of metrics.csv."""
        if self.scheduler is None or self.step != "epoch":
            return
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            watched = getattr(row, self.monitor or "val_accuracy")
            if watched is None:
                raise RequestError(
                    f"scheduler.monitor={self.monitor} is not measured: split.validation is 0; "
                    "watch train_loss, or hold out a validation split"
                )
            self.scheduler.step(watched)
        else:
            self.scheduler.step()


@dataclass
class TrainState:
    """All that training is: what a checkpoint holds, and nothing else.

    `compiled`: `fit` compiles the network; dropout then draws from torch's global generator, seeded
    anew each epoch, since torch.compile cannot take another one in.
    `epoch` counts finished epochs and `step` the batches done in the current one; `sums` holds
    [loss * images, correct, images] of the current epoch, on the device; `used_rate` is the
    learning rate of the last step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    seed: int
    device: str
    precision: str
    compiled: bool = False
    generator: torch.Generator = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    sums: Tensor = field(init=False)
    epoch: int = 0
    step: int = 0
    used_rate: float = 0.0
    seconds: float = 0.0
    history: list[EpochMetrics] = field(default_factory=list)
    best: EpochMetrics | None = None
    stale_epochs: int = 0
    best_monitored: float | None = None
    stopped_early: bool = False

    def __post_init__(self) -> None:
        kind = self.device.split(":")[0]
        self.generator = torch.Generator(self.device)
        self.generator.manual_seed(derive_seed(self.seed, "dropout", 1))
        self.scaler = torch.amp.GradScaler(kind, enabled=self.precision == "fp16")
        self.sums = torch.zeros(3, dtype=torch.float64 if kind != "mps" else torch.float32)
        self.sums = self.sums.to(self.device)
        if not self.compiled:
            key_dropout(self.model, self.generator)

    @property
    def learning_rate(self) -> float:
        """The rate of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values only: what `load_state_dict` needs to go on exactly."""
        scheduler = self.schedule.scheduler
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": scheduler.state_dict() if scheduler is not None else None,
            "scaler": self.scaler.state_dict(),
            "generator": self.generator.get_state(),
            "global_generators": _global_generators(self.device),
            "sums": self.sums.cpu(),
            "epoch": self.epoch,
            "step": self.step,
            "used_rate": self.used_rate,
            "seconds": self.seconds,
            "history": history_tensor(self.history),
            "best": history_tensor([self.best] if self.best else []),
            "stale_epochs": self.stale_epochs,
            "best_monitored": self.best_monitored,
            "stopped_early": self.stopped_early,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; RequestError if it is of another model or optimizer."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.schedule.scheduler is not None and state["scheduler"] is not None:
                self.schedule.scheduler.load_state_dict(state["scheduler"])
            self.scaler.load_state_dict(state["scaler"])
            self.generator.set_state(state["generator"])
            self.sums.copy_(state["sums"])
            _set_global_generators(self.device, state["global_generators"])
            self.history = history_rows(state["history"])
            self.best = next(iter(history_rows(state["best"])), None)
            for name in (
                "epoch",
                "step",
                "used_rate",
                "seconds",
                "stale_epochs",
                "best_monitored",
                "stopped_early",
            ):
                setattr(self, name, state[name])
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            first = str(error).strip().splitlines()[0][:200]
            raise RequestError(
                f"the checkpoint is of another model or optimizer: {first}; rerun=true starts anew"
            ) from None


@dataclass(frozen=True)
class Progress:
    """What `fit` yields: where it is, running loss and accuracy, a row at an epoch's end."""

    kind: Literal["step", "epoch"]
    phase: Literal["train", "validation"]
    epoch: int
    step: int
    steps: int
    loss: float
    accuracy: float
    row: EpochMetrics | None = None
    improved: bool = False
    step_rows: tuple[StepMetrics, ...] = ()


def make_schedule(component: Component | None, optimizer: Any, epochs: int, steps: int) -> Schedule:
    """Build the scheduler; a `T_max` or `total_steps` left null means the whole run."""
    if component is None:
        return Schedule()
    when = component.get("step", "epoch")
    scheduler = build_scheduler(component, optimizer, epochs * (steps if when == "batch" else 1))
    return Schedule(scheduler, when, component.get("monitor"))


def fit(
    state: TrainState,
    batches: Batches,
    validation: Split | None,
    settings: TrainingConfig,
    *,
    watched: Split | None = None,
    evaluation_batch_size: int = 128,
    evaluation_crop: int = 0,
) -> Iterator[Progress]:
    """Train until `settings.epochs` epochs are done or patience ends; yield on the way.

    The state is consistent at every yield: saved there and loaded again, training goes on exactly.
    `validation` is scored after each epoch; `watched`, a test split that a study looks at (S3, S4),
    too, but nothing is chosen by it. Raises Diverged when the loss is no longer finite.
    """
    if state.compiled:
        # One graph for each size of batch: an epoch has two, and kernels for any size are slower.
        state.model.compile(dynamic=False)
    while state.epoch < settings.epochs and not state.stopped_early:
        epoch = state.epoch + 1
        yield from _train_epoch(state, batches, settings)
        train_loss, train_accuracy, images = _means(state, epoch)
        scores: dict[str, tuple[float, float]] = {}
        for name, split in (("val", validation), ("test", watched)):
            if split is not None:
                scores[name] = yield from _score(
                    state,
                    split,
                    batches,
                    batch_size=evaluation_batch_size,
                    crop_padding=evaluation_crop,
                )
        for name, (loss, _) in scores.items():
            if not math.isfinite(loss):
                raise Diverged(
                    f"the {name} loss became {loss} in epoch {epoch}; "
                    f"try a smaller optimizer.lr (it is {state.used_rate:g})"
                )
        row = EpochMetrics(
            epoch=epoch,
            learning_rate=state.used_rate,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            val_loss=scores["val"][0] if "val" in scores else None,
            val_accuracy=scores["val"][1] if "val" in scores else None,
            seconds=state.seconds,
            images_per_second=images / state.seconds if state.seconds > 0 else 0.0,
            test_loss=scores["test"][0] if "test" in scores else None,
            test_accuracy=scores["test"][1] if "test" in scores else None,
        )
        improved = _close_epoch(state, row, settings)
        yield Progress(
            kind="epoch",
            phase="train",
            epoch=epoch,
            step=len(batches),
            steps=len(batches),
            loss=row.train_loss,
            accuracy=row.train_accuracy,
            row=row,
            improved=improved,
        )


def predict(
    model: nn.Module,
    split: Split,
    *,
    normalisation: Normalisation,
    batch_size: int,
    memory_format: torch.memory_format = torch.contiguous_format,
    precision: str = "fp32",
    crop_padding: int = 0,
    crop_seed: int = 0,
    views: str = "one",
) -> Predictions:
    """Return the logits of a split's images in evaluation mode, in the split's order.

    `views` is EvaluationConfig's: over which views of an image its logits are averaged.
    """
    model.eval()
    logits, done = torch.empty(0), 0
    with torch.inference_mode(), autocast(str(split.images.device), precision):
        for images, _ in in_order(
            split,
            batch_size=batch_size,
            normalisation=normalisation,
            memory_format=memory_format,
            crop_padding=crop_padding,
            crop_seed=crop_seed,
        ):
            part = mean_logits(model, images, views)
            if done == 0:
                # One array for all: small results kept beside large activations fragment glibc's
                # heap, which grew by 40 kB an image.
                logits = torch.empty((len(split), *part.shape[1:]), device=part.device)
            logits[done : done + len(part)] = part
            done += len(part)
    labels = split.labels.index_select(0, split.indices.to(split.labels.device))
    return Predictions(logits.cpu().numpy(), labels.cpu().numpy(), split.indices.numpy())


def mean_logits(model: nn.Module, images: Tensor, views: str) -> Tensor:
    """Return the logits (B, C) of float images (B, C, H, W), averaged over views of each.

    `one` is the image alone, `mirrored` it and its mirror image, `moved` these two with half of the
    weight, and with the other half the two moved by a pixel along the diagonal, either way, the
    border reflected: the six views of airbench94 (Jordan 2024, arXiv:2404.00498).
    """

    def both(shifted: Tensor) -> Tensor:
        logits: Tensor = (model(shifted) + model(shifted.flip(-1))) / 2
        return logits

    if views == "one":
        logits: Tensor = model(images)
        return logits
    if views == "mirrored":
        return both(images)
    padded = functional.pad(images, [1] * 4, mode="reflect")
    moved = both(padded[..., :-2, :-2]) + both(padded[..., 2:, 2:])
    return both(images) / 2 + moved / 4


def history_tensor(rows: list[EpochMetrics]) -> Tensor:
    """Return rows as float64 (rows, columns); a missing value is NaN."""
    names = columns(EpochMetrics)
    cells = [[math.nan if (v := getattr(r, n)) is None else v for n in names] for r in rows]
    return torch.tensor(cells, dtype=torch.float64).reshape(len(rows), len(names))


def history_rows(table: Tensor) -> list[EpochMetrics]:
    """Return what history_tensor was made of."""
    names = columns(EpochMetrics)
    rows = []
    for cells in table.tolist():
        values: dict[str, Any] = {
            n: None if math.isnan(v) else v for n, v in zip(names, cells, strict=True)
        }
        rows.append(EpochMetrics(**{**values, "epoch": int(cells[0])}))
    return rows


def _train_epoch(
    state: TrainState, batches: Batches, settings: TrainingConfig
) -> Iterator[Progress]:
    epoch = state.epoch + 1
    if state.step == 0:
        seed = derive_seed(state.seed, "dropout", epoch)
        state.generator.manual_seed(seed)
        if state.compiled:
            torch.manual_seed(seed)
        state.sums.zero_()
        state.seconds = 0.0
    state.model.train()
    started, noted = time.perf_counter(), time.perf_counter()
    seconds_before = state.seconds
    recent: list[Tensor] = []
    for images, labels in batches.epoch(epoch, start=state.step):
        with autocast(state.device, state.precision):
            logits = state.model(images)
            loss = functional.cross_entropy(
                logits.float(), labels, label_smoothing=settings.label_smoothing
            )
        state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.used_rate = state.learning_rate
        state.schedule.after_batch()
        with torch.no_grad():
            correct = (logits.argmax(1) == labels).sum()
            count = len(labels)
            state.sums += torch.stack([loss * count, correct, torch.full_like(correct, count)])
            if settings.step_history:
                recent.append(torch.stack([loss.detach(), correct / count]))
        state.step += 1
        now = time.perf_counter()
        state.seconds = seconds_before + now - started
        wanted = settings.print_every is not None and (state.step - 1) % settings.print_every == 0
        if now - noted >= _YIELD_SECONDS or wanted or state.step == len(batches):
            loss_mean, accuracy, _ = _means(state, epoch)
            yield Progress(
                kind="step",
                phase="train",
                epoch=epoch,
                step=state.step,
                steps=len(batches),
                loss=loss_mean,
                accuracy=accuracy,
                step_rows=_step_rows(recent, epoch, state.step),
            )
            recent.clear()
            noted = time.perf_counter()


def _score(
    state: TrainState, split: Split, batches: Batches, *, batch_size: int, crop_padding: int
) -> Generator[Progress, None, tuple[float, float]]:
    """Yield as the split is scored; return its mean loss and accuracy."""
    state.model.eval()
    epoch = state.epoch + 1
    sums = torch.zeros_like(state.sums)
    noted, steps = time.perf_counter(), math.ceil(len(split) / batch_size)
    ordered = in_order(
        split,
        batch_size=batch_size,
        normalisation=batches.normalisation,
        memory_format=batches.memory_format,
        crop_padding=crop_padding,
        crop_seed=derive_seed(state.seed, "evaluation", epoch),
    )
    for done, (images, labels) in enumerate(ordered, start=1):
        with torch.no_grad(), autocast(state.device, state.precision):
            logits = state.model(images).float()
            loss = functional.cross_entropy(logits, labels, reduction="sum")
            correct = (logits.argmax(1) == labels).sum()
            sums += torch.stack([loss, correct, torch.full_like(correct, len(labels))])
        if time.perf_counter() - noted >= _YIELD_SECONDS or done == steps:
            total, right, count = sums.tolist()
            yield Progress("step", "validation", epoch, done, steps, total / count, right / count)
            noted = time.perf_counter()
            state.model.eval()
    total, right, count = sums.tolist()
    return total / count, right / count


def _close_epoch(state: TrainState, row: EpochMetrics, settings: TrainingConfig) -> bool:
    """Book an epoch: history, best, scheduler, patience. Return whether the epoch is the best."""
    state.history.append(row)
    state.epoch, state.step = row.epoch, 0
    improved = row.val_accuracy is not None and (
        state.best is None or row.val_accuracy > (state.best.val_accuracy or 0.0)
    )
    if improved:
        state.best = row
    state.schedule.after_epoch(row)
    if settings.patience is not None:
        value = getattr(row, settings.monitor)
        gain = value if settings.monitor == "val_accuracy" else -value
        if state.best_monitored is None or gain > state.best_monitored + settings.min_delta:
            state.best_monitored, state.stale_epochs = gain, 0
        else:
            state.stale_epochs += 1
        state.stopped_early = state.stale_epochs >= settings.patience
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


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _global_generators(device: str) -> dict[str, Tensor]:
    """Return torch's own generators: a foreign model may draw from them (functional.dropout)."""
    states = {"cpu": torch.get_rng_state()}
    if device.startswith("cuda"):
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def _set_global_generators(device: str, states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if device.startswith("cuda") and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
