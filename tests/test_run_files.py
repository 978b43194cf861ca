"""The files of a run: no user's file is removed, and what was lost is not trained over."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
import torch
from fixtures import Capture, Patch
from test_damages import flip
from test_faults import Killed

from cifar_lab import evaluate, predict
from cifar_lab import train as train_command
from cifar_lab.analysis.resume_proof import differences
from cifar_lab.errors import Unavailable
from cifar_lab.runs import files
from cifar_lab.runs.files import load_checkpoint
from cifar_lab.runs.run_dir import RunDir


def test_rerun_removes_what_the_run_wrote_and_nothing_else(finished: RunDir) -> None:
    notes = {"notes.txt", "figures/mine.png", "predictions_mine.npz", "paper/draft.md", "my.pt"}
    notes |= {".mine.tmp", "figures/.mine.tmp"}  # not the names of our temporary files
    (finished.path / f".config.yaml.{'0' * 16}.tmp").write_text("of a process that was killed")
    for name in notes:
        (finished.path / name).parent.mkdir(exist_ok=True)
        (finished.path / name).write_text("mine")
    with finished.lock():
        finished.discard_results()
    files = {str(p.relative_to(finished.path)) for p in finished.path.rglob("*") if p.is_file()}
    assert files == {"config.yaml", "summary.json", "train.log", ".lock", *notes}
    assert finished.status == "queued"


def test_rerun_gives_the_same_result_again_also_from_a_damaged_summary(
    finished: RunDir, tiny_finished: RunDir, capsys: Capture
) -> None:
    (finished.path / "notes.txt").write_text("mine")
    finished.summary_file.write_text("garbage")
    assert train_command.main([str(finished.path)]) == 1
    assert "rerun=true runs it again" in capsys.readouterr().err
    assert train_command.main([str(finished.path), "rerun=true"]) == 0
    assert differences(finished, tiny_finished) == []
    assert (finished.path / "notes.txt").read_text() == "mine"


def test_rerun_that_is_killed_while_it_removes_starts_from_nothing(
    finished: RunDir, tiny_finished: RunDir, monkeypatch: Patch
) -> None:
    unlink, left = Path.unlink, [5]

    def die(self: Path, missing_ok: bool = False) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", die)
        with finished.lock(), pytest.raises(Killed):
            finished.discard_results()
    assert finished.status == "queued"
    assert finished.predictions_file("test", "scored").exists()
    assert train_command.main([str(finished.path)]) == 0
    assert differences(finished, tiny_finished) == []


def test_nobody_tidies_a_folder_that_is_being_created(
    tmp_path: Path, stopped: RunDir, monkeypatch: Patch
) -> None:
    """The holder of the lock once removed the temporary files of a process that was creating it."""
    config = dataclasses.replace(stopped.read_config(), output_dir=str(tmp_path / "b"))
    sync, refused = files.sync_file, []

    def interrupted(handle: IO[bytes]) -> None:
        (folder,) = (tmp_path / "b").glob("*/*")
        with pytest.raises(Unavailable), RunDir(folder).lock(patience=0):
            pass
        refused.append(folder)
        sync(handle)

    monkeypatch.setattr("cifar_lab.runs.files.sync_file", interrupted)
    run = RunDir.create(config)
    assert len(refused) == 2  # config.yaml and summary.json
    assert run.status == "queued"


def exchange(path: Path) -> None:
    state = load_checkpoint(path)
    state["model"] = {name: torch.zeros_like(tensor) for name, tensor in state["model"].items()}
    torch.save(state, path)


@pytest.mark.parametrize("damage", [Path.unlink, flip, exchange], ids=["lost", "bit", "exchanged"])
def test_a_stopped_run_that_lost_its_best_weights_does_not_go_on(
    damage: Callable[[Path], object], stopped: RunDir, capsys: Capture
) -> None:
    damage(stopped.best)
    assert train_command.main([str(stopped.path), "accept_code=true"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "best.pt" in line
    assert "the best epoch, 1, is lost: rerun=true trains again" in line
    assert stopped.status == "failed"


def test_a_finished_run_that_lost_its_best_weights_is_not_scored_by_the_last(
    finished: RunDir,
) -> None:
    finished.best.unlink()
    picture = str(finished.figures / "pca.png")
    assert evaluate.main([str(finished.path)]) == 1
    assert predict.main([str(finished.path), picture]) == 1
    assert finished.read_summary().scored_weights == "best"
