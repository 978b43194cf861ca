"""A .pt2 file of torch.export, for PyTorch without this package."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import nn

from cifar_lab.exports.network import Answers, answers_of, trace


def write(
    network: nn.Module, image_shape: Sequence[int], facts: Mapping[str, str], handle: IO[bytes]
) -> None:
    """Write the network, with the facts as its extra file `metadata.json`."""
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    torch.export.save(trace(network, image_shape), handle, extra_files={"metadata.json": text})


def load(path: Path) -> Answers:
    """Return the file as a function of arrays."""
    with path.open("rb") as handle:
        return answers_of(torch.export.load(handle).module())
