"""From a config to its optimizer; and what torch does not have, one file each."""

from typing import Any

from torch import nn

from cifar_lab.config.schema import OptimizerConfig
from cifar_lab.config.targets import build, resolve
from cifar_lab.errors import UsageError
from cifar_lab.optimizers.eager import prepare_torch, step_eagerly

_FUSED = ("torch.optim.Adam", "torch.optim.AdamW", "torch.optim.SGD")  # on CUDA and on MPS


def classifier_of(model: Any, setting: str) -> nn.Module:
    """Return the part of a model that classifies its features; `setting` is what needs it."""
    classifier = getattr(model, "classifier", None)
    if not isinstance(classifier, nn.Module) or not list(classifier.parameters()):
        raise UsageError(
            f"{setting} was asked for, but {type(model).__name__} has no module `classifier` with "
            "parameters, which it divides from the rest"
        )
    return classifier


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> Any:
    """Build a model's optimizer; with `backbone_lr`, the classifier's group stands first.

    An optimizer with a function `parameter_groups(model)` divides the parameters itself.
    """
    prepare_torch()
    optimizer = build(config.target, "optimizer", params=_parameters(config, model))
    step_eagerly(optimizer)
    return optimizer


def _parameters(config: OptimizerConfig, model: nn.Module) -> Any:
    """Return a model's parameters, or its groups of them."""
    target, rate = config.target, config.backbone_lr
    divide = getattr(resolve(target.get("_target_"), "optimizer"), "parameter_groups", None)
    if divide is not None:
        if rate is not None:
            raise UsageError(
                f"optimizer.backbone_lr={rate} is wrong: {target['_target_']} divides the "
                "parameters itself"
            )
        return divide(model)
    if rate is None:
        return model.parameters()
    head = list(classifier_of(model, "optimizer.backbone_lr").parameters())
    of_head = {id(parameter) for parameter in head}
    backbone = [parameter for parameter in model.parameters() if id(parameter) not in of_head]
    return [{"params": head}, {"params": backbone, "lr": rate}]


def optimizer_settings(config: OptimizerConfig, device: str, precision: str) -> OptimizerConfig:
    """Return the optimizer's settings, with `foreach` or `fused` chosen where both are null.

    Left null, torch uses foreach on GPUs only. On a CPU it halves the time of Adam's update and
    gives the same bits. A fused update is one kernel on a GPU, and with fp16 the one that does not
    wait for the device in each step to see whether a gradient is infinite.
    """
    undecided = all(config.get(name, ...) is None for name in ("foreach", "fused"))
    if not undecided or config.get("differentiable"):
        return config
    if device == "cpu":
        return OptimizerConfig({**config, "foreach": True})
    scaled_on_mps = device.startswith("mps") and precision == "fp16"
    if config.get("_target_") in _FUSED and not scaled_on_mps:
        return OptimizerConfig({**config, "fused": True})
    return config
