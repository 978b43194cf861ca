"""One step of training: forward pass, loss, backward pass, update of the weights.

With `training.cuda_graph=true` the two passes are captured once on CUDA and replayed, so that the
host launches one graph and not some hundred kernels; elsewhere they run as always. The update is
not part of the graph: its learning rate changes, and not every optimizer can be captured.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cifar_lab.config.run_config import TrainingConfig
from cifar_lab.config.schema import wrong
from cifar_lab.training.device import autocast
from cifar_lab.training.splits import Split
from cifar_lab.training.state import TrainState, global_generators, set_global_generators

OnBatch = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From images and labels to the loss and the sums of a batch."""

_WARM_UP = 3  # passes before a capture, as torch's documentation of CUDA graphs asks for


@dataclass(frozen=True)
class Criterion:
    """The mean cross-entropy of a batch; with `weights`, (C,), one per class, a weighted mean."""

    label_smoothing: float = 0.0
    weights: Tensor | None = None

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, a scalar, of logits (B, C); labels are classes (B,) or shares (B, C).

        Shares say how much of each class an image is (mixup). An image counts as much as the
        weights of its classes, in these shares: one of a single class counts as with its label.
        """
        loss = functional.cross_entropy(
            logits, labels, weight=self.weights, label_smoothing=self.label_smoothing
        )
        if self.weights is None or labels.dim() == 1:
            return loss
        # For shares, torch divides the weighted sum by the number of images.
        return loss * len(labels) / (labels @ self.weights).sum()

    def weight_of(self, labels: Tensor) -> Tensor | None:
        """Return the sum of the weights of some images, a scalar; None without class weights."""
        if self.weights is None:
            return None
        return (self.weights[labels] if labels.dim() == 1 else labels @ self.weights).sum()


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many of B images are recognised, a scalar, for logits (B, C).

    With labels (B,) these are the images whose most probable class is their label; with shares
    (B, C), such an image counts as much as its share of that class.
    """
    predicted = logits.argmax(1)
    if labels.dim() == 1:
        return (predicted == labels).sum()
    return labels.gather(1, predicted[:, None]).sum()


def make_criterion(config: TrainingConfig, train: Split, num_classes: int) -> Criterion:
    """Return the loss that the settings ask for, on the device of the training split."""
    weights = class_weights(config.class_weights, train, num_classes)
    return Criterion(config.label_smoothing, weights)


def class_weights(
    setting: list[float] | str | None, train: Split, num_classes: int
) -> Tensor | None:
    """Return the weight of each class, (C,) float32, on the device of the training split.

    `balanced`: images / (classes with images * images of the class), as scikit-learn's
    `compute_class_weight`; a class without training images has weight 0.
    """
    if setting is None:
        return None
    device = train.labels.device
    if setting != "balanced":
        return torch.tensor(setting, dtype=torch.float32, device=device)
    labels = train.labels.cpu()[train.indices]
    counts = torch.bincount(labels, minlength=num_classes).double()
    weights = len(labels) / ((counts > 0).sum() * counts)
    return torch.where(counts > 0, weights, 0.0).to(device, torch.float32)


def check_class_weights(setting: list[float] | str | None, num_classes: int) -> None:
    """Raise UsageError unless a list of weights has one for each class."""
    if isinstance(setting, list) and len(setting) != num_classes:
        right = f"balanced or {num_classes} numbers above 0, one per class"
        raise wrong("training.class_weights", setting, right)


class Step:
    """Trains on a batch: `passes` leaves its gradients, `update` moves the weights by them."""

    def __init__(self, state: TrainState, criterion: Criterion, config: TrainingConfig) -> None:
        self._state, self._clip = state, config.clip_grad_norm
        self.passes: Passes = Passes(state, criterion)
        self._graphed = config.cuda_graph is True and state.device.startswith("cuda")
        if self._graphed:
            self.passes = GraphedPasses(state, criterion)

    def update(self) -> None:
        """Take the optimizer's step with the gradients of all processes."""
        state = self._state
        state.group.sum_gradients(state.model.parameters())
        if self._clip is not None:  # a norm of scaled gradients would mean nothing
            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(state.model.parameters(), self._clip)
        state.scaler.step(state.optimizer)  # does nothing but the step unless precision=fp16
        state.scaler.update()
        if not self._graphed:  # a graph writes its gradients to where they are
            state.optimizer.zero_grad(set_to_none=True)


class Passes:
    """The forward and the backward pass of a batch.

    In a group of processes the gradients are those of this process's part of the batch, and what is
    measured is the whole batch's.
    """

    def __init__(self, state: TrainState, criterion: Criterion) -> None:
        self._state, self._criterion = state, criterion

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Add the gradients of a batch to the parameters; return its loss and its sums.

        The loss is a scalar, the sums are [loss * images, correct, images].
        """
        state, criterion = self._state, self._criterion
        with autocast(state.device, state.precision):
            logits = state.model(images)
            # In float32: in half precision the exponentials of the loss would lose their digits.
            loss = criterion(logits.float(), labels)
        loss = state.group.part_of_loss(loss, lambda: criterion.weight_of(labels))
        state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            correct = hits(logits, labels)
            loss, correct, count = state.group.of_batch(loss.detach(), correct, len(labels))
            return loss, torch.stack([loss * count, correct, torch.full_like(correct, count)])


class GraphedPasses(Passes):
    """The passes as CUDA graphs, on buffers that stay where they are.

    A graph is for batches of one shape and one set of parameters that train, and a run has a few of
    each: a last batch that is smaller, a head that trains alone at first. The gradients belong to
    the graph, so nobody may set them to None. What is returned is overwritten by the next batch of
    this shape.
    """

    def __init__(self, state: TrainState, criterion: Criterion) -> None:
        super().__init__(state, criterion)
        self._captured: dict[object, OnBatch] = {}

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and the sums; the gradients are those of this batch alone."""
        model = self._state.model
        trained = tuple(parameter.requires_grad for parameter in model.parameters())
        modes = tuple(module.training for module in model.modules())
        key = (images.shape, labels.shape, labels.dtype, trained, modes)
        if key not in self._captured:
            self._captured[key] = _capture(super().__call__, self._state, images, labels)
        return self._captured[key](images, labels)


def _capture(passes: OnBatch, state: TrainState, images: Tensor, labels: Tensor) -> OnBatch:
    """Capture the passes on CUDA, on buffers of one shape; return what replays them on a batch."""
    shown, known = images.clone(), labels.clone()
    parameters = list(state.model.parameters())
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    # What passes change besides gradients is undone: buffers (batch norm) and generators.
    buffers = [(buffer, buffer.clone()) for buffer in state.model.buffers()]
    generator, others = state.generator.get_state(), global_generators(state.device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            state.optimizer.zero_grad(set_to_none=True)
            passes(shown, known)
    torch.cuda.current_stream().wait_stream(stream)
    for buffer, former in buffers:
        buffer.copy_(former)
    state.generator.set_state(generator)
    set_global_generators(state.device, others)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(state.generator)  # of dropout masks
    state.optimizer.zero_grad(set_to_none=True)
    on_host = [buffer for buffer in state.model.buffers() if buffer.device.type == "cpu"]
    before = [int(counter) for counter in on_host]
    # Of this thread alone: another one may pin the images of the next steps.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        measured = passes(shown, known)
    gradients = [parameter.grad for parameter in parameters]
    # Of the layers that were in training mode; a replay does nothing on the host.
    counters = [c for c, n in zip(on_host, before, strict=True) if int(c) != n]
    for counter in counters:
        counter -= 1

    def replay(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        shown.copy_(images)
        known.copy_(labels)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        graph.replay()
        for counter in counters:
            counter += 1
        return measured

    return replay
