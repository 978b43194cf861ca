"""`train RUN_DIR` means that folder: the run continues there, wherever it lies."""

import shutil
from pathlib import Path

import pytest
from tiny_runs import StopAt, at_yield, every_step, make

from cifar_lab import train
from cifar_lab.errors import Stopped
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.run import run_experiment


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run that was stopped in its second epoch; the working directory is another folder."""
    run = make(tmp_path / "old", "training.print_every=1")
    every_step(monkeypatch)
    with pytest.raises(Stopped):
        run_experiment(run, stop=StopAt(24))
    assert run.status == "interrupted"
    assert len(run.read_metrics()) == 1
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return run


def move(folder: Path, to: Path) -> None:
    folder.rename(to)


def folders(tmp_path: Path) -> set[Path]:
    return {path.parent.resolve() for path in tmp_path.rglob("config.yaml")}


@pytest.mark.parametrize("name", ["same", "my run", "backup-20261125"])  # not a run's hash
def test_a_moved_run_continues_where_it_lies(
    name: str, stopped: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "new" / (stopped.path.name if name == "same" else name)
    moved.parent.mkdir()
    shutil.move(stopped.path, moved)
    assert train.main([str(moved)]) == 0
    assert "resumed at epoch 2" in capsys.readouterr().out
    assert RunDir(moved).status == "finished"
    assert folders(tmp_path) == {moved}


def test_a_run_that_is_moved_while_it_trains_says_so_and_continues_where_it_lies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, moved = make(tmp_path / "old", "training.epochs=3"), tmp_path / "moved"
    every_step(monkeypatch)
    with monkeypatch.context() as patch:
        at_yield(patch, 24, lambda: move(run.path, moved))
        assert train.main([str(run.path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"cifar_lab: {run.path} was moved or removed while it was running"
    assert train.main([str(moved)]) == 0
    assert "resumed at epoch 2" in capsys.readouterr().out
    assert folders(tmp_path) == {moved}


def test_a_second_folder_is_refused(stopped: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([str(stopped.path), "."]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "cifar_lab: . is wrong: after the folder of one run only KEY=VALUE may follow"


def test_a_relative_folder_and_launch_options_mean_the_folder_too(
    stopped: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    relative = Path("..") / stopped.path.relative_to(tmp_path)
    assert train.main([str(relative), "plan=true"]) == 0
    assert str(relative) in capsys.readouterr().out
    assert train.main([str(relative), "jobs=1", "accept_code=true"]) == 0
    assert "resumed at epoch 2" in capsys.readouterr().out
    assert train.main([str(relative), "rerun=true"]) == 0
    assert "resumed" not in capsys.readouterr().out
    assert folders(tmp_path) == {stopped.path}


def test_a_setting_that_changes_no_result_is_taken_into_the_folder(
    stopped: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([str(stopped.path), "training.checkpoint_minutes=1"]) == 0
    assert "resumed at epoch 2" in capsys.readouterr().out
    assert stopped.read_config().training.checkpoint_minutes == 1
    assert folders(tmp_path) == {stopped.path}


@pytest.mark.parametrize("change", ["seed=1", "output_dir=here"])
def test_with_changes_it_is_another_run_and_says_so(
    change: str, stopped: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [str(stopped.path), change, "training.print_every=null"]
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


def test_a_folder_whose_name_has_an_equals_sign(
    stopped: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "lr=0.1"
    shutil.move(stopped.path, moved)
    assert train.main([str(moved)]) == 0
    assert "resumed at epoch 2" in capsys.readouterr().out
