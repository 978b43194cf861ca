"""Lookahead: slow weights that follow those of the optimizer, for any optimizer."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cifar_lab.config.run_config import LookaheadConfig


class Lookahead:
    """Slow weights that a model returns to after every few steps of its optimizer.

    After each `every` steps, the slow weights move towards the model's, slow <- d slow + (1 - d)
    model, and the model continues from them (Zhang et al. 2019, arXiv:1907.08610; their alpha is
    1 - d). As in airbench94 (Jordan 2024, arXiv:2404.00498), d grows during training, d = decay *
    (steps done / total)**ramp; buffers such as batch norm's statistics take part; and after the
    last of `total` steps the model gets the slow weights.
    """

    def __init__(self, model: nn.Module, every: int, settings: LookaheadConfig, total: int):
        self._every, self._settings, self._total = every, settings, total
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._fast = {n: t.detach() for n, t in named.items() if t.is_floating_point()}
        self._slow = {name: tensor.clone() for name, tensor in self._fast.items()}

    def decay(self, steps: int) -> float:
        """Return the share of the slow weights that stays, after so many steps of training."""
        share: float = min(steps / self._total, 1.0) ** self._settings.ramp
        return self._settings.decay * share

    @torch.no_grad()
    def after_step(self, steps: int) -> None:
        """Follow the optimizer's step; `steps` have been done in all, this one included."""
        slow, fast = list(self._slow.values()), list(self._fast.values())
        ended = steps == self._total
        if steps % self._every == 0:
            torch._foreach_lerp_(slow, fast, 1 - self.decay(steps))
        if ended or steps % self._every == 0:
            torch._foreach_copy_(fast, slow)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the slow weights by name."""
        return dict(self._slow)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor] | None) -> None:
        """Load slow weights; without any, start from the model's present ones.

        Raises KeyError or RuntimeError if they are those of another model.
        """
        for name, slow in self._slow.items():
            slow.copy_(self._fast[name] if state is None else state[name])
