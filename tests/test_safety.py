"""A stranger's run folder: reading it runs no code and writes nowhere else."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_runs import make
from tiny_runs import train as trained

from cifar_lab import evaluate, train
from cifar_lab.config import targets
from cifar_lab.config.identity import address
from cifar_lab.config.run_config import load
from cifar_lab.errors import Damaged, UsageError
from cifar_lab.runs.run_dir import RunDir


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.marker),))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return trained(tmp_path_factory.mktemp("original"), "training.epochs=1")


@pytest.fixture
def stranger(original: RunDir, tmp_path: Path) -> RunDir:
    """A copy of a run in a folder without a hash: nothing says that it was edited."""
    folder = tmp_path / "runs" / "stranger"
    folder.mkdir(parents=True)
    for path in original.path.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    summary = json.loads((folder / "summary.json").read_text())
    del summary["identity"]
    (folder / "summary.json").write_text(json.dumps(summary))
    return RunDir(folder)


def edit(run: RunDir, change: Callable[[dict[str, Any]], None]) -> None:
    data = yaml.safe_load(run.config_file.read_text())
    change(data)
    run.config_file.write_text(yaml.safe_dump(data))


def put(role: str, target: str, **arguments: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        *parents, name = role.split(".")
        place = data
        for parent in parents:
            place = place[parent]
        place[name] = {"_target_": target, **arguments}

    return change


TARGETS = [
    "os.system",
    "builtins.eval",
    "builtins.exec",
    "subprocess.run",
    "torch.load",
    "torch.hub.load",
    "torch.hub.load_state_dict_from_url",
    "torch.utils.cpp_extension.load_inline",
    "torch.serialization.os.system",
    "torch.os.system",
    "torch.nn.modules.module.torch.load",
    "torch._dynamo.config.eval",
    "torch.nn.Module.load_state_dict",
    "torch.Tensor",
    "torch.optim.Optimizer.zero_grad",
    "cifar_lab.runs.atomic_io.write_text",
    "cifar_lab.runs.run_dir.RunDir",
    "cifar_lab.training.run.run_experiment",
    "cifar_lab.datasets.download.download",
    "cifar_lab.runs.provenance.subprocess.run",
    "cifar_lab.config.targets.importlib.import_module",
    "cifar_lab.figures.curves.os.system",
    "cifar_lab.train.main",
    "cifar_lab..train",
    "..os.system",
    "",
    "torch",
    "numpy.load",
    "pickle.loads",
    "yaml.unsafe_load",
    "hydra.utils.instantiate",
]
ROLES = [
    "model",
    "activation",
    "optimizer",
    "scheduler",
    "dataset.source",
    "figures.curves",
]


@pytest.mark.parametrize("target", TARGETS)
def test_no_role_takes_what_is_none_of_its_kind(target: str) -> None:
    for role in ROLES:
        with pytest.raises(UsageError):
            targets.resolve(target, role)


def test_a_target_of_another_role_is_refused() -> None:
    with pytest.raises(UsageError, match="it is not a torch Optimizer"):
        targets.resolve("torch.nn.Linear", "optimizer")
    with pytest.raises(UsageError, match=r"it is not an nn\.Module"):
        targets.resolve("torch.optim.SGD", "model")
    with pytest.raises(UsageError, match="not a `load` function"):
        targets.resolve("cifar_lab.figures.curves.draw", "dataset.source")


def test_a_refused_target_is_not_even_imported(tmp_path: Path) -> None:
    module = tmp_path / "evil_module.py"
    module.write_text("raise SystemExit(1)")
    with pytest.raises(UsageError, match="is not allowed"):
        targets.resolve("evil_module.Thing", "model")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("target", ["os.system", "torch.load"])
def test_commands_on_a_folder_with_a_hostile_target(
    role: str, target: str, stranger: RunDir, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    marker, code = tmp_path / "evil", tmp_path / "code.pt"
    code.write_bytes(pickle.dumps(Evil(marker)))
    arguments: dict[str, dict[str, Any]] = {
        "os.system": {"command": f"mkdir {marker}"},
        "torch.load": {"f": str(code), "weights_only": False},
    }
    edit(stranger, put(role, target, **arguments[target]))
    assert train.main([str(stranger.path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{role}._target_={target} is not allowed" in line
    # evaluation builds no optimizer and no schedule, and draws what it may
    refused = role in ("model", "activation", "dataset.source")
    assert evaluate.main([str(stranger.path)]) == (2 if refused else 0)
    assert ("is not allowed" in capsys.readouterr().err) == (refused or "figures" in role)
    assert not marker.exists()


def test_a_hostile_figure_is_not_drawn(stranger: RunDir) -> None:
    from cifar_lab.training.scoring import draw_figures

    edit(stranger, put("figures.curves", "os.system", command=f"touch {stranger.path}/evil"))
    _, (warning,) = draw_figures(stranger)
    assert "is not allowed" in warning
    assert not (stranger.path / "evil").exists()


@pytest.mark.parametrize(
    "name",
    [
        "../evil.pt",
        "/etc/evil.pt",
        "..\\evil.pt",
        "config.yaml",
        "summary.json",
        ".lock",
        "last.pt",
        "best.pt",
        "{model.__class__}.pt",
        "{model!r}.pt",
        "{acc:1000000000}.pt",
        "{0}.pt",
        "{}.pt",
        "{evil}.pt",
        "{acc",
        "a\x00.pt",
        "x" * 300 + ".pt",
    ],
)
def test_a_second_name_of_best_that_leads_elsewhere(name: str, stranger: RunDir) -> None:
    edit(stranger, lambda data: data["training"].update(best_file_name=name))
    with pytest.raises(UsageError, match=r"training\.best_file_name="):
        load(stranger.config_file)


@pytest.mark.parametrize("folder", ["a\x00b", "x" * 300, "", "  ", "a\nb"])
def test_an_output_folder_that_no_file_system_takes(folder: str, stranger: RunDir) -> None:
    edit(stranger, lambda data: data.update(output_dir=folder))
    with pytest.raises(UsageError, match="output_dir="):
        load(stranger.config_file)


@pytest.mark.parametrize("name", ["../up", "/abs", "a/../../b", "..", ".", "a//b", "~"])
def test_a_name_that_leads_out_of_the_output_folder(name: str, stranger: RunDir) -> None:
    edit(stranger, lambda data: data.update(name=name))
    with pytest.raises(UsageError, match="name="):
        load(stranger.config_file)


def test_choices_and_dataset_names_stay_one_folder_name(stranger: RunDir) -> None:
    def change(data: dict[str, Any]) -> None:
        data["dataset"]["name"] = "../../etc"
        data["choices"] = {"model": "/../../x", "optimizer": "\x00", "activation": "é" * 300}

    edit(stranger, change)
    found = address(load(stranger.config_file))
    assert found.parent.name == "runs"
    assert "/" not in found.name
    assert len(found.name.encode()) < 255


@pytest.mark.parametrize("source", ["/etc", "/etc/passwd", "nowhere", "../..", "a\x00b"])
def test_training_on_from_what_is_no_run(
    source: str, stranger: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(stranger, lambda data: data.update(continue_from=source))
    assert train.main([str(stranger.path), "training.epochs=3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Traceback" not in line


@pytest.mark.parametrize("how", ["plain pickle", "torch zip"])
@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_a_checkpoint_that_is_code(
    how: str, name: str, stranger: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = stranger.path / "evil"
    content = {"format": 1, "model": Evil(marker)}
    buffer = io.BytesIO()
    if how == "plain pickle":
        pickle.dump(content, buffer)
    else:
        torch.save(content, buffer)
    (stranger.path / name).write_bytes(buffer.getvalue())
    assert evaluate.main([str(stranger.path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name} is damaged" in line
    assert not marker.exists()


def test_arrays_that_are_code(stranger: RunDir) -> None:
    marker = stranger.path / "evil"
    path = stranger.predictions_file("test", "scored")
    with path.open("wb") as handle:
        np.savez(handle, logits=np.array([Evil(marker)], dtype=object), allow_pickle=True)
    with pytest.raises(Damaged, match="damaged"):
        stranger.read_predictions()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("logits.npy", pickle.dumps(Evil(marker)))
    with pytest.raises(Damaged):
        stranger.read_predictions()
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip", b"\x93NUMPY"])
def test_arrays_that_are_none(content: bytes, stranger: RunDir) -> None:
    stranger.predictions_file("test", "scored").write_bytes(content)
    with pytest.raises(Damaged):
        stranger.read_predictions()


def test_links_out_of_the_folder_are_replaced_not_followed(
    stranger: RunDir, tmp_path: Path
) -> None:
    """Files of ours that are links: what they point to stays as it is."""
    treasure = tmp_path / "treasure"
    treasure.write_text("gold")
    for path in (
        stranger.predictions_file("test", "scored"),
        stranger.report_text,
        stranger.report_json,
        stranger.samples_file,
    ):
        path.unlink()
        path.symlink_to(treasure)
    assert evaluate.main([str(stranger.path)]) == 0
    assert treasure.read_text() == "gold"
    assert not stranger.report_text.is_symlink()


@pytest.mark.parametrize("name", ["train.log", "metrics.csv", "steps.csv", ".lock", "figures"])
def test_files_that_grow_are_not_followed_out_of_the_folder(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path / "out", "training.epochs=1", "training.step_history=true")
    treasure = tmp_path / "treasure"
    if name == "figures":
        treasure.mkdir()
    else:
        treasure.write_text("gold")
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(treasure)
    assert train.main([str(run.path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name} is a symbolic link" in line
    if name == "figures":
        assert list(treasure.iterdir()) == []
    else:
        assert treasure.read_text() == "gold"


def test_a_run_folder_that_is_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").mkdir()
    assert train.main([str(tmp_path)]) == 2
    assert evaluate.main([str(tmp_path)]) == 2
    assert evaluate.main([str(tmp_path / "nowhere")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: &d [*c,*c]\ne: &e [*d,*d]\nf: [*e,*e]",
        "a: &a [*a]",
        "[" * 5000,
        "seed: " + "9" * 5000,
        "seed: 2020-01-01",
        "? [a, b]\n: c",
    ],
)
def test_yaml_that_explodes(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UsageError):
        load(path)


def test_a_summary_with_a_script_is_text(stranger: RunDir) -> None:
    data = json.loads(stranger.summary_file.read_text())
    data["choices"] = {"model": "<script>alert(1)</script>"}
    data["error"] = "| a | **b**"
    stranger.summary_file.write_text(json.dumps(data))
    assert stranger.read_summary().choices["model"].startswith("<script>")
    data["test_accuracy"] = "<script>"
    stranger.summary_file.write_text(json.dumps(data))
    with pytest.raises(Damaged, match="test_accuracy"):
        stranger.read_summary()
