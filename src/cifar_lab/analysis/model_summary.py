"""What a model consists of and what it costs: layers, shapes, parameters, multiply-adds.

Multiply-adds are counted by torch's FlopCounterMode: matrix products and convolutions, one for two
floating-point operations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from cifar_lab.config.run_config import RunConfig
from cifar_lab.runs.text import align, class_name
from cifar_lab.training.build import build_model
from cifar_lab.training.device import seeded


@dataclass(frozen=True)
class Layer:
    """A module without children, as one image passes through it.

    `shape` is that of its output without the batch; `note` is the size formula of a convolution.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    multiply_adds: int
    note: str = ""


def trace_layers(model: nn.Module, image_shape: Sequence[int]) -> list[Layer]:
    """Run a model on one image and return its layers in the order in which they ran."""
    layers: list[Layer] = []
    names = {module: name for name, module in model.named_modules()}
    counter = FlopCounterMode(display=False)
    started: list[int] = []

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        started.append(counter.get_total_flops())

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        source = inputs[0] if inputs else output
        layers.append(
            Layer(
                name=names[module] or "model",
                kind=type(module).__name__,
                shape=tuple(output.shape[1:]) if isinstance(output, torch.Tensor) else (),
                parameters=sum(p.numel() for p in module.parameters()),
                multiply_adds=(counter.get_total_flops() - started.pop()) // 2,
                note=size_formula(module, source.shape) if isinstance(module, nn.Conv2d) else "",
            )
        )

    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [module.register_forward_pre_hook(before) for module in leaves]
    hooks += [module.register_forward_hook(after) for module in leaves]
    try:
        model.eval()
        with torch.no_grad(), counter:
            model(torch.zeros(1, *image_shape))
    finally:
        for hook in hooks:
            hook.remove()
    return layers


def multiply_adds(config: RunConfig, num_classes: int, *, backward: bool = False) -> int:
    """Return a run's multiply-adds per image: of the forward pass, or of a training step."""
    model = _build(config, num_classes)
    batch = 2  # batch norm cannot train on one image
    images = torch.zeros(batch, *config.dataset.image_shape)
    labels = torch.zeros(batch, dtype=torch.int64)
    model.train(backward)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        loss = functional.cross_entropy(model(images), labels)
        if backward:
            loss.backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops()) // 2 // batch


def model_text(config: RunConfig, num_classes: int) -> str:
    """Return a model's layers with output shapes, parameters and multiply-adds, and the totals."""
    model = _build(config, num_classes)
    layers = trace_layers(model, config.dataset.image_shape)
    rows = [("layer", "kind", "output", "parameters", "multiply-adds", "")]
    for layer in layers:
        costs = f"{layer.parameters:,}", f"{layer.multiply_adds:,}"
        rows.append((layer.name, layer.kind, "x".join(map(str, layer.shape)), *costs, layer.note))
    parameters = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    buffers = sum(b.numel() for b in model.buffers())
    of_them = f", {frozen:,} of them frozen" if frozen else ""
    sizes = "x".join(map(str, config.dataset.image_shape))
    return "\n".join(
        [
            f"model {class_name(config.model)} on images of {sizes}, {num_classes} classes",
            "",
            *align(rows, right={3, 4}),
            "",
            f"parameters: {parameters:,}{of_them} (and {buffers:,} elements of buffers)",
            "multiply-adds of convolutions and matrix products, per image: "
            f"{sum(layer.multiply_adds for layer in layers):,}",
        ]
    )


def size_formula(conv: nn.Conv2d, shape: Sequence[int]) -> str:
    """Return how a convolution's output height comes about, as ((32-5+2*0)/1)+1 = 28 (S3-06)."""
    size, kernel, stride = int(shape[-2]), conv.kernel_size[0], conv.stride[0]
    reach = conv.dilation[0] * (kernel - 1) + 1
    if isinstance(conv.padding, str):
        total = reach - 1 if conv.padding == "same" else 0
    else:
        total = 2 * int(conv.padding[0])
    padding = f"2*{total // 2}" if total % 2 == 0 else str(total)
    result = (size - reach + total) // stride + 1
    return f"(({size}-{reach}+{padding})/{stride})+1 = {result}"


def _build(config: RunConfig, num_classes: int) -> nn.Module:
    with seeded(config.seed):
        model: nn.Module = build_model(config, num_classes)
    return model
