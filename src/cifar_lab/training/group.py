"""The processes that train one run: the one of an ordinary run, which has nobody to talk to.

The loop, the state and the scoring speak to a Group wherever several processes would have to agree.
Alone, every answer is the process's own. `distributed.Processes` is the group that torchrun starts.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cifar_lab.config.run_config import RunConfig

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

    def start(self, config: RunConfig, **others: Any) -> None:
        """Send the config of the run, and what else they need, to the other processes."""

    def explain(self, error: BaseException) -> BaseException:
        """Return the error of another process that is the cause of a lost connection, if it is."""
        return error
