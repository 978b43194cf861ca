"""`train RUN_DIR` means that folder: the run continues there, wherever it lies."""

import shutil
from pathlib import Path

import pytest
from fixtures import Capture, Patch
from tiny_runs import at_yield

from cifar_lab import train
from cifar_lab.runs.run_dir import RunDir


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: Patch) -> None:
    """The working directory is another folder."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


def folders(tmp_path: Path) -> set[Path]:
    return {path.parent.resolve() for path in tmp_path.rglob("config.yaml")}


@pytest.mark.parametrize("name", ["backup-20261125", "lr=0.1"])  # no run's hash
def test_a_moved_run_continues_where_it_lies(
    name: str, stopped: RunDir, tmp_path: Path, capsys: Capture
) -> None:
    moved = tmp_path / "new" / name
    moved.parent.mkdir()
    stopped.path.rename(moved)
    assert train.main([str(moved)]) == 0
    assert "resumed at epoch 2" in capsys.readouterr().out
    assert RunDir(moved).status == "finished"
    assert folders(tmp_path) == {moved}


def test_a_run_that_is_moved_while_it_trains_says_so_and_continues_where_it_lies(
    stopped: RunDir, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    moved = tmp_path / "moved"
    with monkeypatch.context() as patch:
        at_yield(patch, 3, lambda: shutil.move(stopped.path, moved))
        assert train.main([str(stopped.path)]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line == f"cifar_lab: {stopped.path} was moved or removed while it was running"
    assert train.main([str(moved)]) == 0
    assert "resumed at epoch 2" in capsys.readouterr().out
    assert folders(tmp_path) == {moved}


def test_a_relative_folder_and_settings_beside_the_address_mean_the_folder_too(
    stopped: RunDir, tmp_path: Path, capsys: Capture
) -> None:
    relative = Path("..") / stopped.path.relative_to(tmp_path)
    assert train.main([str(relative), "plan=true"]) == 0
    assert str(relative) in capsys.readouterr().out
    settings = ["jobs=1", "accept_code=true", "training.checkpoint_minutes=1"]
    assert train.main([str(relative), *settings]) == 0
    assert "resumed at epoch 2" in capsys.readouterr().out
    assert "checkpoint_minutes: 1.0" in stopped.config_file.read_text()
    assert folders(tmp_path) == {stopped.path}


@pytest.mark.parametrize("change", ["seed=1", "output_dir=here"])
def test_with_changes_it_is_another_run_and_says_so(
    change: str, stopped: RunDir, tmp_path: Path, capsys: Capture
) -> None:
    line = [str(stopped.path), change, "training.print_every=null", "training.epochs=0"]
    assert train.main([*line, "plan=true"]) == 0
    said = f"{stopped.path}: with these changes it is another run, in "
    assert said in capsys.readouterr().out
    assert folders(tmp_path) == {stopped.path}
    assert train.main(line) == 0
    out = capsys.readouterr().out
    assert out.startswith(said)
    assert "resumed" not in out
    assert stopped.status == "interrupted"
    (other,) = folders(tmp_path) - {stopped.path}
    assert str(other).endswith(out.splitlines()[0].removeprefix(said))
    assert RunDir(other).status == "finished"
