"""The formats: what writes a run's network and opens a written file; a file gets its name last."""

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cifar_lab.errors import RunFailed, first_line
from cifar_lab.exports import safetensors_file
from cifar_lab.exports.network import load_network, metadata
from cifar_lab.runs.files import replacing
from cifar_lab.runs.metrics import are_probabilities
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.build import check_same_data, load_splits

Floats = npt.NDArray[np.float32]
Answers = Callable[[Floats], Floats]
"""From images in [0, 1], float32 (N, C, H, W), to outputs (N, classes)."""

Write = Callable[[nn.Module, Sequence[int], Mapping[str, str]], bytes]
"""From a network, the shape of an image, and facts for the metadata, to a file's content."""


def trace(network: nn.Module, image_shape: Sequence[int]) -> torch.export.ExportedProgram:
    """Return the network as a graph that takes any number of images.

    Raises whatever torch.export raises for a model that it cannot trace.
    """
    example = torch.zeros(2, *image_shape)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # has the paths of this installation
    return program


def answers_of(network: nn.Module) -> Answers:
    """Return the network as a function of arrays."""

    def answer(images: Floats) -> Floats:
        with torch.inference_mode():
            outputs: Floats = network(torch.from_numpy(images)).numpy()
        return outputs

    return answer


def write_onnx(network: nn.Module, image_shape: Sequence[int], facts: Mapping[str, str]) -> bytes:
    """Return an ONNX file with the input `images` and the output that the facts name."""
    import onnx

    exported = torch.onnx.export(
        trace(network, image_shape),
        input_names=["images"],
        output_names=[facts["output"].partition(":")[0]],
        dynamo=True,
        verbose=False,
    )
    assert exported is not None
    model = exported.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # the exporter's own notes, longer than the graph
    onnx.helper.set_model_props(model, dict(facts))
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def load_onnx(path: Path) -> Answers:
    """Return the file as a function of arrays, computed by ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        path.read_bytes(), options, providers=["CPUExecutionProvider"]
    )

    def answer(images: Floats) -> Floats:
        outputs: Floats = session.run(None, {"images": images})[0]
        return outputs

    return answer


def write_pt2(network: nn.Module, image_shape: Sequence[int], facts: Mapping[str, str]) -> bytes:
    """Return a file of torch.export, with the facts as its extra file `metadata.json`."""
    text = json.dumps(dict(facts), indent=2, ensure_ascii=False)
    content = io.BytesIO()
    torch.export.save(trace(network, image_shape), content, extra_files={"metadata.json": text})
    return content.getvalue()


FORMATS: dict[str, tuple[Write, Callable[[Path], Answers]]] = {
    "onnx": (write_onnx, load_onnx),
    "pt2": (
        write_pt2,
        lambda path: answers_of(torch.export.load(io.BytesIO(path.read_bytes())).module()),
    ),
    "safetensors": (
        safetensors_file.write,
        lambda path: answers_of(safetensors_file.load_network(path)),
    ),
}


# --- a file that was written, beside the network --------------------------------------------------

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
    evaluation, device = config.evaluation, summary.device
    reasons = (
        (evaluation.views != "one", f"are means over views (evaluation.views={evaluation.views})"),
        (
            evaluation.crop_padding > 0,
            f"are of images cropped at random (evaluation.crop_padding={evaluation.crop_padding})",
        ),
        (config.precision != "fp32", f"were computed with precision={config.precision}"),
        (device != "cpu", f"were computed on {device}, which rounds otherwise"),
    )
    why = next((why for is_so, why in reasons if is_so), None)
    if why is None:
        return expected
    fresh = np.concatenate([network(batch) for batch in expected.batches(batch_size)])
    same = int((fresh.argmax(axis=1) == stored.predicted).sum())
    note = (
        f"the stored predictions {why}; the file was compared with a plain pass in PyTorch, whose "
        f"class is the stored one for {same:,} of {len(stored):,} test images"
    )
    return replace(expected, outputs=fresh, source="a plain pass in PyTorch", note=note)


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
    output = "probabilities" if are_probabilities(expected.outputs) else "logits"
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
