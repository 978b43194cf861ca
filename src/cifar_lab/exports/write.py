"""Write a run's network in one of the formats; a file gets its name after it was checked."""

from dataclasses import dataclass
from pathlib import Path

import torch

from cifar_lab.errors import RunFailed, first_line
from cifar_lab.exports import onnx_file, pt2_file, safetensors_file
from cifar_lab.exports.check import TOLERANCE, Reference, deviation, expected_outputs
from cifar_lab.exports.network import Format, answers_of, load_network, metadata
from cifar_lab.runs.files import replacing
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.sanity_checks import sum_to_one

FORMATS: dict[str, Format] = {
    "onnx": onnx_file,
    "pt2": pt2_file,
    "safetensors": safetensors_file,
}


@dataclass(frozen=True)
class Exported:
    """What was written: `output` is logits or probabilities, `deviation` the largest difference
    from the `expected` outputs.
    """

    output: str
    expected: Reference
    deviation: float


def export(run: RunDir, kind: str, path: Path) -> Exported:
    """Write a finished run's network to a file, replacing one that is there.

    Raises RunFailed, and writes nothing, if the model cannot be exported or if the outputs of the
    file differ by more than TOLERANCE from the expected ones.
    """
    config, module = run.read_config(), FORMATS[kind]
    network = load_network(run)
    size = config.evaluation.batch_size
    expected = expected_outputs(run, answers_of(network), size)
    is_softmax = sum_to_one(torch.from_numpy(expected.outputs))
    output = "probabilities" if is_softmax else "logits"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as handle:
        try:
            module.write(network, config.dataset.image_shape, metadata(run, output), handle)
            handle.flush()
            answers = module.load(Path(handle.name))
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
    return Exported(output, expected, largest)
