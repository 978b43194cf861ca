"""Whether an exported file gives the answers that the run has stored."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cifar_lab.config.run_config import RunConfig
from cifar_lab.exports.network import Answers
from cifar_lab.runs.metrics import Predictions
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.data import check_same_data, load_splits

TOLERANCE = 1e-4
"""How far an output of an exported file may be from the run's own."""


@dataclass(frozen=True)
class Images:
    """The images at `indices` (N,) of `all` uint8 (M, C, H, W), which may be mapped from a file."""

    all: Tensor
    indices: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Return N."""
        return len(self.indices)

    def batches(self, size: int) -> Iterator[npt.NDArray[np.float32]]:
        """Yield float images (B, C, H, W) in [0, 1]."""
        for first in range(0, len(self), size):
            chosen = torch.from_numpy(self.indices[first : first + size])
            yield (self.all[chosen].float() / 255).numpy()


@dataclass(frozen=True)
class Reference:
    """Test images, the outputs to expect for them, and where these are from.

    `note` says why these are not the stored predictions, if they are not.
    """

    images: "Images"
    outputs: npt.NDArray[np.float32]
    source: str
    note: str | None = None


def expected_outputs(run: RunDir, network: Answers, batch_size: int) -> Reference:
    """Return what an exported file has to answer for the run's test images.

    These are the run's stored predictions. Where a plain pass through the network cannot repeat
    them, they are the answers of `network` itself. Raises Unavailable if the data have changed.
    """
    settings, summary, stored = run.read_config(), run.read_summary(), run.read_predictions()
    check_same_data(settings.dataset, summary.dataset, run.path)
    images = Images(load_splits(settings, "cpu").official_test.images, stored.indices)
    why = why_stored_differ(settings, summary.device)
    if why is None:
        return Reference(images, stored.logits, "the stored predictions")
    fresh = run_in_batches(network, images, batch_size)
    note = f"{why}; the file was compared with a plain pass in PyTorch, {_agreement(fresh, stored)}"
    return Reference(images, fresh, "a plain pass in PyTorch", note)


def why_stored_differ(settings: RunConfig, device: str) -> str | None:
    """Return why a plain pass on the CPU cannot repeat a run's stored predictions, if it cannot."""
    evaluation = settings.evaluation
    if evaluation.views != "one":
        return f"the stored predictions are means over views (evaluation.views={evaluation.views})"
    if evaluation.crop_padding:
        return (
            "the stored predictions are of images cropped at random "
            f"(evaluation.crop_padding={evaluation.crop_padding})"
        )
    if settings.precision != "fp32":
        return f"the stored predictions were computed with precision={settings.precision}"
    if device != "cpu":
        return f"the stored predictions were computed on {device}, which rounds otherwise"
    return None


def run_in_batches(answers: Answers, images: Images, batch_size: int) -> npt.NDArray[np.float32]:
    """Return the outputs for images, given as floats in [0, 1]."""
    parts = [answers(part) for part in images.batches(batch_size)]
    return np.concatenate(parts)


def deviation(answers: Answers, expected: Reference, batch_size: int) -> float:
    """Return the largest difference of an output; inf where one of the two is not finite.

    The images come in batches, and the first one alone too: any number of images has to work.
    """
    found = run_in_batches(answers, expected.images, batch_size)
    alone = answers(next(expected.images.batches(1)))
    return max(_distance(found, expected.outputs), _distance(alone, expected.outputs[:1]))


def _distance(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    if found.shape != expected.shape:
        return math.inf
    with np.errstate(invalid="ignore"):  # inf minus inf
        difference = np.abs(found.astype(np.float64) - expected)
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    largest = float(np.max(difference, where=~same, initial=0.0))
    return largest if np.isfinite(largest) else math.inf


def _agreement(fresh: npt.NDArray[np.float32], stored: Predictions) -> str:
    same = int((fresh.argmax(axis=1) == stored.predicted).sum())
    return f"whose class is the stored one for {same:,} of {len(stored):,} test images"
