"""Which operations the time of a training step goes to, by torch's profiler."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity

from cifar_lab.config.run_config import RunConfig
from cifar_lab.runs.text import markdown_table
from cifar_lab.throughput import our_loops
from cifar_lab.training.device import wait_for
from cifar_lab.training.splits import Splits

_WARM_UP_STEPS = 5
_STEPS = 20
_SHOWN = 12
_NAME_WIDTH = 60  # the names of kernels state all of their template's parameters


@dataclass(frozen=True)
class Operation:
    """One of torch's operations, or a kernel: its own time per step, without what it calls."""

    name: str
    milliseconds: float
    calls: float
    share: float


@dataclass(frozen=True)
class Profile:
    """What the steps of a training epoch do.

    `steps` counts full batches: an epoch's smaller last one is a part of a step.
    `milliseconds` is the duration of a step under the profiler, which slows the host. `busy` is
    the part of it in which the operations of the device ran: what is missing from 1 is Python's on
    a CPU, and a GPU that waits for its host. `share` of an operation is that of `milliseconds`.
    """

    steps: float
    milliseconds: float
    busy: float
    operations: list[Operation]


def profile_steps(config: RunConfig, splits: Splits, device: str) -> Profile:
    """Train for a few steps and return their profile, the longest operation first.

    On CUDA these are the kernels of the GPU, otherwise torch's operations on the CPU.
    """
    # Its library writes each start and stop to stderr, at every level that it has.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    on_gpu = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    steps = our_loops.train(config, splits, device)
    batch_size = config.training.batch_size
    _train(steps, _WARM_UP_STEPS * batch_size)
    wait_for(device)
    # acc_events: without it, torch warns that events of earlier cycles are gone; here is only one.
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        started = time.perf_counter()
        count = _train(steps, _STEPS * batch_size) / batch_size
        wait_for(device)
        total = 1e3 * (time.perf_counter() - started) / count
    operations = []
    for event in profiler.key_averages():
        is_kernel = event.device_type.name != "CPU" and not event.is_user_annotation
        if on_gpu and not is_kernel:
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        own = microseconds / 1e3 / count
        operations.append(Operation(event.key, own, event.count / count, own / total))
    operations.sort(key=lambda operation: -operation.milliseconds)
    busy = sum(operation.share for operation in operations)
    return Profile(count, total, busy, [row for row in operations if row.milliseconds > 0])


def _train(steps: Iterator[int], images: int) -> int:
    """Train on at least so many images; return how many it were."""
    done = 0
    while done < images:
        done += next(steps)
    return done


def profile_table(profile: Profile) -> str:
    """Return the longest operations as aligned text that is valid Markdown."""
    rows = [
        (row.name[:_NAME_WIDTH], f"{row.milliseconds:.3g}", f"{row.calls:.3g}", f"{row.share:.1%}")
        for row in profile.operations[:_SHOWN]
    ]
    rest = profile.operations[_SHOWN:]
    if rest:
        own = sum(row.milliseconds for row in rest)
        share = own / profile.milliseconds
        rows.append((f"{len(rest)} others", f"{own:.3g}", "", f"{share:.1%}"))
    header = ("operation of the training epoch", "ms per step", "calls per step", "share")
    summary = (
        f"{profile.steps:.0f} steps under torch's profiler: {profile.milliseconds:.3g} ms each, "
        f"{profile.busy:.0%} of it in operations"
    )
    return f"{summary}\n\n{markdown_table(header, rows)}"
