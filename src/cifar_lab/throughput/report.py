"""A benchmark of one run: what was measured, on which machine, and what follows from it."""

import dataclasses
import functools
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cifar_lab.analysis.model_summary import multiply_adds
from cifar_lab.config.run_config import RunConfig
from cifar_lab.runs.text import markdown_table
from cifar_lab.throughput.baseline_loop import BaselineProcess
from cifar_lab.throughput.images import load_images
from cifar_lab.throughput.profile import Profile, profile_steps, profile_table
from cifar_lab.throughput.timing import Ratio, Speed, measure, ratio
from cifar_lab.throughput.variants import choose_variants, make_variants
from cifar_lab.training.build import make_model
from cifar_lab.training.device import configure, describe_device, wait_for


@dataclass(frozen=True)
class Report:
    """A benchmark: the machine, the run, the speeds, and what follows from them."""

    seconds: float
    machine: dict[str, Any]
    run: dict[str, Any]
    speeds: list[Speed]
    ratios: list[Ratio]
    multiply_adds: int
    ceiling: float | None
    profile: Profile | None = None

    def to_plain(self) -> dict[str, Any]:
        """Return the report as dicts, lists and numbers, as `--json` writes it."""
        plain = dataclasses.asdict(self)
        for entry, speed in zip(plain["speeds"], self.speeds, strict=True):
            entry["images_per_second"] = speed.median if speed.rates else None
            entry["quartiles"] = list(speed.quartiles) if speed.rates else None
        return plain


def benchmark(
    settings: RunConfig,
    *,
    seconds: float = 60.0,
    only: Sequence[str] = (),
    profile: bool = False,
    show: Callable[[str], None] = lambda label: None,
) -> Report:
    """Measure the parts of a run's training step and alternatives to it, for about `seconds`.

    `only` picks variants by name or group; those picked by name are measured however long it takes.
    `profile` then looks at the operations of the training epoch, in a few steps more.
    Images that are unavailable are replaced by random ones, and the report says so. `show` is
    called with what is being done, again and again.
    """
    device = settings.device
    configure(device, settings.threads, settings.deterministic)
    load = functools.cache(lambda: load_images(settings, device))
    baseline = BaselineProcess(settings, device)
    every = make_variants(settings, lambda: load()[0], device, baseline)
    variants = choose_variants(every, only)
    show("loading the images")
    splits, images = load()
    try:
        speeds = measure(
            variants,
            seconds=seconds,
            synchronise=lambda: wait_for(device),
            required=only,
            show=show,
        )
    finally:
        baseline.stop()
    profiled = None
    if profile:
        show("the profile of our training epoch")
        profiled = profile_steps(settings, splits, device)
    model = make_model(settings, splits, device)
    return Report(
        machine=_machine(device),
        seconds=seconds,
        run={
            **settings.choices,
            "dataset": settings.dataset.name,
            "images": images,
            "batch_size": settings.training.batch_size,
            "precision": settings.precision,
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        speeds=speeds,
        ratios=_ratios(speeds),
        multiply_adds=multiply_adds(settings, len(splits.class_names), backward=True),
        ceiling=next((s.median for s in speeds if s.name == "matmul" and s.rates), None),
        profile=profiled,
    )


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
    rows = [_speed_row(report, speed) for speed in report.speeds if not speed.left_out]
    lines.append(markdown_table(header, rows))
    if left_out := [speed.label for speed in report.speeds if speed.left_out]:
        lines += ["", f"left out, for lack of time ({report.seconds:g} s): {'; '.join(left_out)}"]
    if report.profile is not None:
        lines += ["", profile_table(report.profile)]
    return "\n".join(lines)


def _speed_row(report: Report, speed: Speed) -> tuple[str, ...]:
    if speed.problem is not None:
        return (speed.label, "none", speed.problem, "", "")
    low, high = speed.quartiles
    if speed.group == "matmul":
        return (speed.label, "", "", f"{speed.median / 1e9:,.1f}", "1")
    row = (speed.label, f"{speed.median:,.0f}", f"{low:,.0f} to {high:,.0f}")
    if speed.group in ("data", "plain_data"):
        return (*row, "", "")
    reached = speed.median * report.multiply_adds
    share = f"{reached / report.ceiling:.2g}" if report.ceiling else ""
    return (*row, f"{reached / 1e9:,.1f}", share)


def _ratios(speeds: list[Speed]) -> list[Ratio]:
    """Return each speed over the one that it is to be compared with."""
    pairs = [("epoch", "bound")]
    for ours, theirs in (("epoch", "plain"), ("data", "plain_data")):
        rivals = [s for s in speeds if s.group == theirs and s.rates]
        if rivals:
            pairs.append((ours, max(rivals, key=lambda s: s.median).name))
    pairs += [(s.name, "bound") for s in speeds if s.group == "options"]
    found = (ratio(speeds, *pair) for pair in pairs)
    return [one for one in found if one is not None]


def _machine(device: str) -> dict[str, Any]:
    return {
        "device": describe_device(device),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": platform.system(),
    }
