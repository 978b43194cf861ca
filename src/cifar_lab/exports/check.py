"""Whether an exported file gives the answers that the run has stored."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cifar_lab.config.run_config import RunConfig
from cifar_lab.exports.network import Answers, Floats
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.data import check_same_data, load_splits

TOLERANCE = 1e-4
"""How far an output of an exported file may be from the run's own."""


@dataclass(frozen=True)
class Reference:
    """Outputs to expect for the images at `indices` (N,) of `images`, and where they are from.

    `images` are uint8 (M, C, H, W), and may be mapped from a file. `note` says why the outputs are
    not the stored predictions, if they are not.
    """

    images: Tensor
    indices: npt.NDArray[np.int64]
    outputs: Floats
    source: str = "the stored predictions"
    note: str | None = None

    def batches(self, size: int) -> Iterator[Floats]:
        """Yield float images (B, C, H, W) in [0, 1]."""
        for first in range(0, len(self.indices), size):
            chosen = torch.from_numpy(self.indices[first : first + size])
            yield (self.images[chosen].float() / 255).numpy()


def expected_outputs(run: RunDir, network: Answers, batch_size: int) -> Reference:
    """Return what an exported file has to answer for the run's test images.

    These are the run's stored predictions. Where a plain pass through the network cannot repeat
    them, they are the answers of `network` itself. Raises Unavailable if the data have changed.
    """
    config, summary, stored = run.read_config(), run.read_summary(), run.read_predictions()
    check_same_data(config.dataset, summary.dataset, run.path)
    images = load_splits(config, "cpu").official_test.images
    expected = Reference(images, stored.indices, stored.logits)
    why = why_stored_differ(config, summary.device)
    if why is None:
        return expected
    fresh = np.concatenate([network(batch) for batch in expected.batches(batch_size)])
    same = int((fresh.argmax(axis=1) == stored.predicted).sum())
    note = (
        f"{why}; the file was compared with a plain pass in PyTorch, whose class is the stored one "
        f"for {same:,} of {len(stored):,} test images"
    )
    return replace(expected, outputs=fresh, source="a plain pass in PyTorch", note=note)


def why_stored_differ(config: RunConfig, device: str) -> str | None:
    """Return why a plain pass on the CPU cannot repeat a run's stored predictions, if it cannot."""
    evaluation = config.evaluation
    if evaluation.views != "one":
        return f"the stored predictions are means over views (evaluation.views={evaluation.views})"
    if evaluation.crop_padding:
        return (
            "the stored predictions are of images cropped at random "
            f"(evaluation.crop_padding={evaluation.crop_padding})"
        )
    if config.precision != "fp32":
        return f"the stored predictions were computed with precision={config.precision}"
    if device != "cpu":
        return f"the stored predictions were computed on {device}, which rounds otherwise"
    return None


def deviation(answers: Answers, expected: Reference, batch_size: int) -> float:
    """Return the largest difference of an output; inf where one of the two is not finite.

    The images come in batches, and the first one alone too: any number of images has to work.
    """
    outputs = np.concatenate([answers(batch) for batch in expected.batches(batch_size)])
    alone = answers(next(expected.batches(1)))
    return max(_distance(outputs, expected.outputs), _distance(alone, expected.outputs[:1]))


def _distance(outputs: Floats, expected: Floats) -> float:
    if outputs.shape != expected.shape:
        return math.inf
    same = (outputs == expected) | (np.isnan(outputs) & np.isnan(expected))
    with np.errstate(invalid="ignore"):  # inf minus inf
        difference = np.abs(outputs.astype(np.float64) - expected)
    largest = float(np.max(difference, where=~same, initial=0.0))
    return largest if math.isfinite(largest) else math.inf
