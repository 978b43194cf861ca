"""The loss that is trained on: cross-entropy, with label smoothing and a weight for each class."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from cifar_lab.config.run_config import TrainingConfig
from cifar_lab.config.schema import wrong
from cifar_lab.training.splits import Split

Weights = list[float] | Literal["balanced"] | None
"""The setting `training.class_weights`."""


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


def class_weights(setting: Weights, train: Split, num_classes: int) -> Tensor | None:
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


def check_class_weights(setting: Weights, num_classes: int) -> None:
    """Raise UsageError unless a list of weights has one for each class."""
    if isinstance(setting, list) and len(setting) != num_classes:
        raise wrong(
            "training.class_weights",
            setting,
            f"balanced or {num_classes} numbers above 0, one per class",
        )
