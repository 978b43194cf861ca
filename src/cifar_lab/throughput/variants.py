"""The variants of a training step that a benchmark compares, and the parts of a step alone."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from cifar_lab.config import targets
from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import UsageError, did_you_mean
from cifar_lab.throughput.baseline_loop import BaselineProcess
from cifar_lab.throughput.timing import Variant
from cifar_lab.training.batches import Batches
from cifar_lab.training.build import build_state, make_model, optimizer_settings
from cifar_lab.training.criterion import make_criterion
from cifar_lab.training.device import autocast, memory_format
from cifar_lab.training.dropout import key_dropout
from cifar_lab.training.loop import fit
from cifar_lab.training.splits import Splits
from cifar_lab.training.state import build_optimizer

_PROCESS_SECONDS = 6.0  # to start a process and import torch and torchvision
_COMPILE_SECONDS = 30.0


def make_variants(
    settings: RunConfig, load: Callable[[], Splits], device: str, baseline: BaselineProcess
) -> list[Variant]:
    """Return everything that can be measured for a run, the most important variants first.

    `load` is called when a variant starts, not before.
    """

    def steps(**changes: Any) -> Callable[[], Iterator[int]]:
        return lambda: endless_steps(settings, load(), device, **changes)

    threads = torch.get_num_threads()
    fewer_threads = sorted(n for n in {1, threads // 2} if 0 < n < threads and device == "cpu")
    return [
        Variant("bound", "bound", "model's own bound: steps on one prepared batch", steps()),
        Variant(
            "epoch", "epoch", "our training epoch", lambda: epoch_steps(settings, load(), device)
        ),
        Variant("data", "data", "our data alone", lambda: _data(settings, load(), device)),
        *_baseline_variants(baseline, device),
        Variant(
            "matmul",
            "matmul",
            "one large matrix product: multiply-adds/s",
            lambda: _matrix_products(device, settings.precision),
        ),
        *(
            Variant(
                name,
                "options",
                label,
                steps(**changes),
                start_seconds=_COMPILE_SECONDS if changes.get("compiled") else 0.0,
            )
            for (name, label), changes in _options(settings, device).items()
        ),
        *(
            Variant(f"threads_{n}", "options", f"threads={n}", steps(), threads=n)
            for n in fewer_threads
        ),
    ]


def choose_variants(variants: Sequence[Variant], only: Sequence[str]) -> list[Variant]:
    """Return the variants that `only` picks by name or group, all of them if it is empty."""
    known = list(dict.fromkeys(name for v in variants for name in (v.group, v.name)))
    for name in only:
        if name not in known:
            raise UsageError(
                f"--only {name} is wrong: it must be among {', '.join(known)}"
                f"{did_you_mean(name, known)}"
            )
    return [v for v in variants if not only or v.group in only or v.name in only]


def endless_steps(
    settings: RunConfig,
    splits: Splits,
    device: str,
    *,
    keyed: bool = True,
    compiled: bool = False,
    graph: bool = False,
    layout: torch.memory_format | None = None,
    **changes: Any,
) -> Iterator[int]:
    """Train on one batch without end: no data, no metrics, no reading of results.

    `keyed` draws dropout masks from a generator of their own, as a run does; `graph` replays the
    step as a CUDA graph; `changes` replace fields of the settings.
    """
    settings = dataclasses.replace(settings, **changes)
    compiled = compiled or settings.training.compile
    layout = layout or memory_format(device)
    model = make_model(settings, splits, device).to(memory_format=layout).train()
    if keyed and not compiled:
        key_dropout(model, torch.Generator(device))
    optimizer_config = optimizer_settings(settings.optimizer, device)
    if graph and targets.takes(optimizer_config, "optimizer", "capturable"):
        optimizer_config = {**optimizer_config, "capturable": True}
    optimizer = build_optimizer(optimizer_config, model)
    scaler = torch.amp.GradScaler(device.split(":")[0], enabled=settings.precision == "fp16")
    images, labels = next(_batches(settings, splits, device).epoch(1))
    images = images.contiguous(memory_format=layout)
    network = torch.compile(model, dynamic=False) if compiled else model
    criterion = make_criterion(settings.training, splits.train, len(splits.class_names))
    max_norm = settings.training.clip_grad_norm

    def step() -> None:
        with autocast(device, settings.precision):
            logits = network(images).float()
            loss = criterion(logits, labels)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if max_norm is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    if graph:
        step = _captured(step)
    while True:
        step()
        yield len(labels)


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """Return a CUDA graph's replay of a step; capturing needs steps on a side stream first."""
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


def _options(settings: RunConfig, device: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Return {(name, label): changes}: alternatives to the step, one change at a time."""
    options: dict[tuple[str, str], dict[str, Any]] = {}
    if memory_format(device) == torch.channels_last:
        options["contiguous", "contiguous layout"] = {"layout": torch.contiguous_format}
    for precision in ("fp32", "bf16", "fp16"):
        if precision != settings.precision and (precision != "fp16" or device != "cpu"):
            options[precision, f"precision={precision}"] = {"precision": precision}
    for name, value in (("fused", True), ("foreach", device != "cpu")):
        if name in settings.optimizer:
            changed = {**settings.optimizer, "fused": False, "foreach": False, name: value}
            label = f"optimizer.{name}={str(value).lower()}"
            options[name, label] = {"optimizer": changed}
    options["torch_dropout", "torch's own dropout"] = {"keyed": False}
    options["compile", "torch.compile, torch's own dropout"] = {"compiled": True}
    if device.startswith("cuda"):
        options["cuda_graph", "CUDA graph, torch's own dropout"] = {"keyed": False, "graph": True}
    return options


def epoch_steps(settings: RunConfig, splits: Splits, device: str) -> Iterator[int]:
    """Train as a run does, by `fit`, without validation."""
    endless = dataclasses.replace(settings.training, epochs=1_000_000, patience=None)
    settings = dataclasses.replace(settings, training=endless, scheduler=None)
    state, batches = build_state(settings, splits, device)
    ends = [0, *(end for _, end in batches.bounds)]
    done = 0
    for progress in fit(state, batches, None, settings.training):
        if progress.kind == "epoch":
            done = 0
        else:
            yield ends[progress.step] - done
            done = ends[progress.step]


def _data(settings: RunConfig, splits: Splits, device: str) -> Iterator[int]:
    batches = _batches(settings, splits, device)
    for number in itertools.count(1):
        for _, labels in batches.epoch(number):
            yield len(labels)


def _batches(settings: RunConfig, splits: Splits, device: str) -> Batches:
    return build_state(settings, splits, device)[1]


def _baseline_variants(baseline: BaselineProcess, device: str) -> list[Variant]:
    counts = {0, 1, 2} if device == "cpu" else {0, 2, min(8, os.cpu_count() or 1)}
    variants = []
    for workers in sorted(counts):
        noun = f"{workers} worker{'s' if workers != 1 else ''}"
        for name, label, kind in (
            ("plain", f"plain loop, {noun}", "train"),
            ("plain_data", f"plain data alone, {noun}", "read"),
        ):
            start = functools.partial(baseline.steps, kind, workers)
            variants.append(
                Variant(
                    f"{name}_{workers}",
                    name,
                    label,
                    start,
                    warm_up=2 * workers + 1,
                    restart=True,
                    start_seconds=_PROCESS_SECONDS,
                )
            )
    return variants


def _matrix_products(device: str, precision: str) -> Iterator[int]:
    """Multiply two large matrices without end; yield multiply-adds."""
    size = 2048 if device == "cpu" else 8192
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    a, b = (torch.rand(size, size, device=device, dtype=kinds[precision]) for _ in range(2))
    out = torch.empty_like(a)
    while True:
        torch.mm(a, b, out=out)
        yield size**3
