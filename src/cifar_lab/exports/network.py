"""The network that is exported: a run's model with the normalisation in front of it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar_lab.config import run_config
from cifar_lab.config.run_config import RunConfig
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.build import normalisation
from cifar_lab.training.scoring import load_model


class NormalisedNetwork(nn.Module):
    """A model that takes images (N, C, H, W) in [0, 1] and normalises them itself."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, config: RunConfig) -> None:
        super().__init__()
        self.model = model
        channels, numbers = config.dataset.image_shape[0], normalisation(config)
        mean = torch.tensor(numbers.mean or [0.0] * channels, dtype=torch.float64)
        std = torch.tensor(numbers.std or [1.0] * channels, dtype=torch.float64)
        self.register_buffer("scale", (1 / std).float().view(-1, 1, 1))
        self.register_buffer("shift", (-mean / std).float().view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the model's outputs (N, classes)."""
        outputs: Tensor = self.model(images * self.scale + self.shift)
        return outputs


def load_network(run: RunDir) -> NormalisedNetwork:
    """Return the network with the weights that the run was scored with, on the CPU."""
    network = NormalisedNetwork(load_model(run), run.read_config())
    network.to(memory_format=torch.contiguous_format)
    return network.eval().requires_grad_(False)


def metadata(run: RunDir, output: str) -> dict[str, str]:
    """Return what an exported file says about itself: texts, with lists as JSON.

    `output` is "logits", or "probabilities" for a model that ends with a softmax.
    """
    config, summary = run.read_config(), run.read_summary()
    channels, height, width = config.dataset.image_shape
    names = run.class_names()
    epoch = summary.best_epoch if summary.scored_weights == "best" else summary.epochs
    facts: dict[str, Any] = {
        "model": config.choices.get("model") or config.model["_target_"],
        "dataset": config.dataset.name,
        "class_names": json.dumps(names, ensure_ascii=False),
        "input": f"images: float32 (N, {channels}, {height}, {width}), "
        f"{'RGB' if channels == 3 else 'gray'} pixels in [0, 1]; the network normalises them",
        "output": f"{output}: float32 (N, {len(names)})",
        "weights": f"{summary.scored_weights}, epoch {epoch}",
        "test_accuracy": summary.test_accuracy,
        "run": run.path.resolve().name,
        "cifar_lab": summary.versions.get("cifar-lab"),
        "config": run_config.dump(portable(config)),
    }
    return {key: str(value) for key, value in facts.items() if value is not None}


def portable(config: RunConfig) -> RunConfig:
    """Return a config without the paths of the machine that it ran on."""
    source = dict(config.dataset.source)
    if isinstance(source.get("path"), str):
        source["path"] = Path(source["path"]).name
    continued = config.continue_from
    return dataclasses.replace(
        config,
        dataset=dataclasses.replace(config.dataset, source=source, relative_to=None),
        continue_from=Path(continued).name if continued is not None else None,
        output_dir="outputs",
    )
