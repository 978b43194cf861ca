"""Weights that follow those of the optimizer: Lookahead's slow ones, and a moving average."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cifar_lab.config.run_config import LookaheadConfig


class _FollowingWeights:
    """A copy of a model's weights and of buffers such as batch norm's statistics.

    Whole numbers (batch norm's counters) are not copied: they stay the model's.
    """

    def __init__(self, model: nn.Module) -> None:
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._current = {n: t for n, t in named.items() if t.is_floating_point()}
        self._kept = {name: tensor.detach().clone() for name, tensor in self._current.items()}

    def _move(self, share: float) -> None:
        """Move the copy by a share of the way to the model's weights."""
        torch._foreach_lerp_(list(self._kept.values()), list(self._current.values()), share)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor] | None) -> None:
        """Load a saved copy; without one, start from the model's present weights.

        Raises KeyError or RuntimeError if it is that of another model.
        """
        for name, kept in self._kept.items():
            kept.copy_(self._current[name] if state is None else state[name])


class Lookahead(_FollowingWeights):
    """Slow weights that a model returns to after every few steps of its optimizer.

    After each `every` steps, the slow weights move towards the model's, slow <- d slow + (1 - d)
    model, and the model continues from them (Zhang et al. 2019, arXiv:1907.08610; their alpha is
    1 - d). As in airbench94 (Jordan 2024, arXiv:2404.00498), d grows during training, d = decay *
    (steps done / total)**ramp; buffers such as batch norm's statistics take part; and after the
    last of `total` steps the model gets the slow weights.
    """

    def __init__(self, model: nn.Module, every: int, config: LookaheadConfig, total: int):
        super().__init__(model)
        self._every, self._config, self._total = every, config, total

    def decay(self, steps: int) -> float:
        """Return the share of the slow weights that stays, after so many steps of training."""
        share: float = min(steps / self._total, 1.0) ** self._config.ramp
        return self._config.decay * share

    @torch.no_grad()
    def after_step(self, steps: int) -> None:
        """Follow the optimizer's step; `steps` have been done in all, this one included."""
        returns = steps % self._every == 0
        if returns:
            self._move(1 - self.decay(steps))
        if returns or steps == self._total:
            torch._foreach_copy_(list(self._current.values()), list(self._kept.values()))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the slow weights by name."""
        return dict(self._kept)


class WeightAverage(_FollowingWeights):
    """The average of a model's weights over its steps (Polyak and Juditsky 1992); it is scored.

    After each step, average <- d average + (1 - d) weights. So that the initial weights do not
    weigh on a short run, d = min(decay, (1 + n) / (10 + n)) after n earlier steps, as in
    TensorFlow's `ExponentialMovingAverage`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self._decay = decay

    def decay(self, steps: int) -> float:
        """Return the share of the average that stays after so many steps of training."""
        return min(self._decay, steps / (9 + steps))

    @torch.no_grad()
    def after_step(self, steps: int) -> None:
        """Follow the optimizer's step; `steps` have been done in all, this one included."""
        self._move(1 - self.decay(steps))

    def __call__(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the logits of the model with the averaged weights; its own stay as they are."""
        logits: Tensor = functional_call(model, self._kept, (images,))
        return logits

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the model's state dict with the averages in place of its weights."""
        averages = {id(t): self._kept[name] for name, t in self._current.items()}
        own = model.state_dict(keep_vars=True)  # a shared tensor has several names
        return {name: averages.get(id(tensor), tensor.detach()) for name, tensor in own.items()}
