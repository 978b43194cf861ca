"""The layers of a model, as they run on an image: shapes, parameters and multiply-adds.

torch's FlopCounterMode counts these: matrix products and convolutions, half of their operations.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def trace_layers(model: nn.Module, image_shape: Sequence[int]) -> list[tuple[Any, ...]]:
    """Run a model on one image; return a row for each module without children, as they ran.

    A row: name, kind, shape of the output without the batch, parameters, multiply-adds, and the
    size formula of a convolution.
    """
    layers: list[tuple[Any, ...]] = []
    names = {module: name for name, module in model.named_modules()}
    counter = FlopCounterMode(display=False)
    started: list[int] = []

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        started.append(counter.get_total_flops())

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        shape = tuple(output.shape[1:]) if isinstance(output, torch.Tensor) else ()
        parameters = sum(p.numel() for p in module.parameters())
        cost = (counter.get_total_flops() - started.pop()) // 2
        note = size_formula(module, inputs[0].shape) if isinstance(module, nn.Conv2d) else ""
        name, kind = names[module] or "model", type(module).__name__
        layers.append((name, kind, shape, parameters, cost, note))

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
    model.eval()
    with torch.no_grad(), counter:
        model(torch.zeros(1, *image_shape))
    return layers


def size_formula(conv: nn.Conv2d, shape: Sequence[int]) -> str:
    """Return how a convolution's output height comes about, as ((32-5+2*0)/1)+1 = 28 (S3-06)."""
    size, kernel, stride = int(shape[-2]), conv.kernel_size[0], conv.stride[0]
    reach = conv.dilation[0] * (kernel - 1) + 1
    by_name = reach - 1 if conv.padding == "same" else 0
    total = by_name if isinstance(conv.padding, str) else 2 * int(conv.padding[0])
    padding = f"2*{total // 2}" if total % 2 == 0 else str(total)
    result = (size - reach + total) // stride + 1
    return f"(({size}-{reach}+{padding})/{stride})+1 = {result}"


def step_multiply_adds(model: nn.Module, image_shape: Sequence[int]) -> int:
    """Return the multiply-adds of a training step per image: both passes."""
    batch = 2  # batch norm cannot train on one image
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(batch, *image_shape)).sum().backward()
    return int(counter.get_total_flops()) // 2 // batch
