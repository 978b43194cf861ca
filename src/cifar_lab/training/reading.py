"""Images of a split, part after part, on its device; from a file, copied ahead of time."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from cifar_lab.training.splits import Split


def read_images(
    split: Split, order: Tensor, parts: Sequence[slice]
) -> Generator[Tensor, None, None]:
    """Yield the images, uint8 (B, C, H, W) on the split's device, at each part of `order`.

    `order` are indices (M,) of the official set, on the CPU. Where the split's images are read
    ahead, a thread copies the next part while the caller works on one; the images are the same.
    """
    if not split.ahead:
        places = order.to(split.images.device)
        for part in parts:
            yield split.images.index_select(0, places[part])
        return
    copy = _copier(split, order)
    with ThreadPoolExecutor(1, thread_name_prefix="images") as thread:
        coming: deque[Future[Tensor]] = deque()
        for part in parts:
            coming.append(thread.submit(copy, part))
            if len(coming) > 1:
                yield _taken(coming.popleft().result())
        while coming:
            yield _taken(coming.popleft().result())


def _copier(split: Split, order: Tensor) -> Callable[[slice], Tensor]:
    """Return what copies a part, in another thread than the one that trains."""
    # numpy copies rows without further threads, which would take the cores of the training step.
    source, places = split.images.numpy(), order.numpy()
    on_cuda = split.device.type == "cuda"
    stream = torch.cuda.Stream(split.device) if on_cuda else None  # type: ignore[no-untyped-call]

    def copy(part: slice) -> Tensor:
        chosen = places[part]
        rows = torch.empty((len(chosen), *source.shape[1:]), dtype=torch.uint8, pin_memory=on_cuda)
        np.take(source, chosen, axis=0, out=rows.numpy(), mode="clip")
        if stream is None:
            return rows.to(split.device)
        with torch.cuda.stream(stream):
            images = rows.to(split.device, non_blocking=True)
        stream.synchronize()
        return images

    return copy


def _taken(images: Tensor) -> Tensor:
    """Tell CUDA's allocator that this thread's stream uses what the other one has made."""
    if images.is_cuda:
        images.record_stream(torch.cuda.current_stream(images.device))
    return images
