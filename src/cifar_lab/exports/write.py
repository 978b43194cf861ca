"""Write a run's network in one of the formats; a file gets its name after it was checked."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import RunFailed, first_line
from cifar_lab.exports.formats import FORMATS, Answers, Floats, answers_of
from cifar_lab.exports.network import load_network, metadata
from cifar_lab.runs.files import replacing
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.build import check_same_data, load_splits
from cifar_lab.training.sanity_checks import sum_to_one

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
    """Return the largest difference of an output; NaN and inf differ from all but themselves.

    The images come in batches, and the first one alone too: any number of images has to work.
    """
    outputs = np.concatenate([answers(batch) for batch in expected.batches(batch_size)])
    alone = answers(next(expected.batches(1)))
    pairs = ((outputs, expected.outputs), (alone, expected.outputs[:1]))
    return max(float(np.abs(_finite(a) - _finite(b)).max()) for a, b in pairs)


def _finite(outputs: Floats) -> npt.NDArray[np.float64]:
    return np.nan_to_num(outputs.astype(np.float64), nan=2e300, posinf=1e300, neginf=-1e300)


def export(run: RunDir, kind: str, path: Path) -> tuple[str, Reference, float]:
    """Write a finished run's network to a file, replacing one that is there.

    Returns what its output is (logits or probabilities), the outputs that were expected, and the
    largest difference from them. Raises RunFailed, and writes nothing, if the model cannot be
    exported or if the difference is above TOLERANCE.
    """
    config, (write, load) = run.read_config(), FORMATS[kind]
    network = load_network(run)
    size = config.evaluation.batch_size
    expected = expected_outputs(run, answers_of(network), size)
    is_softmax = sum_to_one(torch.from_numpy(expected.outputs))
    output = "probabilities" if is_softmax else "logits"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as handle:
        try:
            handle.write(write(network, config.dataset.image_shape, metadata(run, output)))
            handle.flush()
            answers = load(Path(handle.name))
        except OSError:
            raise
        except Exception as error:  # exporters fail in many ways on a model that they do not know
            raise RunFailed(
                f"{run.path} cannot be exported to {kind}: {first_line(error)}"
            ) from error
        largest = deviation(answers, expected, size)
        if largest > TOLERANCE:
            raise RunFailed(
                f"{path} was not written: its outputs differ by {largest:.2g} from "
                f"{expected.source}, more than {TOLERANCE:g}"
            )
    return output, expected, largest
