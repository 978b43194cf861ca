"""Images per second of training, of its parts and of other ways to do it, measured side by side.

A machine is never quiet: what is compared is measured in turns (A B C A B C ...), and a ratio is
the median of the rounds' own ratios. Seconds of two runs of this program tell little.
"""

import dataclasses
import functools
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from cifar_lab import components, device
from cifar_lab.building import (
    build_state,
    load_splits,
    make_model,
    optimizer_settings,
)
from cifar_lab.config import RunConfig
from cifar_lab.data import Batches, Splits, make_splits
from cifar_lab.datasets import ImageArrays
from cifar_lab.errors import NotNow, RequestError, did_you_mean
from cifar_lab.plain_loop import OwnProcess
from cifar_lab.training import fit, key_dropout

_ROUNDS = 5
_FEWEST_ROUNDS = 3
_SLICE_SECONDS = (0.05, 2.0)
_SYNTHETIC_IMAGES = 10_000


@dataclass(frozen=True)
class Contender:
    """Something to measure: `start` gives an iterator that yields the images of each step it did.

    `restart`: a new iterator for each slice, whose first `warm_up` steps are not timed, so that
    worker processes neither bring images from before their turn nor work on after it.
    """

    name: str
    group: str
    label: str
    start: Callable[[], Iterator[int]]
    warm_up: int = 2
    restart: bool = False
    threads: int | None = None


@dataclass
class Speed:
    """What was measured: images per second of each round, or why there is nothing."""

    name: str
    group: str
    label: str
    rates: list[float] = field(default_factory=list)
    problem: str | None = None

    @property
    def median(self) -> float:
        """Images per second, the median of the rounds."""
        return statistics.median(self.rates) if self.rates else float("nan")

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper quartile of the rounds."""
        return _quartiles(self.rates)


@dataclass(frozen=True)
class Ratio:
    """How much faster `name` is than `over`: median and quartiles of the rounds' ratios."""

    name: str
    over: str
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Report:
    """A benchmark: the machine, the run, the speeds, and what follows from them."""

    machine: dict[str, Any]
    run: dict[str, Any]
    speeds: list[Speed]
    ratios: list[Ratio]
    multiply_adds: int
    ceiling: float | None

    def to_plain(self) -> dict[str, Any]:
        """Return dicts, lists and numbers: what `--json` writes."""
        plain = dataclasses.asdict(self)
        for entry, speed in zip(plain["speeds"], self.speeds, strict=True):
            entry["images_per_second"] = speed.median if speed.rates else None
            entry["quartiles"] = list(speed.quartiles) if speed.rates else None
        return plain


def measure(
    contenders: Sequence[Contender], *, seconds: float, synchronise: Callable[[], None]
) -> list[Speed]:
    """Run slices of the contenders in turns for about `seconds` altogether."""
    speeds = [Speed(c.name, c.group, c.label) for c in contenders]
    running: dict[str, Iterator[int]] = {}
    shortest, longest = _SLICE_SECONDS
    slice_seconds = min(max(seconds / (_ROUNDS * max(len(contenders), 1)), shortest), longest)
    warm, rounds, started = False, 0, time.perf_counter()
    while rounds < _FEWEST_ROUNDS or time.perf_counter() - started < seconds:
        for contender, speed in zip(contenders, speeds, strict=True):
            if speed.problem is None:
                try:
                    rate = _slice(contender, running, slice_seconds, synchronise)
                    speed.rates.append(rate)
                except (
                    RuntimeError,
                    OSError,
                    ImportError,
                    RequestError,
                ) as error:  # an option unfit for here
                    lines = str(error).strip().splitlines()
                    speed.problem = f"{type(error).__name__}: {lines[0][:120] if lines else ''}"
                    speed.rates.clear()
        rounds += 1
        if not warm:  # the first round compiles and allocates
            warm, rounds, started = True, 0, time.perf_counter()
            for speed in speeds:
                speed.rates.clear()
    return speeds


def ratio(speeds: Sequence[Speed], name: str, over: str) -> Ratio | None:
    """Return how much faster one speed is than another, round by round; None if one is missing."""
    found = {speed.name: speed.rates for speed in speeds}
    if not found.get(name) or not found.get(over):
        return None
    ratios = [a / b for a, b in zip(found[name], found[over], strict=False)]
    return Ratio(name, over, statistics.median(ratios), *_quartiles(ratios))


def benchmark(settings: RunConfig, *, seconds: float = 60.0, only: Sequence[str] = ()) -> Report:
    """Measure a run's parts and the alternatives to it.

    `only` picks contenders by name or group. NotNow never: images that are out of reach are
    replaced by random ones, and the report says so.
    """
    where = settings.device
    device.configure(where, settings.threads, settings.deterministic)
    splits, images = load_images(settings, where)
    plain = OwnProcess(settings, where)
    contenders = _chosen(_contenders(settings, splits, where, plain), only)
    try:
        speeds = measure(contenders, seconds=seconds, synchronise=_synchroniser(where))
    finally:
        plain.stop()
    multiply_adds = count_multiply_adds(settings, splits, where)
    ceiling = next((s.median for s in speeds if s.name == "matmul" and s.rates), None)
    return Report(
        machine=_machine(where),
        run={
            **settings.choices,
            "dataset": settings.dataset.name,
            "images": images,
            "batch_size": settings.training.batch_size,
            "precision": settings.precision,
            "parameters": sum(p.numel() for p in make_model(settings, splits, where).parameters()),
        },
        speeds=speeds,
        ratios=_ratios(speeds),
        multiply_adds=multiply_adds,
        ceiling=ceiling,
    )


def count_multiply_adds(settings: RunConfig, splits: Splits, where: str) -> int:
    """Return the multiply-adds of a training step (forward and backward) for one image."""
    state, batches = build_state(settings, splits, where)
    images, labels = next(batches.epoch(1))
    with FlopCounterMode(display=False) as counter:
        functional.cross_entropy(state.model(images), labels).backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops()) // 2 // len(labels)


def _slice(
    contender: Contender,
    running: dict[str, Iterator[int]],
    seconds: float,
    synchronise: Callable[[], None],
) -> float:
    threads = torch.get_num_threads()
    if contender.threads is not None:
        torch.set_num_threads(contender.threads)
    try:
        if contender.name not in running or contender.restart:
            running[contender.name] = contender.start()
            for _ in range(contender.warm_up):
                next(running[contender.name])
        steps = running[contender.name]
        synchronise()
        started, images = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            images += next(steps)
        synchronise()
        rate = images / (time.perf_counter() - started)
        if contender.restart:
            running.pop(contender.name).close()  # type: ignore[attr-defined]
        return rate
    finally:
        if contender.threads is not None:
            torch.set_num_threads(threads)


def _contenders(
    settings: RunConfig, splits: Splits, where: str, plain: OwnProcess
) -> list[Contender]:
    def bound(
        name: str, label: str, *, group: str = "options", threads: int | None = None, **changes: Any
    ) -> Contender:
        start = functools.partial(endless_steps, settings, splits, where, **changes)
        return Contender(name, group, label, start, threads=threads)

    return [
        bound("bound", "model's own bound: steps on one batch that is there", group="bound"),
        Contender(
            "epoch", "epoch", "our training epoch", lambda: _epoch_steps(settings, splits, where)
        ),
        Contender("data", "data", "our data alone", lambda: _data(settings, splits, where)),
        *_plain_contenders(plain, where),
        *(bound(*option, **changes) for option, changes in _options(settings, where).items()),
        *(
            bound(f"threads_{n}", f"threads={n}", threads=n)
            for n in sorted({1, max(torch.get_num_threads() // 2, 1)})
            if where == "cpu" and n < torch.get_num_threads()
        ),
        Contender(
            "matmul",
            "matmul",
            "one large matrix product: multiply-adds/s",
            lambda: _matrix_products(where, settings.precision),
        ),
    ]


def _options(settings: RunConfig, where: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Return {(name, label): changes}: ways to make the same step faster, one at a time."""
    options: dict[tuple[str, str], dict[str, Any]] = {}
    if device.memory_format(where) == torch.channels_last:
        options["contiguous", "contiguous layout"] = {"memory_format": torch.contiguous_format}
    for precision in ("fp32", "bf16", "fp16"):
        if precision != settings.precision and (precision != "fp16" or where != "cpu"):
            options[precision, f"precision={precision}"] = {"precision": precision}
    for name, value in (("fused", True), ("foreach", where != "cpu")):
        if name in settings.optimizer:
            changed = {**settings.optimizer, "fused": False, "foreach": False, name: value}
            label = f"optimizer.{name}={str(value).lower()}"
            options[name, label] = {"optimizer": changed}
    options["torch_dropout", "torch's own dropout"] = {"keyed": False}
    options["compile", "torch.compile, torch's own dropout"] = {"compiled": True}
    if where.startswith("cuda"):
        options["cuda_graph", "CUDA graph, torch's own dropout"] = {"keyed": False, "graph": True}
    return options


def endless_steps(
    settings: RunConfig,
    splits: Splits,
    where: str,
    *,
    keyed: bool = True,
    compiled: bool = False,
    graph: bool = False,
    memory_format: torch.memory_format | None = None,
    **changes: Any,
) -> Iterator[int]:
    """Train on one batch without end: no data, no counting, no reading of results."""
    settings = dataclasses.replace(settings, **changes)
    compiled = compiled or settings.training.compile
    layout = memory_format or device.memory_format(where)
    model = make_model(settings, splits, where).to(memory_format=layout).train()
    if keyed and not compiled:
        key_dropout(model, torch.Generator(where))
    component = optimizer_settings(settings.optimizer, where)
    if graph and components.takes(component, "optimizer", "capturable"):
        component = {**component, "capturable": True}
    optimizer = components.build(component, "optimizer", params=model.parameters())
    scaler = torch.amp.GradScaler(where.split(":")[0], enabled=settings.precision == "fp16")
    images, labels = next(_batches(settings, splits, where).epoch(1))
    images = images.contiguous(memory_format=layout)
    call = torch.compile(model, dynamic=False) if compiled else model
    smoothing = settings.training.label_smoothing

    def step() -> None:
        with device.autocast(where, settings.precision):
            loss = functional.cross_entropy(call(images).float(), labels, label_smoothing=smoothing)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    if graph:
        step = _captured(step)
    while True:
        step()
        yield len(labels)


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """Return a CUDA graph's replay of a step; on a stream of its own first, as capturing needs."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _epoch_steps(settings: RunConfig, splits: Splits, where: str) -> Iterator[int]:
    """Train as a run does, by `fit`, without validation."""
    endless = dataclasses.replace(settings.training, epochs=1_000_000, patience=None)
    settings = dataclasses.replace(settings, training=endless, scheduler=None)
    state, batches = build_state(settings, splits, where)
    ends = [0, *(end for _, end in batches.bounds)]
    done = 0
    for progress in fit(state, batches, None, settings.training):
        if progress.kind == "epoch":
            done = 0
        else:
            yield ends[progress.step] - done
            done = ends[progress.step]


def _data(settings: RunConfig, splits: Splits, where: str) -> Iterator[int]:
    batches = _batches(settings, splits, where)
    for number in itertools.count(1):
        for _, labels in batches.epoch(number):
            yield len(labels)


def _plain_contenders(plain: OwnProcess, where: str) -> list[Contender]:
    counts = {0, 1, 2} if where == "cpu" else {0, 2, min(8, os.cpu_count() or 1)}
    contenders = []
    for workers in sorted(counts):
        noun = f"{workers} worker{'s' if workers != 1 else ''}"
        for name, label, kind in (
            ("plain", f"plain loop, {noun}", "train"),
            ("plain_data", f"plain data alone, {noun}", "read"),
        ):
            start = functools.partial(plain.steps, kind, workers)
            contenders.append(
                Contender(f"{name}_{workers}", name, label, start, 2 * workers + 1, restart=True)
            )
    return contenders


def _matrix_products(where: str, precision: str) -> Iterator[int]:
    """Multiply two large matrices without end; yield multiply-adds."""
    size = 2048 if where == "cpu" else 8192
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    a, b = (torch.rand(size, size, device=where, dtype=kinds[precision]) for _ in range(2))
    out = torch.empty_like(a)
    while True:
        torch.mm(a, b, out=out)
        yield size**3


def _batches(settings: RunConfig, splits: Splits, where: str) -> Batches:
    return build_state(settings, splits, where)[1]


def _chosen(contenders: list[Contender], only: Sequence[str]) -> list[Contender]:
    known = list(dict.fromkeys(name for c in contenders for name in (c.group, c.name)))
    for name in only:
        if name not in known:
            raise RequestError(
                f"--only {name} is wrong: it must be among {', '.join(known)}"
                f"{did_you_mean(name, known)}"
            )
    return [c for c in contenders if not only or c.group in only or c.name in only]


def _ratios(speeds: list[Speed]) -> list[Ratio]:
    """Return what the speeds are measured for: each beside what it is to be compared with."""
    pairs = [("epoch", "bound")]
    for ours, theirs in (("epoch", "plain"), ("data", "plain_data")):
        rivals = [s for s in speeds if s.group == theirs and s.rates]
        if rivals:
            pairs.append((ours, max(rivals, key=lambda s: s.median).name))
    pairs += [(s.name, "bound") for s in speeds if s.group == "options"]
    found = (ratio(speeds, *pair) for pair in pairs)
    return [one for one in found if one is not None]


def load_images(settings: RunConfig, where: str) -> tuple[Splits, str]:
    """Return the run's splits, or random images of the same shape where they are out of reach."""
    try:
        return load_splits(settings, where), "real"
    except NotNow as error:
        reason = str(error).splitlines()[0]
    generator = np.random.default_rng(0)
    shape = (_SYNTHETIC_IMAGES, *settings.dataset.image_shape)
    classes = settings.dataset.classes or [str(i) for i in range(10)]
    images = generator.integers(0, 256, shape, dtype=np.uint8)
    labels = np.arange(len(images)) % len(classes)
    few = slice(len(classes) * 10)
    arrays = ImageArrays(images, labels, images[few], labels[few], tuple(classes))
    split = dataclasses.replace(settings.split, validation=0.0)
    return make_splits(arrays, settings.dataset, split, where), f"synthetic ({reason})"


def _synchroniser(where: str) -> Callable[[], None]:
    if where.startswith("cuda"):
        return functools.partial(torch.cuda.synchronize, where)
    return torch.mps.synchronize if where == "mps" else lambda: None


def _machine(where: str) -> dict[str, Any]:
    return {
        "device": device.describe_device(where),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return (values[0], values[0]) if values else (float("nan"), float("nan"))
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
