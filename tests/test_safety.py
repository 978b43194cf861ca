"""A stranger's run folder: reading it runs no code and writes nowhere else.

Checkpoints and arrays that are code, and YAML that explodes in a command, are in test_damages.py.
"""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fixtures import Capture, Patch
from test_damages import Evil
from tiny_runs import make

from cifar_lab import evaluate, train
from cifar_lab.config import targets
from cifar_lab.config.identity import address
from cifar_lab.config.run_config import load
from cifar_lab.errors import UsageError
from cifar_lab.runs.run_dir import RunDir

TARGETS = str.split(
    "os.system builtins.eval builtins.exec subprocess.run torch.load torch.hub.load "
    "torch.hub.load_state_dict_from_url torch.utils.cpp_extension.load_inline "
    "torch.serialization.os.system torch.os.system torch.nn.modules.module.torch.load "
    "torch._dynamo.config.eval torch.nn.Module.load_state_dict torch.Tensor torch "
    "torch.optim.Optimizer.zero_grad cifar_lab.runs.files.write_text "
    "cifar_lab.runs.run_dir.RunDir cifar_lab.training.run.run_experiment "
    "cifar_lab.datasets.download.download cifar_lab.runs.summary.subprocess.run "
    "cifar_lab.config.targets.importlib.import_module cifar_lab.figures.curves.os.system "
    "cifar_lab.train.main cifar_lab..train ..os.system numpy.load pickle.loads "
    "yaml.unsafe_load hydra.utils.instantiate"
)
ROLES = ["model", "activation", "optimizer", "scheduler", "dataset.source", "figures.curves"]


@pytest.fixture
def stranger(finished: RunDir) -> RunDir:
    """A finished run in a folder without a hash: nothing says that it was edited."""
    run = RunDir(finished.path.rename(finished.path.with_name("stranger")))
    edit_summary(run, identity=None)
    return run


def edit_summary(run: RunDir, **changes: Any) -> None:
    summary = json.loads(run.summary_file.read_text())
    run.summary_file.write_text(json.dumps({**summary, **changes}))


def edit(run: RunDir, key: str, value: Any) -> None:
    """Change a setting, given by its dotted key, in config.yaml."""
    data = yaml.safe_load(run.config_file.read_text())
    *parents, name = key.split(".")
    place = data
    for parent in parents:
        place = place[parent]
    place[name] = value
    run.config_file.write_text(yaml.safe_dump(data))


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.name != ".lock"}


@pytest.mark.parametrize("role", ROLES)
def test_no_role_takes_what_is_none_of_its_kind(role: str) -> None:
    for target in ("", *TARGETS):
        with pytest.raises(UsageError):
            targets.resolve(target, role)


@pytest.mark.parametrize(
    ("target", "role", "why"),
    [
        ("torch.nn.Linear", "optimizer", "it is not a torch Optimizer"),
        ("torch.optim.SGD", "model", r"it is not an nn\.Module"),
        ("cifar_lab.figures.curves.draw", "dataset.source", "not a `load` function"),
        ("evil_module.Thing", "model", "is not allowed"),
    ],
)
def test_a_target_of_another_role_is_refused(
    target: str, role: str, why: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit(1)")  # not even imported
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match=why):
        targets.resolve(target, role)


@pytest.mark.parametrize("role", ROLES)
def test_commands_on_a_folder_with_a_hostile_target(
    role: str, stranger: RunDir, capsys: Capture, tmp_path: Path
) -> None:
    marker, code = tmp_path / "evil", tmp_path / "code.pt"
    code.write_bytes(pickle.dumps(Evil(marker)))
    for target, arguments in (
        ("torch.load", {"f": str(code), "weights_only": False}),
        ("os.system", {"command": f"mkdir {marker}"}),
    ):
        edit(stranger, role, {"_target_": target, **arguments})
        assert train.main([str(stranger.path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{role}._target_={target} is not allowed" in line
    if role not in ("optimizer", "scheduler"):  # which evaluation does not build
        assert evaluate.main([str(stranger.path)]) == (0 if "figures" in role else 2)
        assert "is not allowed" in capsys.readouterr().err
    assert not marker.exists()


NAMES = {
    "training.best_file_name": (
        *("../evil.pt", "/etc/evil.pt", "..\\evil.pt", "config.yaml", "summary.json", ".lock"),
        *("last.pt", "best.pt", "{model.__class__}.pt", "{model!r}.pt", "{acc:1000000000}.pt"),
        *("{0}.pt", "{}.pt", "{evil}.pt", "{acc", "a\x00.pt", "x" * 300 + ".pt"),
    ),
    "output_dir": ("a\x00b", "", "  ", "a\nb"),
    "name": ("../up", "/abs", "a/../../b", "..", ".", "a//b", "~"),
}


@pytest.mark.parametrize("key", NAMES)
def test_a_name_that_leads_out_of_its_folder(key: str, stranger: RunDir) -> None:
    for name in NAMES[key]:
        edit(stranger, key, name)
        with pytest.raises(UsageError, match=f"{key}="):
            load(stranger.config_file)


def test_choices_and_dataset_names_stay_one_folder_name(stranger: RunDir) -> None:
    edit(stranger, "dataset.name", "../../etc")
    edit(stranger, "choices", {"model": "/../../x", "optimizer": "\x00", "activation": "é" * 300})
    path = address(load(stranger.config_file))
    assert path.parent.name == "runs"
    assert "/" not in path.name
    assert len(path.name.encode()) < 255


@pytest.mark.parametrize("name", ["../../pwned", "/tmp/pwned", "..", ".hidden", "", "a\nb"])
def test_a_figure_that_leads_out_of_the_folder_is_refused(
    name: str, stranger: RunDir, capsys: Capture
) -> None:
    edit(stranger, "figures", {name: {"_target_": "cifar_lab.figures.curves.draw"}})
    before = files_below(stranger.path.parents[2])
    for command in (evaluate.main, train.main):
        assert command([str(stranger.path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "a figure has a file name" in line
    assert files_below(stranger.path.parents[2]) == before


def test_rerun_removes_no_figure_outside_that_a_summary_names(
    finished: RunDir, tmp_path: Path
) -> None:
    victim = tmp_path / "victim.png"
    victim.write_text("gold")
    stem = victim.with_suffix("")
    edit_summary(finished, figures=[str(stem), os.path.relpath(stem, finished.figures)])
    with finished.lock():
        finished.discard_results()
    assert victim.read_text() == "gold"


def test_no_name_in_a_folder_moves_the_cursor(stranger: RunDir, capsys: Capture) -> None:
    edit(stranger, "dataset.display_names", [f"\x1b[2J{i}\nx" for i in range(10)])
    folder = str(stranger.path.rename(stranger.path.with_name("\x1b[31m\x9b\x07")))
    assert evaluate.main([folder, "--probabilities", "1"]) == 0
    said = capsys.readouterr()
    assert not set("\x1b\x9b\x07") & set(said.out + said.err)


@pytest.fixture
def gold(tmp_path: Path) -> Path:
    """A file outside of the run folder, which stays as it is."""
    path = tmp_path / "gold"
    path.write_text("gold")
    return path


def test_links_out_of_the_folder_are_replaced_not_followed(stranger: RunDir, gold: Path) -> None:
    """Files of ours that are links, and links with the names of temporary files."""
    results = [stranger.predictions_file("test", "scored"), stranger.report_text]
    results += [stranger.report_json, stranger.samples_file]
    for path in results:
        path.unlink()
        path.symlink_to(gold)
    for name in ("samples.npz", "predictions.npz", "summary.json", "config.yaml"):
        (stranger.path / f".{name}.{os.getpid()}.tmp").symlink_to(gold)
    pictures = gold.parent / "pictures"
    pictures.mkdir()
    (pictures / "pca.png").symlink_to(gold)
    assert evaluate.main([str(stranger.path), "--side-by-side", str(pictures)]) == 0
    assert gold.read_text() == "gold"
    assert not any(path.is_symlink() for path in (*results, pictures / "pca.png"))


@pytest.mark.parametrize("name", ["train.log", "metrics.csv", "steps.csv", ".lock", "figures"])
def test_files_that_grow_are_not_followed_out_of_the_folder(
    name: str, tmp_path: Path, gold: Path, capsys: Capture
) -> None:
    run = make(tmp_path / "out", "training.epochs=1", "training.step_history=true")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(elsewhere if name == "figures" else gold)
    assert train.main([str(run.path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name} is a symbolic link" in line
    assert list(elsewhere.iterdir()) == []
    assert gold.read_text() == "gold"


def test_the_one_place_that_writes_refuses_other_folders(finished: RunDir, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (finished.path / "link").symlink_to(elsewhere)
    writes: list[Callable[[], object]] = [
        lambda: finished.write_best({"model": {}}, "../evil.pt"),
        lambda: finished.write_arrays(elsewhere / "x.npz", x=np.ones(1)),
        lambda: finished.write_arrays(finished.path / ".." / "x.npz", x=np.ones(1)),
        lambda: finished.write_arrays(finished.path / "link" / "x.npz", x=np.ones(1)),
    ]
    for write in writes:
        with pytest.raises(UsageError, match="not inside the run's folder"):
            write()
    assert not list(elsewhere.iterdir())
