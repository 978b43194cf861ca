"""The files of a run: no user's file is removed, nothing is written outside, damage is reported.

Every damage is answered by one line and exit code 1 or 2, without waiting or a traceback.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
import yaml
from tiny_runs import TINY, StopAt, make, train

from cifar_lab import evaluate, predict, summarize
from cifar_lab import train as train_command
from cifar_lab.analysis.run_differences import differences
from cifar_lab.errors import Damaged, Stopped, Unavailable, UsageError
from cifar_lab.runs import atomic_io, run_dir
from cifar_lab.runs.checkpoints import load_checkpoint
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.run import run_experiment

FIGURES = (
    "figures=embeddings",
    "figures.tsne=null",
    "training.best_file_name='{model}-{epoch}.pt'",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return train(tmp_path_factory.mktemp("finished"), *FIGURES, "training.step_history=true")


@pytest.fixture
def run(finished: RunDir, tmp_path: Path) -> RunDir:
    """A copy of a finished run, which a test may damage."""
    folder = tmp_path / "outputs" / finished.path.parent.name / finished.path.name
    shutil.copytree(finished.path, folder)
    run = RunDir(folder)
    there = run.config_file.read_text().replace(
        str(finished.path.parents[1]), str(tmp_path / "outputs")
    )
    run.config_file.write_text(there)
    return run


# --- rerun=true ----------------------------------------------------------------------------------


def test_rerun_removes_what_the_run_wrote_and_nothing_else(run: RunDir) -> None:
    notes = {"notes.txt", "figures/mine.png", "predictions_mine.npz", "paper/draft.md", "my.pt"}
    notes |= {".mine.tmp", "figures/.mine.tmp"}  # not the names of our temporary files
    (run.path / f".config.yaml.{'0' * 16}.tmp").write_text("of a process that was killed")
    for name in notes:
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_text("mine")
    with run.lock():
        run.discard_results()
    left = {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}
    assert left == {"config.yaml", "summary.json", "train.log", ".lock", *notes}
    assert run.status == "queued"


def test_rerun_gives_the_same_result_again(run: RunDir, finished: RunDir) -> None:
    (run.path / "notes.txt").write_text("mine")
    run_experiment(run, rerun=True)
    assert differences(run, finished) == []
    assert (run.path / "notes.txt").read_text() == "mine"


def files_of(run: RunDir) -> set[str]:
    return {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("number", range(0, 16, 3))
def test_rerun_that_fails_while_it_removes_leaves_the_result_whole(
    number: int, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, replace, left = files_of(run), Path.replace, [number]

    def fail_once(self: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] == -1:
            raise PermissionError(13, "Permission denied", str(self))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_once)
    with pytest.raises(PermissionError), run.lock():
        run.discard_results()
    assert files_of(run) == before
    assert run.status == "finished"


def test_rerun_that_is_killed_while_it_removes_leaves_the_result_whole(run: RunDir) -> None:
    before = files_of(run)
    code = (
        "import os, pathlib, sys\n"
        "from cifar_lab.runs.run_dir import RunDir\n"
        "replace, moves = pathlib.Path.replace, []\n"
        "def dying(self, target):\n"
        "    moves.append(target)\n"
        "    if len(moves) == 6: os.kill(os.getpid(), 9)\n"
        "    return replace(self, target)\n"
        "pathlib.Path.replace = dying\n"
        "run = RunDir(sys.argv[1])\n"
        "with run.lock(): run.discard_results()\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(run.path)]).returncode == -9
    assert files_of(run) != before
    with run.lock():  # whoever comes next
        pass
    assert files_of(run) == before
    assert run.status == "finished"


def test_a_second_name_of_best_takes_no_file_of_the_user_along(run: RunDir) -> None:
    text = run.config_file.read_text()
    run.config_file.write_text(text.replace("'{model}-{epoch}.pt'", "'{model}.pt'", 1))
    (run.path / "mine.pt").write_text("mine")
    (run.path / "ConvNet.pt").write_bytes(run.best.read_bytes())
    with run.lock():
        run.discard_results()
    assert (run.path / "mine.pt").read_text() == "mine"
    assert not (run.path / "ConvNet.pt").exists()
    assert run.status == "queued"


@pytest.mark.parametrize("many", [[], ["seed=0", "-m"]])
def test_rerun_is_the_remedy_for_a_damaged_summary(
    many: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path, "training.epochs=0")
    run.summary_file.write_text("garbage")
    line = [*TINY, "training.epochs=0", f"output_dir={tmp_path}", *many]
    assert train_command.main(line) == 1
    said = capsys.readouterr()
    assert "rerun=true runs it again" in said.out + said.err
    assert train_command.main([*line, "rerun=true"]) == 0
    assert run.status == "finished"


# --- paths that lead out of the folder -----------------------------------------------------------


def set_figures(run: RunDir, name: str) -> None:
    data = yaml.safe_load(run.config_file.read_text())
    data["figures"] = {name: {"_target_": "cifar_lab.figures.curves.draw"}}
    run.config_file.write_text(yaml.safe_dump(data))


@pytest.mark.parametrize("name", ["../../pwned", "/tmp/pwned", "a/b", "..", ".hidden", "", "a\nb"])
@pytest.mark.parametrize("command", [evaluate.main, train_command.main])
def test_a_figure_that_leads_out_of_the_folder_is_refused(
    command: Callable[[list[str]], int], name: str, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    set_figures(run, name)
    before = {path for path in run.path.parents[2].rglob("*") if path.name != ".lock"}
    assert command([str(run.path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a figure has a file name" in line
    assert {path for path in run.path.parents[2].rglob("*") if path.name != ".lock"} == before


def test_the_one_place_that_writes_refuses_other_folders(run: RunDir, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (run.path / "link").symlink_to(elsewhere)
    with pytest.raises(UsageError, match="not inside the run's folder"):
        run.write_figure("../../pwned", None)
    for path in (elsewhere / "x.npz", run.path / ".." / "x.npz", run.path / "link" / "x.npz"):
        with pytest.raises(UsageError, match="not inside the run's folder"):
            run.write_arrays(path, x=np.ones(1))
    with pytest.raises(UsageError, match="not inside the run's folder"):
        run.write_best({"model": {}}, "../evil.pt")
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_rerun_removes_no_figure_outside_that_a_summary_names(
    kind: str, run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = tmp_path / "victim.png"
    victim.write_text("gold")
    stem = victim.with_suffix("")
    name = str(stem) if kind == "absolute" else os.path.relpath(stem, run.figures)
    summary = json.loads(run.summary_file.read_text())
    run.summary_file.write_text(json.dumps({**summary, "figures": [name]}))
    assert train_command.main([str(run.path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "a figure has a file name" in line
    with run.lock():
        run.discard_results()
    assert victim.read_text() == "gold"


def test_what_was_moved_aside_does_not_come_back_through_a_link(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = tmp_path / "elsewhere" / "victim"
    victim.parent.mkdir()
    victim.write_text("gold")
    (run.path / "link").symlink_to(victim.parent)
    (run.trash / "link").mkdir(parents=True)
    (run.trash / "link" / "victim").write_text("evil")
    assert evaluate.main([str(run.path)]) == 2
    assert "not inside the run's folder" in capsys.readouterr().err
    assert victim.read_text() == "gold"


def test_pictures_side_by_side_replace_links(run: RunDir, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("gold")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "pca.png").symlink_to(victim)
    assert evaluate.main([str(run.path), "--side-by-side", str(tmp_path / "pictures")]) == 0
    assert victim.read_text() == "gold"
    assert not (tmp_path / "pictures" / "pca.png").is_symlink()


def test_a_journal_that_is_a_link_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    journal = tmp_path / "runs" / ".search" / "mine.journal"
    journal.parent.mkdir(parents=True)
    victim = tmp_path / "victim"
    victim.write_text("")
    journal.symlink_to(victim)
    words = ["-m", "search=optuna", "search.study=mine", f"output_dir={tmp_path}", "seed=0,1"]
    assert train_command.main([*TINY, *words]) == 1
    assert "mine.journal is not a file of its own" in capsys.readouterr().err
    assert victim.read_text() == ""


@pytest.mark.parametrize("study", ["../../x", "/tmp/x", "a/b", "..", "", ".x"])
def test_a_study_that_leads_out_of_the_folder_is_refused(
    study: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["-m", "search=optuna", f"search.study='{study}'", f"output_dir={out}", "seed=0,1"]
    assert train_command.main([*TINY, *words]) == 2
    assert "search.study" in capsys.readouterr().err
    assert not out.exists()


def test_links_with_the_names_of_temporary_files_are_not_followed(
    run: RunDir, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("gold")
    for name in ("samples.npz", "predictions.npz", "summary.json", "config.yaml"):
        (run.path / f".{name}.{os.getpid()}.tmp").symlink_to(victim)
    assert evaluate.main([str(run.path)]) == 0
    assert victim.read_text() == "gold"


def test_a_temporary_file_is_never_one_that_is_there(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("gold")
    monkeypatch.setattr("secrets.token_hex", lambda count: "0" * 2 * count)
    (run.path / f".samples.npz.{'0' * 16}.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        run.write_arrays(run.samples_file, x=np.ones(1))
    assert victim.read_text() == "gold"


# --- simultaneous starts -------------------------------------------------------------------------


def test_nobody_tidies_a_folder_that_is_being_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder of the lock once removed the temporary files of a process that was creating it."""
    queued = make(tmp_path / "a")
    config = dataclasses.replace(queued.read_config(), output_dir=str(tmp_path / "b"))
    sync, refused = atomic_io.sync_file, []

    def interrupted(handle: IO[bytes]) -> None:
        (folder,) = (tmp_path / "b").glob("*/*")
        with pytest.raises(Unavailable), RunDir(folder).lock(patience=0):
            pass
        refused.append(folder)
        sync(handle)

    monkeypatch.setattr(atomic_io, "sync_file", interrupted)
    run = RunDir.create(config)
    assert len(refused) == 2  # config.yaml and summary.json
    assert run.status == "queued"


# --- best.pt -------------------------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path: Path) -> RunDir:
    """A run that was stopped in its second epoch; the first one was the best so far."""
    run = make(tmp_path, "training.epochs=2", "training.print_every=1")
    with pytest.raises(Stopped):
        run_experiment(run, stop=StopAt(14))
    assert load_checkpoint(run.last)["epoch"] == 1
    return run


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def exchange(path: Path) -> None:
    state = load_checkpoint(path)
    state["model"] = {name: torch.zeros_like(tensor) for name, tensor in state["model"].items()}
    torch.save(state, path)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "lost": Path.unlink,
    "a flipped bit": flip_a_bit,
    "other weights": exchange,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_stopped_run_that_lost_its_best_weights_does_not_go_on(
    damage: str, stopped: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[damage](stopped.best)
    assert train_command.main([str(stopped.path), "accept_code=true"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "best.pt" in line
    assert "the best epoch, 1, is lost: rerun=true trains again" in line
    assert train_command.main([str(stopped.path), "rerun=true"]) == 0
    assert stopped.read_summary().scored_weights == "best"


def test_a_finished_run_that_lost_its_best_weights_is_not_scored_by_the_last(run: RunDir) -> None:
    run.best.unlink()
    for command in (evaluate.main, predict.main):
        picture = [str(run.path / "figures" / "pca.png")] if command is predict.main else []
        assert command([str(run.path), *picture]) == 1
    assert run.read_summary().scored_weights == "best"


# --- damaged folders -----------------------------------------------------------------------------


def change_state(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = load_checkpoint(path)
    change(state)
    torch.save(state, path)


def put_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def put_folder(run: RunDir) -> None:
    run.metrics_file.unlink()
    run.metrics_file.mkdir()


def put_metrics(row: str) -> Callable[[RunDir], object]:
    names = "epoch,learning_rate,train_loss,train_accuracy,val_loss,val_accuracy,seconds"
    return lambda run: run.metrics_file.write_text(f"{names},images_per_second\n{row}\n")


def damage_arrays(run: RunDir) -> None:
    content = bytearray(run.features_file.read_bytes())
    content[200:400] = bytes(200)
    run.features_file.write_bytes(content)


def widen(run: RunDir) -> None:
    change_state(
        run.best,
        lambda state: state["model"].update(
            {name: torch.zeros(3, 3) for name in list(state["model"])[:2]}
        ),
    )


READERS: dict[str, tuple[Callable[[RunDir], object], list[str]]] = {
    "a field of megabytes": (put_metrics("1," + "1" * 3_000_000), ["summarize"]),
    "an epoch of 400 digits": (put_metrics("1" * 400 + ",1,1,1,1,1,1,1"), ["summarize"]),
    "features that are damaged": (damage_arrays, ["side-by-side"]),
    "features of another kind": (
        lambda run: run.write_arrays(run.features_file, features=np.ones(3), labels=np.ones(3)),
        ["side-by-side"],
    ),
    "best.pt of other widths": (widen, ["evaluate", "predict"]),
    "best.pt without a model": (
        lambda run: change_state(run.best, lambda state: state.update(model=None)),
        ["evaluate", "predict"],
    ),
    "best.pt without anything": (
        lambda run: change_state(run.best, lambda state: state.pop("model")),
        ["evaluate", "predict"],
    ),
    "a pipe for config.yaml": (
        lambda run: put_pipe(run.config_file),
        ["train", "evaluate", "predict", "summarize"],
    ),
    "a pipe for summary.json": (
        lambda run: put_pipe(run.summary_file),
        ["train", "evaluate", "summarize"],
    ),
    "a pipe for metrics.csv": (lambda run: put_pipe(run.metrics_file), ["summarize"]),
    "a pipe for best.pt": (lambda run: put_pipe(run.best), ["evaluate", "predict"]),
    "a pipe for the lock": (lambda run: put_pipe(run.lock_file), ["train", "evaluate"]),
    "a pipe for train.log": (lambda run: put_pipe(run.log_file), ["train", "evaluate"]),
    "a folder for metrics.csv": (
        put_folder,
        ["train", "evaluate", "summarize"],
    ),
    "a pipe for features.npz": (lambda run: put_pipe(run.features_file), ["side-by-side"]),
    "config.yaml of megabytes": (
        lambda run: run.config_file.write_text(
            run.config_file.read_text() + "x:\n" + "- {a: [1, 2], b: {}}\n" * 130_000
        ),
        ["train", "evaluate", "predict", "summarize"],
    ),
    "config.yaml of many lists": (
        lambda run: run.config_file.write_text(
            run.config_file.read_text() + "x:\n" + "- {a: [1, 2], b: {}}\n" * 9_000
        ),
        ["train", "evaluate", "predict", "summarize"],
    ),
}


def call(command: str, run: RunDir, folder: Path) -> int:
    from cifar_lab import summarize

    if command == "side-by-side":
        from cifar_lab.figures import pca

        with pytest.raises(Damaged):
            pca.side_by_side([run], ["one"])
        print("cifar_lab: one line", file=sys.stderr)
        return 1
    if command == "predict":
        picture = folder / "picture.png"
        from PIL import Image

        Image.new("L", (32, 32)).save(picture)
        return predict.main([str(run.path), str(picture)])
    if command == "summarize":
        return summarize.main([str(run.path.parent)])
    return {"train": train_command.main, "evaluate": evaluate.main}[command]([str(run.path)])


@pytest.mark.parametrize(
    ("damage", "command"),
    [(damage, command) for damage, (_, commands) in READERS.items() for command in commands],
)
def test_a_damaged_folder_is_one_line_in_two_seconds(
    damage: str, command: str, run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    READERS[damage][0](run)
    capsys.readouterr()
    started, cpu = time.monotonic(), time.process_time()
    code = call(command, run, tmp_path)
    assert time.process_time() - cpu < 2
    assert time.monotonic() - started < 60, "it waited for a pipe"
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    if command == "summarize":  # the others of the folder are summarised all the same
        assert run.path.name in said.out + said.err
    else:
        assert code in (1, 2)
        assert len(said.err.splitlines()) == 1, said.err


# --- a search for runs ends ----------------------------------------------------------------------


def test_a_folder_that_is_no_folder_of_runs_is_refused_soon(
    run: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`summarize /` would walk through the disk for minutes."""
    monkeypatch.setattr(run_dir, "LONGEST_SEARCH", 30)
    for number in range(25):
        (tmp_path / f"a{number}").mkdir()
        (tmp_path / f"z{number}").mkdir()
    assert [found.path for found in run_dir.find_runs(tmp_path)] == [run.path]
    for number in range(10):
        (tmp_path / f"zz{number}").mkdir()
    assert summarize.main([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "30 folders in a row that are no runs" in line
    assert not (tmp_path / "summary.csv").exists()


def test_a_second_name_that_is_there_already_leaves_no_temporary_file(tmp_path: Path) -> None:
    """After a kill between the two, last.previous.pt is a name of last.pt; rename does nothing."""
    (tmp_path / "last.pt").write_bytes(b"content")
    for _ in range(2):
        atomic_io.copy_at_once(tmp_path / "last.pt", tmp_path / "last.previous.pt")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["last.previous.pt", "last.pt"]
