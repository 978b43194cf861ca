"""Dropout that draws its masks from the run's own generator."""

import torch
from torch import Tensor, nn

from cifar_lab.training.group import Group


class KeyedDropout(nn.Dropout):
    """Dropout whose mask is drawn from the run's own generator, not from torch's global one.

    In a `group` of processes each draws the masks of the whole batch and uses those of its part.
    """

    def __init__(self, p: float, generator: torch.Generator, group: Group | None = None):
        super().__init__(p)
        self.generator = generator
        self.group = group or Group()

    def forward(self, input: Tensor) -> Tensor:
        """Zero each element with probability p and scale the others by 1 / (1 - p)."""
        if not self.training or self.p == 0:
            return input
        return input * self.group.whole_mask(
            input, lambda like: dropout_mask(like, self.p, self.generator)
        )


def dropout_mask(like: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Return a tensor shaped like `like` that is 0 with probability p and 1 / (1 - p) otherwise.

    On a CPU the random numbers are the cost of dropout (`bernoulli_` draws one per element), so
    four elements share one 64-bit number: p is rounded to a multiple of 2**-16.
    """
    if like.device.type != "cpu":
        mask = torch.empty_like(like, dtype=torch.float32)
        return mask.bernoulli_(1 - p, generator=generator).div_(1 - p).to(like.dtype)
    count = like.numel()
    bits = torch.empty((count + 3) // 4, dtype=torch.int64)
    bits.random_(-(2**63), None, generator=generator)
    threshold = round(p * 65536) - 32768
    kept = bits.view(torch.int16)[:count] >= threshold
    mask = torch.empty_like(like)
    if not is_dense(mask):  # a transposed view, say
        mask = torch.empty(like.shape, dtype=like.dtype)
    # as_strided writes in memory order, so that no layout needs a copy of the mask.
    flat = mask.as_strided((count,), (1,))
    torch.mul(kept, 1 / (1 - p), out=flat)
    return mask


def key_dropout(model: nn.Module, generator: torch.Generator, group: Group | None = None) -> None:
    """Replace each nn.Dropout of a model by a KeyedDropout; parameter names stay the same."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                keyed = KeyedDropout(child.p, generator, group)
                keyed.train(child.training)
                setattr(parent, name, keyed)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its memory without gaps, contiguous or channels last."""
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )
