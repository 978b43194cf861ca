"""A run's network for use elsewhere: ONNX, torch.export and safetensors."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fixtures import Capture, Patch
from tiny_runs import copy_run, make, train

import cifar_lab
from cifar_lab import export
from cifar_lab.exports import formats, safetensors_file
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.build import load_splits

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("convnet", "convnet_deep", "two_branch", "mixed_kernel", "resnet", "airbench_small")
NARROW = {  # as deep as they are, with fewer channels
    "mixed_kernel": ["model.widths=[8,8,16,16,32,32]"],
    "resnet": ["model.width=8"],
}
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in export.PACKAGES["onnx"]),
    reason="the extra export is not installed",
)
needs_safetensors = pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="the extra export is not installed"
)
EACH_FORMAT = [
    pytest.param("onnx", marks=[pytest.mark.slow, needs_onnx]),
    pytest.param("pt2", marks=pytest.mark.slow),
    pytest.param("safetensors", marks=needs_safetensors),
]


@pytest.fixture(scope="module")
def run(tiny_finished: RunDir, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return copy_run(tiny_finished, tmp_path_factory.mktemp("outputs"))


def pixels(run: RunDir) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the test images of the stored predictions as an exported file takes them."""
    images = load_splits(run.read_config(), "cpu").official_test.images[
        run.read_predictions().indices
    ]
    return (images.numpy() / 255).astype(np.float32)


def opened(kind: str, file: Path) -> tuple[Callable[[Any], Any], dict[str, str]]:
    """Return an exported file as a function and its metadata, read as a stranger would."""
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(file)
        metadata = session.get_modelmeta().custom_metadata_map
        return lambda images: session.run(["logits"], {"images": images})[0], metadata
    if kind == "pt2":
        extra = {"metadata.json": ""}
        module = torch.export.load(file, extra_files=extra).module()
        return lambda images: module(torch.from_numpy(images)).detach().numpy(), json.loads(
            extra["metadata.json"]
        )
    from safetensors import safe_open

    with safe_open(file, framework="pt") as archive:
        metadata = archive.metadata()
    network = safetensors_file.load_network(file)
    return lambda images: network(torch.from_numpy(images)).detach().numpy(), metadata


@pytest.mark.parametrize("kind", EACH_FORMAT)
def test_the_file_answers_as_the_run_did_and_says_what_it_is(
    kind: str, run: RunDir, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "exported"
    assert export.main([str(run.path), "--format", kind, "--output", str(output)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    found = re.search(r"largest difference from the stored predictions is ([\d.e-]+)", printed.out)
    assert found is not None
    assert float(found[1]) <= 1e-4
    file = output / "model.safetensors" if kind == "safetensors" else output
    answer, metadata = opened(kind, file)
    images, stored = pixels(run), run.read_predictions().logits
    for count in (1, 3, len(images)):
        assert answer(images[:count]) == pytest.approx(stored[:count], abs=1e-4)
    assert json.loads(metadata["class_names"]) == run.class_names()
    assert metadata["dataset"] == "digits"
    assert metadata["input"].startswith("images: float32 (N, 1, 32, 32)")
    assert metadata["output"] == "logits: float32 (N, 10)"
    for path in (ROOT, run.path.parent, tmp_path):
        assert str(path).encode() not in file.read_bytes()


@needs_safetensors
def test_the_model_card_says_what_one_has_to_know(
    run: RunDir, tmp_path: Path, monkeypatch: Patch
) -> None:
    assert export.main([str(run.path), "--format", "safetensors", "--output", str(tmp_path)]) == 0
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    stored, summary = run.read_predictions(), run.read_summary()
    assert f"| test | 360 | {summary.test_accuracy:.2%}" in card
    assert "| validation | 900 |" in card
    assert "Licence of the images: CC BY 4.0" in card
    for name, counts in zip(run.class_names(), stored.confusion_matrix, strict=True):
        (line,) = [line for line in card.splitlines() if line.startswith(f"| **{name}** ")]
        assert [cell.strip() for cell in line.split("|")][2:-2] == [str(n) for n in counts]
    assert str(tmp_path) not in card
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert snippet is not None
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    exec(snippet[1], variables)
    assert variables["logits"].shape == (5, 10)


@needs_safetensors
def test_a_dataset_of_any_name_has_a_card_that_yaml_reads(finished: RunDir) -> None:
    text = finished.config_file.read_text().replace("name: digits", 'name: "a: [b\\n# c"')
    finished.config_file.write_text(text)
    assert export.main([str(finished.path), "--format", "safetensors"]) == 0
    _, header, text = (finished.path / "safetensors" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header)["datasets"] == ["a: [b\n# c"]
    assert text.count("\n# ") == 1


def test_weights_that_are_not_those_of_the_predictions_are_refused(
    run: RunDir, tmp_path: Path, capsys: Capture
) -> None:
    kept = run.best.read_bytes()
    state = torch.load(run.best, weights_only=True)
    state["model"] = {
        name: tensor * 1.01 if tensor.is_floating_point() else tensor
        for name, tensor in state["model"].items()
    }
    run.write_best(state)
    output = tmp_path / "model.pt2"
    try:
        code = export.main([str(run.path), "--format", "pt2", "--output", str(output)])
    finally:
        run.best.write_bytes(kept)
    assert code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"model.pt2 was not written: its outputs differ by .* more than 0.0001", line)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_kept_unless_it_may_be_overwritten(
    run: RunDir, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "model.pt2"
    output.write_text("mine")
    line = [str(run.path), "--format", "pt2", "--output", str(output)]
    assert export.main(line) == 2
    assert "model.pt2 is in the way; --overwrite" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert export.main([*line, "--overwrite"]) == 0
    answer, _ = opened("pt2", output)
    assert answer(pixels(run)[:2]).shape == (2, 10)


def test_a_run_that_is_not_finished_is_refused(tmp_path: Path, capsys: Capture) -> None:
    queued = make(tmp_path)
    assert export.main([str(queued.path), "--format", "pt2"]) == 2
    assert "is queued; finish it first: python -m cifar_lab.train" in capsys.readouterr().err


def test_predictions_that_a_plain_pass_cannot_repeat_are_reported_and_not_compared(
    tmp_path: Path, capsys: Capture
) -> None:
    made = train(tmp_path, "evaluation.views=mirrored", "training.epochs=1")
    capsys.readouterr()
    assert export.main([str(made.path), "--format", "pt2"]) == 0
    assert (made.path / "model.pt2").is_file()
    assert not list(made.path.glob(".*.tmp"))
    printed = capsys.readouterr().out
    assert "the largest difference from a plain pass in PyTorch is" in printed
    assert re.search(r"views=mirrored.* whose class is the stored one for \d+ of 360", printed)


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("model", MODELS)
def test_onnx_runtime_answers_as_each_model_of_the_reports_did(
    model: str, tmp_path: Path, capsys: Capture
) -> None:
    words = ["dataset=digits", "training.epochs=1", "split.validation=1300", "figures=none"]
    words += ["device=cpu", "threads=1", f"model={model}", *NARROW.get(model, ())]
    made = RunDir(cifar_lab.run(*words, f"output_dir={tmp_path}").path)
    assert export.main([str(made.path), "--format", "onnx"]) == 0
    assert "from the stored predictions is" in capsys.readouterr().out
    answers = formats.load_onnx(made.path / "model.onnx")
    assert answers(pixels(made)) == pytest.approx(made.read_predictions().logits, abs=1e-4)
