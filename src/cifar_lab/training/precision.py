"""What `precision=auto` means: the fastest precision that is shown to cost no accuracy."""

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from cifar_lab.errors import UsageError, first_line
from cifar_lab.training.device import Precision

EVIDENCE = Path(__file__).with_name("precision_evidence.json")
"""What scripts/measure_precision found, by kind of device and precision.

The environment variable CIFAR_LAB_PRECISION names another file of this form, for what was measured
on a machine of one's own; the tests name one without evidence, so that they train in fp32.
"""

_SEEDS = 5
_POINTS = 1.0  # how far the interval of the difference from fp32 may reach, in percentage points


@dataclass(frozen=True)
class Finding:
    """What was measured of a precision beside fp32: the slowest and the fastest network's ratio."""

    precision: Precision
    kind: str
    slowest: float
    fastest: float


def select_precision(name: Precision, device: str) -> Precision:
    """Return the precision that `name` means on this device.

    auto is the fastest precision whose accuracy has been measured on this kind of device, over five
    seeds of each network, to be within one point of that of fp32; without such evidence it is fp32.
    """
    if name == "fp16" and device == "cpu":
        raise UsageError("precision=fp16 trains on CUDA and MPS only; use bf16 or fp32 on a CPU")
    if name != "auto":
        return name
    found = finding(device)
    return "fp32" if found is None else found.precision


def finding(device: str) -> Finding | None:
    """Return what makes auto take another precision than fp32 on this device, if anything does.

    UsageError where the file that CIFAR_LAB_PRECISION names is no table of evidence.
    """
    kind, file = device_kind(device), evidence_file()
    try:
        return accurate_and_faster(kind, json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UsageError(
            f"CIFAR_LAB_PRECISION={file} is no table of scripts/measure_precision: "
            f"{first_line(error)}"
        ) from None


def evidence_file() -> Path:
    """Return the file of the evidence: EVIDENCE, or the one that CIFAR_LAB_PRECISION names."""
    return Path(os.environ.get("CIFAR_LAB_PRECISION") or EVIDENCE)


def explain(precision: str, device: str) -> str:
    """Return why auto takes this precision on this device, for the log; else nothing."""
    found = finding(device)
    if found is None or found.precision != precision:
        return ""
    return (
        f" (auto: on a {found.kind} as accurate as fp32, and {found.slowest:.1f} to "
        f"{found.fastest:.1f} times as fast)"
    )


def accurate_and_faster(kind: str, evidence: Mapping[str, Any]) -> Finding | None:
    """Return the fastest precision that costs no accuracy by the evidence for a kind of device."""
    found = []
    for precision, entry in evidence.get(kind, {}).items():
        networks = entry["networks"].values()
        accurate = all(
            network["seeds"] >= _SEEDS
            and abs(network["difference_points"]) + network["half_width_points"] <= _POINTS
            for network in networks
        )
        speeds = [network["speed"] for network in networks]
        if precision not in get_args(Precision):
            raise ValueError(f"there is no precision {precision!r}")
        if accurate and min(speeds) > 1:
            found.append(Finding(precision, kind, min(speeds), max(speeds)))
    return max(found, key=lambda one: one.slowest, default=None)


@functools.cache
def device_kind(device: str) -> str:
    """Return what decides how fast a precision is: the GPU's generation, or what the CPU computes.

    Such as `cuda 9.0`, `mps`, `cpu with amx_bf16`, `cpu with avx512_bf16` and `cpu`.
    """
    import torch

    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda {major}.{minor}"
    if device == "mps":
        return device
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    has = next((name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name)), None)
    return f"cpu with {has}" if has else "cpu"
