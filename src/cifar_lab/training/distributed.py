"""One run in several processes that torchrun starts: each computes a part of every batch.

The images and random draws of a batch are those of a run in one process. Each process takes its
rows, and the gradients are added up before the optimizer's step, so that all of them have the same
weights after it. Process 0 alone opens the run folder, decides where training yields, and scores
the trained run; the others train the same run, and neither write nor print.
"""

import contextlib
import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cifar_lab.config import targets
from cifar_lab.config.launch import Launched
from cifar_lab.config.run_config import RunConfig, parse
from cifar_lab.config.schema import wrong
from cifar_lab.errors import RunFailed, Stopped, UsageError, first_line
from cifar_lab.runs.summary import code_version
from cifar_lab.training.build import build_state, load_splits
from cifar_lab.training.device import configure, derive_seed
from cifar_lab.training.group import YIELD_SECONDS, Group, Part, is_dense
from cifar_lab.training.loop import Diverged, Stop, fit

_NOTICE = timedelta(seconds=3)  # how long process 0 waits for the reason why another one has ended
_LOST = ("Connection closed", "Connection reset", "Broken pipe", "connection was aborted")


def part_of_batch(total: int, rank: int, world: int) -> Part:
    """Return the part of a batch of `total` images for one process; sizes differ by one at most."""
    working = min(world, max(1, total // 2))
    taken = rank if rank < working else 0
    first, last = taken * total // working, (taken + 1) * total // working
    return Part(first, last, total, counted=rank < working)


class Processes(Group):
    """The processes of torchrun, connected; this is one of them."""

    def __init__(self, place: Launched) -> None:
        super().__init__()
        self.rank, self.world, self.local_rank = place.rank, place.world, place.local_rank
        self._local_world = place.local_world
        on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
        # `srun --gpus-per-task=1` shows each process one GPU, which is number 0 to all of them
        self._gpu = self.local_rank if torch.cuda.device_count() > 1 else 0
        if on_gpus and self._gpu < torch.cuda.device_count():
            torch.cuda.set_device(self._gpu)
        store, rank, world = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        self._store = dist.PrefixStore("cifar_lab", store)  # type: ignore[attr-defined]
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpus else "gloo", store=store, rank=rank, world_size=world
        )
        self._told = False
        self._interval, self._steps, self._since = 1, 0, time.perf_counter()

    # --- what process 0 asks of the others ------------------------------------------------------

    def check(self, config: RunConfig) -> None:
        """Raise UsageError for a run that several processes cannot train."""
        device, size = config.device, config.training.batch_size
        if device == "mps" or ":" in device:
            raise UsageError(
                f"device={device} is wrong with torchrun: it must be cpu or cuda, and each process "
                "takes the GPU of its own number"
            )
        gpus = torch.cuda.device_count()
        if device == "cuda" and self._local_world > gpus:
            raise UsageError(
                f"torchrun started {self._local_world} processes here, and there are {gpus} CUDA "
                f"devices: --nproc-per-node={gpus}, or device=cpu"
            )
        if size < 2 * self.world:
            right = f"at least {2 * self.world}, two images for each of {self.world} processes"
            raise wrong("training.batch_size", size, right)
        if config.training.cuda_graph is True:
            raise wrong("training.cuda_graph", True, "auto or false with torchrun")

    def end(self) -> None:
        """Tell the others that nothing is to be trained, unless they were sent a run."""
        if self.rank == 0 and not self._told:
            self.share({"config": None})

    def device(self, name: str) -> str:
        """Return the device of this process in a run whose device is `name`."""
        return f"cuda:{self._gpu}" if name == "cuda" and self.rank else name

    def divide(self, total: int) -> Part:
        """Return this process's rows of a batch."""
        return part_of_batch(total, self.rank, self.world)

    # --- exchange -------------------------------------------------------------------------------

    def share(self, value: Any = None) -> Any:
        """Return process 0's value; only tensors and plain values are read."""
        buffer = io.BytesIO()
        self._told = True
        if self.rank == 0:
            torch.save(value, buffer)
        content = [buffer.getvalue()]
        dist.broadcast_object_list(content, 0, device=torch.device("cpu"))
        return torch.load(io.BytesIO(content[0]), map_location="cpu", weights_only=True)

    def share_buffers(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Broadcast the buffers of process 0."""
        for name in dict(model.named_buffers()):
            if name in weights:
                dist.broadcast(weights[name], 0)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all processes."""
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def gather(self, columns: Tensor) -> Tensor:
        """Return the columns of all processes."""
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, columns)
        return torch.cat(parts, dim=1)

    def is_due(self) -> bool:
        """Whether training yields after this step, at the same one in all processes.

        Process 0 measures the time and decides how many steps there are until the next yield, so
        that no step waits for a clock.
        """
        self._steps += 1
        if self._steps < self._interval:
            return False
        taken = max(time.perf_counter() - self._since, 1e-6)
        wished = min(round(self._steps * YIELD_SECONDS / taken), 2 * self._interval)
        interval = torch.tensor([max(wished, 1)])
        dist.broadcast(interval, 0)
        self._interval, self._steps, self._since = int(interval), 0, time.perf_counter()
        return True

    # --- a training step ------------------------------------------------------------------------

    def part_of_loss(self, loss: Tensor, weight: Callable[[], Tensor | None]) -> Tensor:
        """Return the part's share of the batch's mean loss, by images or by their weights."""
        weight_of_part = weight()
        if weight_of_part is None:
            counted = self.part.last - self.part.first if self.part.counted else 0
            return loss * (counted / self.part.total)
        own = weight_of_part.detach() * float(self.part.counted)
        return loss * (own / self.sum(own))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add the gradients up in one exchange."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, total in zip(gradients, torch.split(flat, sizes), strict=True):
            gradient.copy_(total.view(gradient.shape))

    def of_batch(self, loss: Tensor, correct: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
        """Add loss and hits up; rows that another process counts do not count here."""
        own = torch.stack([loss.detach().float(), correct * float(self.part.counted)])
        loss, correct = self.sum(own)
        return loss, correct, self.part.total

    def whole_mask(self, like: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """Draw for the whole batch, as one process would, and return this part's rows."""
        part = self.part
        rows, remainder = divmod(len(like), part.last - part.first)
        if remainder:
            raise ValueError(f"dropout of {list(like.shape)}: the first dimension is no batch")
        shape = (rows * part.total, *like.shape[1:])
        if is_dense(like):  # in the layout of the part
            whole = like.new_empty_strided(shape, (like[0].numel(), *like.stride()[1:]))
        else:
            whole = like.new_empty(shape)
        return draw(whole)[rows * part.first : rows * part.last]

    # --- failures -------------------------------------------------------------------------------

    def report(self, error: BaseException) -> RunFailed:
        """Leave the reason why this process ends for process 0; return it as an error."""
        text = f"{type(error).__name__}: {first_line(error)}"
        text = f"process {self.rank} of {self.world} failed with {text}"
        self._store.set("failure", text)
        return RunFailed(text)

    def explain(self, error: BaseException) -> BaseException:
        """Return the error that another process has left in the store, where it is the cause."""
        if not lost_connection(error):
            return error
        with contextlib.suppress(RuntimeError):  # none came, or torchrun's store is gone too
            self._store.wait(["failure"], _NOTICE)
            return RunFailed(self._store.get("failure").decode(errors="replace"))
        return RunFailed(
            f"the connection to another of the {self.world} processes was lost: it was killed, or "
            "its machine cannot be reached; the same line resumes the run"
        )


def lost_connection(error: BaseException) -> bool:
    """Whether an error says that another process of the group has ended."""
    if not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(text in str(error) for text in _LOST)


@contextlib.contextmanager
def joined(place: Launched) -> Iterator[Processes]:
    """Connect this process with the others of torchrun for a block.

    After an error the connections are left to the end of the process: closing them could wait for
    a process that has ended.
    """
    group = Processes(place)
    try:
        yield group
    except BaseException:
        with contextlib.suppress(RuntimeError):
            group.end()
        raise
    group.end()
    dist.destroy_process_group()


def follow(group: Processes, stop: Stop) -> int:
    """Train the run that process 0 opens, until it ends; return the exit code.

    What process 0 says too, and what follows from the end of another process, is not repeated
    here. Raises RunFailed where this process is the one that failed.
    """
    try:
        request = group.share()
        if request["config"] is not None:
            _train_part(group, stop, request)
    except Diverged:
        return Diverged.exit_code
    except Stopped as stopped:
        return 128 + stopped.signal
    except Exception as error:
        if lost_connection(error):
            return 1
        raise group.report(error) from error
    return 0


def _train_part(group: Processes, stop: Stop, request: dict[str, Any]) -> None:
    """Build the run as process 0 does, take over its state, and train."""
    targets.trust(request["trust"])
    config = parse(request["config"])
    if code_version(config) != request["code"]:
        raise UsageError("its code is not that of process 0; install the same on all machines")
    device = group.device(config.device)
    configure(device, request["threads"], config.deterministic)
    torch.manual_seed(config.seed)
    splits = load_splits(config, device)
    state, batches = build_state(config, splits, device, group=group)
    state.load_state_dict(group.share())
    # What is drawn from torch's global generators is this process's own.
    torch.manual_seed(derive_seed(state.seed, "global", state.epoch, state.step) + group.rank)
    watched = splits.test if config.evaluation.watch_test else None
    settings = config.training, config.evaluation
    with stop.graceful():
        for progress in fit(state, batches, splits.validation, *settings, watched=watched):
            if group.any(stop.is_wanted(progress)):
                return
