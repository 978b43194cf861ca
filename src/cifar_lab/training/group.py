"""The processes that train one run, and dropout, whose masks are drawn for all of them.

An ordinary run has one process, which has nobody to talk to: every answer is its own. The loop, the
state and the scoring speak to a Group wherever several processes would have to agree.
`distributed.Processes` is the group that torchrun starts.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

YIELD_SECONDS = 0.5  # how often training yields: bars move, signals are noticed


@dataclass(frozen=True)
class Part:
    """The rows [first, last) that one process takes of a batch of `total` images.

    Of a batch with fewer than two images per process, some processes compute rows that belong to
    another one, because batch norm needs two images; these rows are not `counted`.
    """

    first: int
    last: int
    total: int
    counted: bool = True


class Group:
    """One process alone; `part` is the part of the present batch that it computes: all of it."""

    rank, world = 0, 1

    def __init__(self) -> None:
        self.part = Part(0, 0, 0)
        self._noted = time.perf_counter()

    def divide(self, total: int) -> Part:
        """Return the part of a batch of `total` images that this process computes."""
        return Part(0, total, total)

    def is_due(self) -> bool:
        """Whether training is to yield after this step: in all processes at the same one."""
        return time.perf_counter() - self._noted >= YIELD_SECONDS

    def yielded(self) -> None:
        """Note that training has just yielded."""
        self._noted = time.perf_counter()

    def any(self, wanted: bool) -> bool:
        """Whether at least one process wants something; all of them ask at the same time."""
        return bool(self.sum(torch.tensor(int(wanted))))

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        return values

    def gather(self, columns: Tensor) -> Tensor:
        """Return the columns (2, n) of whole numbers of all processes, in their order."""
        return columns

    def part_of_loss(self, loss: Tensor, weight: Callable[[], Tensor | None]) -> Tensor:
        """Return what a part's mean loss adds to that of the batch.

        `weight()` is the sum of the weights of the part's images, None if each weighs as much.
        """
        return loss

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace the gradients by their sums over all processes."""

    def of_batch(self, loss: Tensor, correct: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
        """Return loss, hits and images of the batch, from what the part adds to its loss."""
        return loss, correct, count

    def whole_mask(self, like: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """Return this part's rows of what `draw` draws for a tensor of the whole batch."""
        return draw(like)

    def share_buffers(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Give all processes those buffers of process 0 that are among `weights`, in place."""

    def share(self, value: Any = None) -> Any:
        """Return process 0's value, tensors and plain values, in all processes; on the CPU."""
        return value

    def explain(self, error: BaseException) -> BaseException:
        """Return the error of another process that is the cause of a lost connection, if it is."""
        return error


# --- dropout --------------------------------------------------------------------------------------


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
