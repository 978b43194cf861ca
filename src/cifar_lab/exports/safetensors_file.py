"""A safetensors file: weights and settings, from which this package builds the network again."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from torch import nn

from cifar_lab.config import run_config
from cifar_lab.errors import UsageError, first_line
from cifar_lab.exports.network import NormalisedNetwork
from cifar_lab.training.build import build_model


def write(network: nn.Module, image_shape: Sequence[int], facts: Mapping[str, str]) -> bytes:
    """Return a file with the weights, buffers and the normalisation, and the facts as metadata."""
    from safetensors.torch import save

    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    return save(state, metadata=dict(facts))


def load_network(path: Path | str) -> nn.Module:
    """Return the network in an exported file, in evaluation mode on the CPU.

    It takes images (N, C, H, W) in [0, 1], float32, and returns what the file's metadata say,
    (N, classes). Raises UsageError if the file is not an export of this package.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = run_config.parse(yaml.safe_load(facts["config"]))
        num_classes = len(json.loads(facts["class_names"]))
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError, yaml.YAMLError) as why:
        raise UsageError(f"{path} is not an exported model: {first_line(why)}") from None
    network = NormalisedNetwork(build_model(config, num_classes), config)
    network.load_state_dict(state)
    return network.eval()
