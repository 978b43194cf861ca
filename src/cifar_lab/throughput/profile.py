"""Which operations the time of a training step goes to, by torch's profiler."""

import os
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from cifar_lab.config.run_config import RunConfig
from cifar_lab.runs.text import markdown_table
from cifar_lab.throughput import loops
from cifar_lab.training.device import wait_for
from cifar_lab.training.splits import Splits

_STEPS = 20
_REHEARSALS = 2
_SHOWN = 12
_NAME_WIDTH = 60  # the names of kernels state all of their template's parameters


def profile_steps(config: RunConfig, splits: Splits) -> dict[str, Any]:
    """Train for a few steps and return what they do, as `benchmark --json` writes it.

    `steps` counts full batches: an epoch's smaller last one is a part of a step. `milliseconds` is
    the duration of a step under the profiler, which slows the host. `busy` is the share of it in
    which operations ran: what is missing from 1 is Python's on a CPU, and a GPU that waits for its
    host. `operations`, the longest first, are torch's on a CPU and kernels on CUDA, each with its
    own milliseconds and calls per step, without what it calls.
    `page_faults` are those of a step under the profiler. Its records lie among the tensors, so that
    glibc's heap grows at first, as it does not in a run: what counts comes after two rehearsals.
    """
    # Its library writes each start and stop to stderr, at every level that it has.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    on_gpu = config.device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    steps, batch_size = loops.train(config, splits), config.training.batch_size
    # acc_events: without it, torch warns that events of earlier cycles are gone; here is only one.
    for _ in range(1 + _REHEARSALS):
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            started, faults = time.perf_counter(), _page_faults()
            count = 0.0
            while count < _STEPS:  # each item is what was done in half a second, not one step
                count += next(steps) / batch_size
            wait_for(config.device)
            total = 1e3 * (time.perf_counter() - started) / count
            faults = (_page_faults() - faults) / count
    operations = []
    for event in profiler.key_averages():
        is_kernel = event.device_type.name != "CPU" and not event.is_user_annotation
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds > 0 and is_kernel == on_gpu:
            own = microseconds / 1e3 / count
            numbers = {"milliseconds": own, "calls": event.count / count, "share": own / total}
            operations.append({"name": event.key, **numbers})
    operations.sort(key=lambda operation: -operation["milliseconds"])
    busy = sum(operation["share"] for operation in operations)
    times = {"milliseconds": total, "page_faults": faults, "busy": busy}
    return {"steps": count, **times, "operations": operations}


def _page_faults() -> float:
    """Return how often the process has been given a page of memory, 0 where nobody counts."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)


def profile_table(profile: Mapping[str, Any]) -> str:
    """Return the longest operations as aligned text that is valid Markdown."""
    rows = [
        (
            operation["name"][:_NAME_WIDTH],
            f"{operation['milliseconds']:.3g}",
            f"{operation['calls']:.3g}",
            f"{operation['share']:.1%}",
        )
        for operation in profile["operations"][:_SHOWN]
    ]
    header = ("operation of the training epoch", "ms per step", "calls per step", "share")
    return (
        f"{profile['steps']:.0f} steps under torch's profiler: {profile['milliseconds']:.3g} ms "
        f"each, {profile['busy']:.0%} of it in operations, {profile['page_faults']:,.0f} page "
        f"faults each\n\n"
        f"{markdown_table(header, rows)}"
    )
