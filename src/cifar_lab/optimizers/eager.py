"""Optimizers that leave torch's compiler alone.

torch's optimizers import torch._dynamo only to tell it not to trace them: 900 modules, a second and
150 MB. We compile no optimizer. There is no public way around it, so the names of torch that this
needs stand here; where a version of torch renames them, a test fails, and a run starts later.
"""

import types
from typing import Any

import torch
from torch.optim import Optimizer

_UNTRACED = ("add_param_group", "state_dict", "load_state_dict", "zero_grad")


def prepare_torch() -> None:
    """Let the methods that torch hides from its compiler be called as they are.

    torch keeps their hidden form as an attribute, and asks its compiler only where there is none.
    """
    for name in _UNTRACED:
        method = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if method is not None:
            vars(method).setdefault("__dynamo_disable", method)


def step_eagerly(optimizer: Any) -> None:
    """Let an optimizer step without the breaks that torch puts around it for its compiler."""
    step: Any = type(optimizer).step
    while (inner := getattr(step, "__wrapped__", None)) is not None:
        if step.__code__.co_name == "_use_grad" and not optimizer.defaults["differentiable"]:
            eager = Optimizer.profile_hook_step(torch.no_grad()(inner))
            optimizer.step = types.MethodType(eager, optimizer)
            return
        step = inner
