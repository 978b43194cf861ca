"""The formats: a function that returns the content of a file, and one that opens a written file."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cifar_lab.exports import safetensors_file

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


def load_pt2(path: Path) -> Answers:
    """Return the file as a function of arrays."""
    with path.open("rb") as handle:
        return answers_of(torch.export.load(handle).module())


def load_safetensors(path: Path) -> Answers:
    """Return the file as a function of arrays."""
    return answers_of(safetensors_file.load_network(path))


FORMATS: dict[str, tuple[Write, Callable[[Path], Answers]]] = {
    "onnx": (write_onnx, load_onnx),
    "pt2": (write_pt2, load_pt2),
    "safetensors": (safetensors_file.write, load_safetensors),
}
