"""Muon: momentum whose steps are orthogonalized, for the hidden matrices of a network."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cifar_lab.optimizers.eager import step_eagerly

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic: steep at zero, as Jordan chose them
_EPSILON = 1e-7


def orthogonalize(matrices: Tensor, steps: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return matrices (N, rows, columns) with singular values near 1, their directions kept.

    Newton-Schulz iterations with a quintic polynomial (Jordan 2024,
    https://kellerjordan.github.io/posts/muon/): after five, singular values lie between about 0.7
    and 1.2, unless they were tiny. All N are iterated at once, in `dtype`.
    """
    first, third, fifth = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if tall else matrices
    norms = torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=_EPSILON)
    result: Tensor = (wide / norms).to(dtype)
    for _ in range(steps):
        gram = result @ result.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth)
        result = torch.baddbmm(result, polynomial, result, beta=first)
    result = result.to(matrices.dtype)
    return result.mT if tall else result


class Muon(torch.optim.Optimizer):
    """Muon for hidden matrices, AdamW or SGD for all other parameters (Jordan 2024).

    Source: https://kellerjordan.github.io/posts/muon/. A step of a matrix (rows, columns) is lr *
    sqrt(max(1, rows / columns)) times its orthogonalized momentum; a convolution's weight counts as
    a matrix of a row per output channel. Weight decay is decoupled. `normalize_weights` scales each
    matrix before its step so that the mean square of its rows' norms is 1, as airbench94_muon does.
    `rest` trains biases, norms, the input and the output layer, by torch's own optimizers at
    `rest_lr`; `rest_momentum` is SGD's Nesterov momentum or AdamW's first beta.

    ``params`` are the two groups of `parameter_groups`; from a list of parameters, those with two
    dimensions or more are the matrices. Raises ValueError if there is no matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        ns_precision: Literal["fp32", "bf16"] = "fp32",
        normalize_weights: bool = False,
        rest: Literal["adamw", "sgd"] = "adamw",
        rest_lr: float = 1e-3,
        rest_momentum: float = 0.9,
        rest_weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("ns_steps", ns_steps)):
            if value < 0:
                raise ValueError(f"{name}={value} must be at least 0")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must be at least 0 and below 1")
        groups = list(params)
        if not isinstance(groups[0], dict):
            vectors = [p for p in groups if p.ndim < 2]
            groups = [{"params": [p for p in groups if p.ndim >= 2]}, {"params": vectors}]
        matrices, others = (list(group["params"]) for group in groups)
        if not matrices:
            raise ValueError("the model has no hidden matrix, which is what Muon is for")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "ns_steps": ns_steps,
            "ns_precision": ns_precision,
            "normalize_weights": normalize_weights,
        }
        self._rest = _rest(others, rest, rest_momentum, lr=rest_lr, weight_decay=rest_weight_decay)
        if self._rest is not None:
            step_eagerly(self._rest)
        rest_groups = self._rest.param_groups if self._rest else []
        super().__init__([{"params": matrices}, *rest_groups], defaults)

    @staticmethod
    def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
        """Return the hidden matrices of a model, and all its other parameters.

        The input layer is the first weight in the order of registration, the output layer the last
        one of `classifier`, or of the model.
        """
        classifier = getattr(model, "classifier", None)
        last = [p for p in (classifier or model).parameters() if p.ndim >= 2][-1:]
        ends = [p for p in model.parameters() if p.ndim >= 2][:1] + last
        outer = {id(parameter) for parameter in ends}
        groups: tuple[list[Tensor], list[Tensor]] = ([], [])
        for parameter in model.parameters():
            is_matrix = parameter.ndim >= 2 and min(parameter.flatten(1).shape) > 1
            groups[0 if is_matrix and id(parameter) not in outer else 1].append(parameter)
        return [{"params": group} for group in groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of both groups; return what `closure` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices, *others = self.param_groups
        self._step_matrices(matrices)
        if self._rest is not None:
            # Both are new objects after a checkpoint was loaded.
            self._rest.param_groups, self._rest.state = others, self.state
            self._rest.step()
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad)
            buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(parameter.grad)
            update = buffer
            if group["nesterov"]:
                update = parameter.grad.add(buffer, alpha=group["momentum"])
            flat = update.flatten(1)
            by_shape.setdefault(tuple(flat.shape), []).append((parameter, flat))
        dtype = torch.bfloat16 if group["ns_precision"] == "bf16" else torch.float32
        for (rows, columns), pairs in by_shape.items():
            stacked = torch.stack([update for _, update in pairs])
            updates = orthogonalize(stacked, group["ns_steps"], dtype)
            rate = group["lr"] * max(1.0, rows / columns) ** 0.5
            for (parameter, _), update in zip(pairs, updates, strict=True):
                if group["normalize_weights"]:
                    parameter.mul_(rows**0.5 / parameter.norm().clamp(min=_EPSILON))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.reshape(parameter.shape), alpha=-rate)


def _rest(
    parameters: list[Tensor], name: str, momentum: float, **rates: Any
) -> torch.optim.Optimizer | None:
    """Return torch's optimizer of the parameters that are no hidden matrices."""
    if not parameters:
        return None
    # torch chooses foreach for GPUs only; on a CPU it gives the same bits sooner.
    rates["foreach"] = True if all(p.device.type == "cpu" for p in parameters) else None
    if name == "sgd":
        return torch.optim.SGD(parameters, momentum=momentum, nesterov=momentum > 0, **rates)
    return torch.optim.AdamW(parameters, betas=(momentum, 0.999), **rates)
