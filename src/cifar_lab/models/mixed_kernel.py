"""Blocks of convolutions with several kernel sizes, weighted by a gate and added (S4)."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from cifar_lab.models.gates import GATES


class MixedKernelBlock(nn.Module):
    """Activation of a_1 * conv_1(x) + ... + a_K * conv_K(x), with a = gate(x) of shape (B, K)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernels: list[int],
        activation: Callable[[], nn.Module],
        gate: str,
        gate_reduction: int | None,
        batch_norm_per_conv: bool,
    ) -> None:
        super().__init__()
        self.gate = nn.Sequential()
        self.gate.add_module("pool", nn.AdaptiveAvgPool2d(1))
        self.gate.add_module("flatten", nn.Flatten())
        gate_inputs = in_channels
        if gate_reduction is not None:
            gate_inputs = max(1, in_channels // gate_reduction)
            self.gate.add_module("hidden", nn.Linear(in_channels, gate_inputs))
            self.gate.add_module("activation", activation())
        self.gate.add_module("fc", nn.Linear(gate_inputs, len(kernels)))
        self.gate.add_module(gate, GATES[gate]())

        self.convs = nn.ModuleList(
            nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2) for kernel in kernels
        )
        self.bn_per_conv = nn.ModuleList(
            nn.BatchNorm2d(out_channels) if batch_norm_per_conv else nn.Identity() for _ in kernels
        )
        self.bn = nn.Identity() if batch_norm_per_conv else nn.BatchNorm2d(out_channels)
        self.activation = activation()

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, out_channels, H, W) of (B, in_channels, H, W)."""
        branches = (bn(conv(images)) for conv, bn in zip(self.convs, self.bn_per_conv, strict=True))
        branch = next(branches)
        # In the convolutions' dtype: under autocast a softmax is float32 and would promote all.
        # unbind, since the backward pass of weights[:, k] writes a tensor of zeros for each k.
        weights = self.gate(images).to(branch.dtype)[:, :, None, None, None].unbind(1)
        total = weights[0] * branch
        for weight, branch in zip(weights[1:], branches, strict=True):
            total = torch.addcmul(total, weight, branch)
        output: Tensor = self.activation(self.bn(total))
        return output


class MixedKernel(nn.Module):
    """Blocks of gated convolutions of several kernel sizes, then two dense layers (report S4).

    A 2x2 max pooling and dropout follow the blocks that ``pool_after`` counts (from 1); the
    hidden dense layer is followed by the activation, batch norm and dropout. What the report
    leaves open is an option. ``images`` are (B, *image_shape), ``features`` (B, last width), or
    (B, last width * height * width) without ``global_pool``, the result (B, num_classes) logits,
    or probabilities with ``softmax_output``. Raises ValueError for an unknown gate, an even
    kernel, sizes below 1, a block to pool after that is not there, and a kernel or a pooling
    larger than the image.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        activation: Callable[[], nn.Module],
        conv_dropout: float,
        dense_dropout: float,
        *,
        widths: list[int],
        kernels: list[int],
        pool_after: list[int],
        gate: Literal["identity", "relu", "sigmoid", "softmax"],
        gate_reduction: int | None,
        batch_norm_per_conv: bool,
        global_pool: bool,
        hidden: int,
        softmax_output: bool,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        if gate not in GATES:
            raise ValueError(f"gate={gate} is unknown: one of {', '.join(GATES)}")
        _check_sizes(image_shape, widths, kernels, pool_after, hidden, gate_reduction)
        self.blocks = nn.Sequential()
        for number, out_channels in enumerate(widths, start=1):
            block = MixedKernelBlock(
                channels,
                out_channels,
                kernels,
                activation,
                gate,
                gate_reduction,
                batch_norm_per_conv,
            )
            self.blocks.add_module(f"block{number}", block)
            channels = out_channels
            if number in pool_after:
                if min(height, width) < 2:
                    raise ValueError(
                        f"a 2x2 pooling kernel does not fit the {height}x{width} image "
                        f"after block {number}"
                    )
                height, width = height // 2, width // 2
                self.blocks.add_module(f"pool{number}", nn.MaxPool2d(2))
                self.blocks.add_module(f"dropout{number}", nn.Dropout(conv_dropout))
        self.pool = nn.AdaptiveAvgPool2d(1) if global_pool else nn.Identity()

        self.classifier = nn.Sequential()
        inputs = channels if global_pool else channels * height * width
        self.classifier.add_module("fc1", nn.Linear(inputs, hidden))
        self.classifier.add_module("activation", activation())
        self.classifier.add_module("bn", nn.BatchNorm1d(hidden))
        self.classifier.add_module("dropout", nn.Dropout(dense_dropout))
        self.classifier.add_module("fc2", nn.Linear(hidden, num_classes))
        if softmax_output:
            self.classifier.add_module("softmax", nn.Softmax(dim=1))

    def gates(self, images: Tensor) -> list[Tensor]:
        """Return each block's weights, (B, K), of the kernels in their order.

        Costs about a forward pass. Call it in evaluation mode, without gradients and after some
        training: before, batch norm's running statistics are not yet those of its inputs.
        """
        weights = []
        for module in self.blocks:
            if isinstance(module, MixedKernelBlock):
                weights.append(module.gate(images))
            images = module(images)
        return weights

    def features(self, images: Tensor) -> Tensor:
        """Return the flattened output of the blocks, what the classifier sees."""
        return torch.flatten(self.pool(self.blocks(images)), 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, num_classes), or probabilities with ``softmax_output``."""
        outputs: Tensor = self.classifier(self.features(images))
        return outputs


def _check_sizes(
    image_shape: Sequence[int],
    widths: list[int],
    kernels: list[int],
    pool_after: list[int],
    hidden: int,
    gate_reduction: int | None,
) -> None:
    _, height, width = image_shape
    reduction = 1 if gate_reduction is None else gate_reduction
    if not kernels or min(*widths, *kernels, hidden, reduction) < 1:
        raise ValueError(
            "kernels needs an entry; widths, kernels and hidden must be at least 1, "
            "gate_reduction null or at least 1"
        )
    for kernel in kernels:
        if kernel % 2 == 0:
            raise ValueError(f"a {kernel}x{kernel} kernel does not keep the size: odd ones do")
        if kernel > min(height, width):
            raise ValueError(f"a {kernel}x{kernel} kernel does not fit the {height}x{width} image")
    for number in pool_after:
        if not 1 <= number <= len(widths):
            raise ValueError(
                f"pool_after={number} is no block: the {len(widths)} widths make blocks "
                f"1 to {len(widths)}"
            )
