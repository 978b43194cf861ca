"""An exponential moving average of a model's weights, which is what is scored."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call


class WeightAverage:
    """The average of a model's weights over its steps (Polyak and Juditsky 1992).

    After each step, average <- d average + (1 - d) weights. Buffers such as batch norm's statistics
    take part; whole numbers are the model's. So that the initial weights do not weigh on a short
    run, d = min(decay, (1 + n) / (10 + n)) after n earlier steps, as in TensorFlow's
    `ExponentialMovingAverage`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._current = {n: t for n, t in named.items() if t.is_floating_point()}
        self._average = {name: t.detach().clone() for name, t in self._current.items()}

    def decay(self, steps: int) -> float:
        """Return the share of the average that stays after so many steps of training."""
        return min(self._decay, steps / (9 + steps))

    @torch.no_grad()
    def after_step(self, steps: int) -> None:
        """Follow the optimizer's step; `steps` were taken so far, over all epochs."""
        average, current = list(self._average.values()), list(self._current.values())
        torch._foreach_lerp_(average, current, 1 - self.decay(steps))

    def __call__(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the logits of the model with the averaged weights; its own stay as they are."""
        logits: Tensor = functional_call(model, self._average, (images,))
        return logits

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the model's state dict with the averages in place of its weights."""
        averages = {id(t): self._average[name] for name, t in self._current.items()}
        own = model.state_dict(keep_vars=True)  # a shared tensor has several names
        return {name: averages.get(id(tensor), tensor.detach()) for name, tensor in own.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor] | None) -> None:
        """Load what `weights` returned; without it, start from the model's present weights.

        Raises KeyError or RuntimeError if it is that of another model.
        """
        for name, average in self._average.items():
            average.copy_(self._current[name] if state is None else state[name])
