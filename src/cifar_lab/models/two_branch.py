"""Two 5x5 convolutions of the image, weighted by a gate computed from it and added (S3)."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from cifar_lab.models.gates import GATES


class TwoBranch(nn.Module):
    """One block of two gated convolutions and a linear head (report S3).

    The report's text fits five networks, which ``reading`` names:

    - R1: average of each channel -> gate; the weighted sum -> activation -> one head.
    - R2: as R1, but the activation on each weighted convolution, before the sum.
    - R3: as R2, but a head for each branch; the two results are added.
    - R4: as R1, but the gate sees every pixel of the image instead of the averages.
    - R5: the gate of R4 and the heads of R3.

    ``images`` are (B, *image_shape), ``features`` (B, D) or, with two heads, (B, 2 * D), the
    result (B, num_classes) logits. There is no place for dropout. Raises ValueError for an
    unknown reading or gate, for sizes below 1, and for a kernel larger than the image.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        activation: Callable[[], nn.Module],
        *,
        width: int,
        kernel_size: int,
        reading: Literal["R1", "R2", "R3", "R4", "R5"],
        gate: Literal["identity", "relu", "sigmoid", "softmax"],
    ) -> None:
        super().__init__()
        if reading not in ("R1", "R2", "R3", "R4", "R5"):
            raise ValueError(f"reading={reading} is unknown: one of R1, R2, R3, R4, R5")
        if gate not in GATES:
            raise ValueError(f"gate={gate} is unknown: one of {', '.join(GATES)}")
        if min(width, kernel_size) < 1:
            raise ValueError("width and kernel_size must be at least 1")
        channels, image_height, image_width = image_shape
        if kernel_size > min(image_height, image_width):
            raise ValueError(
                f"a {kernel_size}x{kernel_size} kernel does not fit "
                f"the {image_height}x{image_width} image"
            )
        self.reading = reading
        pooled = reading in ("R1", "R2", "R3")
        gate_inputs = channels if pooled else channels * image_height * image_width
        self.gate = nn.Sequential()
        if pooled:
            self.gate.add_module("pool", nn.AdaptiveAvgPool2d(1))
        self.gate.add_module("flatten", nn.Flatten())
        self.gate.add_module("mlp", nn.Linear(gate_inputs, 2))
        self.gate.add_module(gate, GATES[gate]())

        self.conv1 = nn.Conv2d(channels, width, kernel_size)
        self.conv2 = nn.Conv2d(channels, width, kernel_size)
        one_each = reading in ("R2", "R3", "R5")
        self.activations = nn.ModuleList(activation() for _ in range(2 if one_each else 1))
        outputs = width * (image_height - kernel_size + 1) * (image_width - kernel_size + 1)
        self.heads = nn.ModuleList(
            nn.Linear(outputs, num_classes) for _ in range(2 if reading in ("R3", "R5") else 1)
        )

    def gates(self, images: Tensor) -> list[Tensor]:
        """Return the weights of the two convolutions, (B, 2), as the list of the only block."""
        return [self.gate(images)]

    def features(self, images: Tensor) -> Tensor:
        """Return the flattened output of the convolutions, what the heads see."""
        first, second = self.conv1(images), self.conv2(images)
        # In the convolutions' dtype: under autocast a softmax is float32 and would promote both.
        weights = self.gate(images).to(first.dtype)[:, :, None, None, None].unbind(1)
        first, second = weights[0] * first, weights[1] * second
        if len(self.activations) == 1:
            return torch.flatten(self.activations[0](first + second), 1)
        first, second = self.activations[0](first), self.activations[1](second)
        if self.reading == "R2":
            return torch.flatten(first + second, 1)
        return torch.cat((torch.flatten(first, 1), torch.flatten(second, 1)), 1)

    def classifier(self, features: Tensor) -> Tensor:
        """Return the logits of the features, added over the heads."""
        parts = features.chunk(len(self.heads), dim=1)
        logits: Tensor = self.heads[0](parts[0])
        for head, part in zip(self.heads[1:], parts[1:], strict=True):
            logits = logits + head(part)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, num_classes)."""
        return self.classifier(self.features(images))
