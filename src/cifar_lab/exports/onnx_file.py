"""An ONNX file, for ONNX Runtime and other programs that read ONNX."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import nn

from cifar_lab.exports.network import Answers, Floats, trace


def write(
    network: nn.Module, image_shape: Sequence[int], facts: Mapping[str, str], handle: IO[bytes]
) -> None:
    """Write the network with the input `images` and the output that the facts name."""
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
    handle.write(model.SerializeToString())


def load(path: Path) -> Answers:
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
