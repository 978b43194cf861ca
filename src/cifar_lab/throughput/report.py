"""A benchmark of one run: loops are timed in turns, and what follows from it is a table.

The loops run as A B C A B C ..., so that what else the machine does affects all alike; a ratio is
the median of the ratios within each round. Absolute times of two benchmarks are hardly comparable.
"""

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import UsageError, did_you_mean, first_line, log
from cifar_lab.models.layers import step_multiply_adds
from cifar_lab.runs.text import markdown_table
from cifar_lab.throughput import loops
from cifar_lab.training.build import build_model, load_splits
from cifar_lab.training.device import configure, describe_device, wait_for
from cifar_lab.training.splits import Splits

_ROUNDS = 5
_FEWEST_ROUNDS = 3
_TURN_SECONDS = (0.05, 2.0)
# What a loop raises that this machine does not support: it becomes a row with the reason.
_UNSUPPORTED = (RuntimeError, OSError, ImportError, UsageError)

_PROFILED_STEPS = 20
_REHEARSALS = 2
_SHOWN = 12  # operations
_NAME_WIDTH = 60  # the names of kernels state all of their template's parameters

_COMPARED = (("epoch", "careful"), ("epoch", "plain"), ("data", "plain_data"), ("epoch", "bound"))


@dataclass
class Loop:
    """Something to measure: `start` returns endless steps, which yield their number of images.

    `rates` are the images per second of its turns, none if a `problem` prevented them. `ahead`
    steps are ready when a turn begins, since workers made them meanwhile, and do not count.
    """

    name: str
    group: str
    label: str
    start: Callable[[], Iterator[int]]
    ahead: int = 0
    rates: list[float] = field(default_factory=list)
    problem: str | None = None


def measure(
    chosen: Sequence[Loop], seconds: float, wait: Callable[[], None], *, all_of_them: bool = False
) -> None:
    """Let the loops take turns for about `seconds`, at least three each; fill in their rates.

    Loops that are not started within the first third of the time are left out, unless
    `all_of_them` are asked for. `wait` waits for the device, whose work would otherwise count for
    the next turn.
    """
    began = time.perf_counter()
    started: dict[str, Iterator[int]] = {}

    def turn(loop: Loop, length: float) -> None:
        try:
            steps = started.get(loop.name) or started.setdefault(loop.name, loop.start())
            for _ in range(loop.ahead):
                next(steps)
            wait()
            since = time.perf_counter()
            images = next(steps)
            while time.perf_counter() - since < length:
                images += next(steps)
            wait()
            loop.rates.append(images / (time.perf_counter() - since))
        except _UNSUPPORTED as error:
            loop.problem = f"{type(error).__name__}: {first_line(error, 120)}"

    for loop in chosen:
        if loop is not chosen[0] and not all_of_them and time.perf_counter() - began > seconds / 3:
            loop.problem = f"no time for it in {seconds:g} s"
        else:
            turn(loop, 0.0)  # allocates, compiles, starts workers
            loop.rates.clear()
    working = [loop for loop in chosen if loop.problem is None]
    left = seconds - (time.perf_counter() - began)
    shortest, longest = _TURN_SECONDS
    length = min(max(left / (_ROUNDS * max(len(working), 1)), shortest), longest)
    rounds = 0
    while working and (rounds < _FEWEST_ROUNDS or time.perf_counter() - began < seconds):
        for loop in working:
            turn(loop, length)
        working = [loop for loop in working if loop.problem is None]
        rounds += 1


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile of two values or more."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def ratio(loop: Loop, other: Loop) -> tuple[float, float, float]:
    """Return how much faster a loop is than another, round by round: `quartiles`."""
    return quartiles([a / b for a, b in zip(loop.rates, other.rates, strict=True)])


def benchmark(
    config: RunConfig, *, seconds: float = 60.0, only: Sequence[str] = (), profile: bool = False
) -> dict[str, Any]:
    """Measure a run's training loop, its parts and two baselines, for about `seconds`.

    `only` picks loops by name or group, which are measured however long it takes. `profile` then
    looks at the operations of the training epoch, in a few steps more. Returns what `--json`
    writes; `table` shows it.
    """
    device = config.device
    configure(device, config.threads, config.deterministic)
    load = functools.cache(lambda: load_splits(config, device))
    chosen = _choose(_loops(config, load), only)
    model, images_of = config.choices.get("model", "the model"), config.dataset.name
    log.info("measuring %s on %s with %s for about %g s", model, images_of, device, seconds)
    splits = load()
    measure(chosen, seconds, lambda: wait_for(device), all_of_them=bool(only))
    profiled = profile_steps(config, splits) if profile else None
    measured = {loop.name: loop for loop in chosen if loop.problem is None}
    model = build_model(config, len(splits.class_names))
    cost = step_multiply_adds(model, config.dataset.image_shape)
    product = measured.get("matmul")
    return {
        "machine": {
            "device": describe_device(device),
            "cores": os.cpu_count(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "torch": str(torch.__version__),
        },
        "run": {
            **config.choices,
            "dataset": config.dataset.name,
            "batch_size": config.training.batch_size,
            "precision": config.precision,
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "speeds": [_speed(loop) for loop in chosen],
        "ratios": _ratios(measured),
        "multiply_adds": cost,
        # Images per second if a step were its convolutions and dense layers alone, at full speed.
        "limit": quartiles(product.rates)[1] / cost if product else None,
        "profile": profiled,
    }


def _loops(config: RunConfig, load: Callable[[], Splits]) -> list[Loop]:
    """Return everything that can be measured for a run, the most important loops first."""

    def begin(start: Callable[..., loops.Steps], **options: Any) -> Callable[[], loops.Steps]:
        return lambda: start(config, load(), **options)

    product = "one large matrix product: multiply-adds/s"
    listed = [
        Loop("epoch", "epoch", "our training epoch", begin(loops.train)),
        Loop("careful", "careful", "a careful loop", begin(loops.train_carefully)),
        Loop("matmul", "matmul", product, begin(loops.multiply_matrices)),
        Loop("bound", "bound", "our steps on one ready batch", begin(loops.train_on_one_batch)),
        Loop("data", "data", "our data alone", begin(loops.read)),
    ]
    most = min(8, os.cpu_count() or 1) if config.device != "cpu" else 0
    for n in sorted({0, 2, most}):
        for group, label in (("plain", ""), ("plain_data", ": data")):
            start = begin(loops.train_plainly, workers=n, data_only=group == "plain_data")
            label = f"the tutorials' loop, {n} workers{label}"
            listed.append(Loop(f"{group}_{n}", group, label, start, ahead=2 * n))
    return listed


def _choose(listed: list[Loop], only: Sequence[str]) -> list[Loop]:
    """Return the loops that `only` picks by name or group, all of them if it is empty."""
    known = list(dict.fromkeys(name for loop in listed for name in (loop.group, loop.name)))
    for name in only:
        if name not in known:
            raise UsageError(
                f"--only {name} is wrong: it must be among {', '.join(known)}"
                f"{did_you_mean(name, known)}"
            )
    return [loop for loop in listed if not only or loop.group in only or loop.name in only]


def _speed(loop: Loop) -> dict[str, Any]:
    low, median, high = quartiles(loop.rates) if loop.problem is None else (None, None, None)
    shown = {key: value for key, value in vars(loop).items() if key not in ("start", "ahead")}
    return {**shown, "images_per_second": median, "quartiles": [low, high]}


def _ratios(measured: Mapping[str, Loop]) -> list[dict[str, Any]]:
    """Return our loops over those that they are to be compared with, as far as measured."""
    ratios = []
    for ours, theirs in _COMPARED:
        rivals = [loop for loop in measured.values() if loop.group == theirs]
        if ours in measured and rivals:
            rival = max(rivals, key=lambda loop: quartiles(loop.rates)[1])
            low, median, high = ratio(measured[ours], rival)
            ratios.append(
                {"name": ours, "over": rival.name, "median": median, "low": low, "high": high}
            )
    return ratios


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
    steps, batch_size = loops.train(config, splits), config.training.batch_size
    # acc_events: without it, torch warns that events of earlier cycles are gone; here is only one.
    for _ in range(1 + _REHEARSALS):
        with torch.profiler.profile(acc_events=True) as profiler:
            started, faults = time.perf_counter(), _page_faults()
            count = 0.0
            while count < _PROFILED_STEPS:  # an item is what was done in half a second
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


def table(report: Mapping[str, Any]) -> str:
    """Return ratios, speeds, the limit and the profile as text that is valid Markdown."""
    machine, run, limit = report["machine"], report["run"], report["limit"]
    labels = {speed["name"]: speed["label"] for speed in report["speeds"]}
    parts = [
        f"{run.get('model', 'model')} on {run['dataset']}, "
        f"batch {run['batch_size']}, {run['precision']}, {run['parameters']:,} parameters, "
        f"{report['multiply_adds'] / 1e6:,.1f} M multiply-adds per image and step\n"
        f"{machine['device']}, {machine['cores']} cores, {machine['instructions']}, "
        f"torch {machine['torch']}"
    ]
    if report["ratios"]:
        rows = [
            (
                f"{labels[row['name']]} / {labels[row['over']]}",
                f"{row['median']:.3g}",
                f"{row['low']:.3g} to {row['high']:.3g}",
            )
            for row in report["ratios"]
        ]
        parts.append(markdown_table(("ratio of images/s", "median", "quartiles"), rows))
    header = ("", "images/s", "quartiles", "share of the limit")
    parts.append(markdown_table(header, [_row(speed, limit) for speed in report["speeds"]]))
    if limit is not None:
        parts.append(
            f"The limit is {limit:,.0f} images/s: a step that consists of its convolutions and "
            "dense layers alone, at the speed of one large matrix product. The rest of a step goes "
            "to normalisation, activations, pooling, the optimizer and the data."
        )
    if report["profile"] is not None:
        parts.append(_profile_table(report["profile"]))
    return "\n\n".join(parts)


def _row(speed: Mapping[str, Any], limit: float | None) -> tuple[str, ...]:
    if speed["problem"]:
        return (speed["label"], "none", speed["problem"], "")
    median, (low, high) = speed["images_per_second"], speed["quartiles"]
    form = ".3g" if speed["group"] == "matmul" else ",.0f"
    trains = speed["group"] in ("epoch", "careful", "bound", "plain")
    share = f"{median / limit:.0%}" if trains and limit else ""
    return (speed["label"], f"{median:{form}}", f"{low:{form}} to {high:{form}}", share)


def _profile_table(profile: Mapping[str, Any]) -> str:
    rows = [
        (
            row["name"][:_NAME_WIDTH],
            f"{row['milliseconds']:.3g}",
            f"{row['calls']:.3g}",
            f"{row['share']:.1%}",
        )
        for row in profile["operations"][:_SHOWN]
    ]
    header = ("operation of the training epoch", "ms per step", "calls per step", "share")
    return (
        f"{profile['steps']:.0f} steps under torch's profiler: {profile['milliseconds']:.3g} ms "
        f"each, {profile['busy']:.0%} of it in operations, {profile['page_faults']:,.0f} page "
        f"faults each\n\n"
        f"{markdown_table(header, rows)}"
    )
