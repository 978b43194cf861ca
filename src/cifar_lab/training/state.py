"""The state of training, which is what a checkpoint holds."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cifar_lab.errors import UsageError, first_line
from cifar_lab.optimizers import classifier_of
from cifar_lab.runs.metrics import BY_CLASS, EpochMetrics, columns, epoch_columns
from cifar_lab.training.device import derive_seed
from cifar_lab.training.group import Group, key_dropout

if TYPE_CHECKING:
    from cifar_lab.optimizers.averages import Lookahead, WeightAverage

_PLAIN = (
    *("epoch", "step", "used_rate", "seconds"),
    *("stale_epochs", "best_monitored", "stopped_early"),
)


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


@dataclass
class TrainState:
    """The complete state of training: what a checkpoint holds, and nothing else.

    `compiled`: `fit` compiles the network. Dropout then draws from torch's global generator, which
    is seeded at the start of each epoch, because torch.compile supports no other one.
    `epoch` counts finished epochs and `step` the batches done in the current one; `sums` holds
    [loss * images, correct, images] of the current epoch, on the device; `used_rate` is the
    learning rate of the last step; `dataset` is the record of the data that are trained on;
    `best_checksum` is that of the weights in best.pt; with an `average`, these are the averaged
    ones. `group` are the processes that train together, most often this one alone.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    seed: int
    device: str
    precision: str
    compiled: bool = False
    lookahead: "Lookahead | None" = None
    average: "WeightAverage | None" = None
    group: Group = field(default_factory=Group)
    generator: torch.Generator = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    sums: Tensor = field(init=False)
    dataset: dict[str, str] = field(default_factory=dict)
    epoch: int = 0
    step: int = 0
    used_rate: float = 0.0
    seconds: float = 0.0
    history: list[EpochMetrics] = field(default_factory=list)
    best: EpochMetrics | None = None
    best_checksum: str | None = None
    stale_epochs: int = 0
    best_monitored: float | None = None
    stopped_early: bool = False

    def __post_init__(self) -> None:
        kind = self.device.split(":")[0]
        self.generator = torch.Generator(self.device)
        self.generator.manual_seed(derive_seed(self.seed, "dropout", 1))
        self.scaler = torch.amp.GradScaler(kind, enabled=self.precision == "fp16")
        # float32 counts to 2**24 only, and rounds a sum of a million losses; MPS has nothing wider.
        self.sums = torch.zeros(3, dtype=torch.float64 if kind != "mps" else torch.float32)
        self.sums = self.sums.to(self.device)
        if not self.compiled:
            key_dropout(self.model, self.generator, self.group)
            # Batch norm counts its batches, and each count would be a launch of its own in a step.
            for module in self.model.modules():
                if isinstance(getattr(module, "num_batches_tracked", None), Tensor):
                    module.num_batches_tracked = module.num_batches_tracked.cpu()
        # What the model itself has frozen, such as a whitening layer, is never unfrozen here.
        self._trained = [p for p in self.model.parameters() if p.requires_grad]

    def train_mode(self, *, head_only: bool) -> None:
        """Set the model to training; with `head_only`, no other part of it changes.

        What is frozen stays as in evaluation, so that batch norm keeps its statistics too. A model
        that has a method `begin_epoch(epoch)` is told the epoch, from 1, and may freeze more.
        """
        self.model.train(not head_only)
        head = classifier_of(self.model, "training.frozen_epochs") if head_only else self.model
        head.train()
        learning = {id(parameter) for parameter in head.parameters()}
        for parameter in self._trained:
            parameter.requires_grad_(id(parameter) in learning)
        begin_epoch = getattr(self.model, "begin_epoch", None)
        if begin_epoch is not None:
            begin_epoch(self.epoch + 1)

    def scored_weights(self) -> dict[str, Any]:
        """Return the weights that validation scores and best.pt keeps: the averaged ones, if any.

        A state dict of the model.
        """
        return self.model.state_dict() if self.average is None else self.average.weights(self.model)

    def scored_logits(self, images: Tensor) -> Tensor:
        """Return the logits of these weights, (B, C)."""
        logits: Tensor = (
            self.model(images) if self.average is None else self.average(self.model, images)
        )
        return logits

    @property
    def followers(self) -> "list[Schedule | Lookahead | WeightAverage]":
        """What has something to do after each step of the optimizer, in this order."""
        candidates = (self.schedule, self.lookahead, self.average)
        return [follower for follower in candidates if follower is not None]

    @property
    def learning_rate(self) -> float:
        """The rate of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values only: what `load_state_dict` needs to resume exactly."""
        scheduler = self.schedule.scheduler
        averaged = {"averaged": self.scored_weights()} if self.average is not None else {}
        slow = {"lookahead": self.lookahead.state_dict()} if self.lookahead is not None else {}
        processes = {"processes": self.group.world} if self.group.world > 1 else {}
        return {
            **processes,
            **slow,
            **averaged,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": scheduler.state_dict() if scheduler is not None else None,
            "scaler": self.scaler.state_dict(),
            "generator": self.generator.get_state(),
            "global_generators": global_generators(self.device),
            "sums": self.sums.cpu(),
            **{name: getattr(self, name) for name in _PLAIN},
            "history": history_tensor(self.history),
            "best": history_tensor([self.best] if self.best else []),
            "dataset": self.dataset,
            "best_checksum": self.best_checksum,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved state; UsageError if it belongs to another model or optimizer."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.lookahead is not None:
                self.lookahead.load_state_dict(state.get("lookahead"))
            if self.average is not None:
                self.average.load_state_dict(state.get("averaged"))
            if self.schedule.scheduler is not None and state["scheduler"] is not None:
                self.schedule.scheduler.load_state_dict(state["scheduler"])
            self.scaler.load_state_dict(state["scaler"])
            saved = state["generator"]
            if saved.shape == self.generator.get_state().shape:
                self.generator.set_state(saved)
            else:  # a CPU's and a GPU's are of other sizes: the draws of dropout begin anew
                self.generator.manual_seed(derive_seed(self.seed, "dropout", "moved"))
            self.sums.copy_(state["sums"])
            set_global_generators(self.device, state["global_generators"])
            self.history = history_rows(state["history"])
            self.best = next(iter(history_rows(state["best"])), None)
            self.best_checksum = state.get("best_checksum")  # older versions wrote none
            for name in _PLAIN:
                setattr(self, name, state[name])
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise UsageError(
                f"the checkpoint belongs to another model or optimizer: {first_line(error)}; "
                "rerun=true starts again"
            ) from None


def history_tensor(rows: list[EpochMetrics]) -> Tensor:
    """Return rows as float64 (rows, columns); a missing value is NaN.

    The last columns, those of scores by class, are left out where no row has them.
    """
    names = columns(EpochMetrics)
    if BY_CLASS[0] not in epoch_columns(rows):
        names = names[: -len(BY_CLASS)]
    cells = [[math.nan if (v := getattr(r, n)) is None else v for n in names] for r in rows]
    return torch.tensor(cells, dtype=torch.float64).reshape(len(rows), len(names))


def history_rows(table: Tensor) -> list[EpochMetrics]:
    """Return the rows that `history_tensor` was made of."""
    names = columns(EpochMetrics)[: table.shape[1]]
    rows = []
    for cells in table.tolist():
        values: dict[str, Any] = {
            n: None if math.isnan(v) else v for n, v in zip(names, cells, strict=True)
        }
        rows.append(EpochMetrics(**{**values, "epoch": int(cells[0])}))
    return rows


def global_generators(device: str) -> dict[str, Tensor]:
    """Return the states of torch's own generators, from which a model of one's own may draw."""
    states = {"cpu": torch.get_rng_state()}
    if device.startswith("cuda"):
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_global_generators(device: str, states: dict[str, Tensor]) -> None:
    """Set the states that `global_generators` returned."""
    torch.set_rng_state(states["cpu"])
    if device.startswith("cuda") and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
