"""A benchmark of one run: what was measured, on which machine, and what follows from it."""

import dataclasses
import functools
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cifar_lab.analysis.description import multiply_adds
from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import UsageError, did_you_mean
from cifar_lab.runs.text import markdown_table
from cifar_lab.throughput import baseline_loop, our_loops
from cifar_lab.throughput.baseline_loop import BaselineLoop, BaselineProcess
from cifar_lab.throughput.our_loops import OurLoop, train_on_one_batch
from cifar_lab.throughput.profile import Profile, profile_steps, profile_table
from cifar_lab.throughput.timing import Loop, Ratio, Speed, measure, rate, ratio
from cifar_lab.training.build import make_model
from cifar_lab.training.device import configure, describe_device, wait_for
from cifar_lab.training.splits import Splits

_PROCESS_SECONDS = 6.0  # to start a process and import torch and torchvision


@dataclass(frozen=True)
class Report:
    """A benchmark: the machine, the run, the speeds, and what follows from them."""

    seconds: float
    machine: dict[str, Any]
    run: dict[str, Any]
    speeds: list[Speed]
    ratios: list[Ratio]
    multiply_adds: int
    ceiling: float | None  # multiply-adds per second of a large matrix product
    profile: Profile | None

    def to_plain(self) -> dict[str, Any]:
        """Return the report as dicts, lists and numbers, as `--json` writes it."""
        return dataclasses.asdict(self)


def benchmark(
    config: RunConfig,
    *,
    seconds: float = 60.0,
    only: Sequence[str] = (),
    profile: bool = False,
    show: Callable[[str], None] = lambda label: None,
) -> Report:
    """Measure a run's training loop, its parts and the baseline, for about `seconds`.

    `only` picks loops by name or group; those picked by name are measured however long it takes.
    `profile` then looks at the operations of the training epoch, in a few steps more.
    Images that are unavailable are replaced by random ones, and the report says so. `show` is
    called with what is being done, again and again.
    """
    device = config.device
    configure(device, config.threads, config.deterministic)
    load = functools.cache(lambda: our_loops.load_images(config, device))
    baseline = BaselineProcess(config, device)
    try:
        loops = _choose(_loops(config, lambda: load()[0], device, baseline), only)
        show("loading the images")
        splits, images = load()
        speeds = measure(loops, seconds=seconds, required=only, show=show)
    finally:
        baseline.stop()
    profiled = None
    if profile:
        show("the profile of our training epoch")
        profiled = profile_steps(config, splits, device)
    model = make_model(config, splits, device)
    return Report(
        machine=_machine(device),
        seconds=seconds,
        run={
            **config.choices,
            "dataset": config.dataset.name,
            "images": images,
            "batch_size": config.training.batch_size,
            "precision": config.precision,
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        speeds=speeds,
        ratios=_ratios(speeds),
        multiply_adds=multiply_adds(config, len(splits.class_names), backward=True),
        ceiling=next((s.images_per_second for s in speeds if s.name == "matmul"), None),
        profile=profiled,
    )


def _loops(
    config: RunConfig, load: Callable[[], Splits], device: str, baseline: BaselineProcess
) -> list[Loop]:
    """Return everything that can be measured for a run, the most important loops first."""

    def ours(name: str, label: str, start: OurLoop) -> Loop:
        steps = functools.cache(lambda: start(config, load(), device))  # goes on in each turn
        return Loop(name, name, label, lambda s: rate(steps(), s, lambda: wait_for(device)))

    def theirs(group: str, label: str, loop: BaselineLoop, workers: int) -> Loop:
        text = f"{label}, {workers} worker{'s' if workers != 1 else ''}"
        turn = functools.partial(baseline.turn, loop, workers)
        return Loop(f"{group}_{workers}", group, text, turn, start_seconds=_PROCESS_SECONDS)

    loops = [
        ours("bound", "model's own bound: steps on one prepared batch", train_on_one_batch),
        ours("epoch", "our training epoch", our_loops.train),
        ours("data", "our data alone", our_loops.read),
    ]
    for workers in sorted({0, 1, 2} if device == "cpu" else {0, 2, min(8, os.cpu_count() or 1)}):
        loops.append(theirs("plain", "plain loop", baseline_loop.train, workers))
        loops.append(theirs("plain_data", "plain data alone", baseline_loop.read, workers))
    product = "one large matrix product: multiply-adds/s"
    return [*loops, ours("matmul", product, our_loops.multiply_matrices)]


def _choose(loops: Sequence[Loop], only: Sequence[str]) -> list[Loop]:
    """Return the loops that `only` picks by name or group, all of them if it is empty."""
    known = list(dict.fromkeys(name for loop in loops for name in (loop.group, loop.name)))
    for name in only:
        if name not in known:
            raise UsageError(
                f"--only {name} is wrong: it must be among {', '.join(known)}"
                f"{did_you_mean(name, known)}"
            )
    return [loop for loop in loops if not only or loop.group in only or loop.name in only]


def table(report: Report) -> str:
    """Return ratios, speeds and the profile, as far as measured, as text that is valid Markdown."""
    machine, run = report.machine, report.run
    labels = {speed.name: speed.label for speed in report.speeds}
    lines = [
        f"{run.get('model', 'model')} on {run['dataset']} ({run['images']} images), "
        f"batch {run['batch_size']}, {run['precision']}, {run['parameters']:,} parameters, "
        f"{report.multiply_adds / 1e6:,.1f} M multiply-adds per image and step",
        f"{machine['device']}, {machine['cores']} cores, {machine['instructions']}, "
        f"torch {machine['torch']}",
        "",
    ]
    ratios = [
        (f"{labels[r.name]} / {labels[r.over]}", f"{r.median:.3g}", f"{r.low:.3g} to {r.high:.3g}")
        for r in report.ratios
    ]
    if ratios:
        lines += [markdown_table(("ratio of images/s", "median", "quartiles"), ratios), ""]
    header = ("", "images/s", "quartiles", "G multiply-adds/s", "share of matmul")
    rows = [_row(report, speed) for speed in report.speeds if not speed.left_out]
    lines.append(markdown_table(header, rows))
    if left_out := [speed.label for speed in report.speeds if speed.left_out]:
        lines += ["", f"left out, for lack of time ({report.seconds:g} s): {'; '.join(left_out)}"]
    if report.profile is not None:
        lines += ["", profile_table(report.profile)]
    return "\n".join(lines)


def _row(report: Report, speed: Speed) -> tuple[str, ...]:
    if speed.images_per_second is None or speed.quartiles is None:
        return (speed.label, "none", speed.problem or "", "", "")
    if speed.group == "matmul":
        return (speed.label, "", "", f"{speed.images_per_second / 1e9:,.1f}", "1")
    low, high = speed.quartiles
    row = (speed.label, f"{speed.images_per_second:,.0f}", f"{low:,.0f} to {high:,.0f}")
    if speed.group in ("data", "plain_data"):
        return (*row, "", "")
    reached = speed.images_per_second * report.multiply_adds
    share = f"{reached / report.ceiling:.2g}" if report.ceiling else ""
    return (*row, f"{reached / 1e9:,.1f}", share)


def _ratios(speeds: list[Speed]) -> list[Ratio]:
    """Return each speed over the one that it is to be compared with."""
    pairs = [("epoch", "bound")]
    for ours, theirs in (("epoch", "plain"), ("data", "plain_data")):
        rivals = [(s.images_per_second, s.name) for s in speeds if s.group == theirs]
        measured = [(rate, name) for rate, name in rivals if rate is not None]
        if measured:
            pairs.append((ours, max(measured)[1]))
    return [value for pair in pairs if (value := ratio(speeds, *pair)) is not None]


def _machine(device: str) -> dict[str, Any]:
    return {
        "device": describe_device(device),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": platform.system(),
    }
