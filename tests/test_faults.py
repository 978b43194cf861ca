"""Faults, injected for real: nothing that was safe is lost, one clear line, a way to go on."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import TINY, StopAt, at_yield, make, train

from cifar_lab import train as train_command
from cifar_lab.analysis.run_differences import differences
from cifar_lab.errors import Damaged, Stopped, Unavailable, UsageError
from cifar_lab.runs.checkpoints import CHECKPOINT_FORMAT, load_checkpoint
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.run import run_experiment

CURVES = ("figures=standard", "figures.samples=null", "figures.confusion_matrix=null")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return train(tmp_path_factory.mktemp("reference"))


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A small file system of its own; the test is skipped where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command here")
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {answer.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """Fill a file system up to `leave` bytes."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as handle, contextlib.suppress(OSError):
        while True:
            handle.write(b"\0" * 4096)
    if leave:
        os.truncate(ballast, ballast.stat().st_size - leave)
    return ballast


# --- a full disk ------------------------------------------------------------------------------


def test_a_disk_that_fills_in_a_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reference: RunDir,
) -> None:
    with mounted(tmp_path / "disk", "2m") as disk:
        saved: dict[str, bytes] = {}
        write_last = RunDir.write_last

        def full(self: RunDir, state: Any) -> None:
            if state["epoch"] == 2:
                saved["last"] = self.last.read_bytes()
                fill(disk, leave=20_000)  # room for a part of it
            write_last(self, state)

        monkeypatch.setattr(RunDir, "write_last", full)
        line = [*TINY, f"output_dir={disk}"]
        assert train_command.main(line) == 1
        errors = capsys.readouterr().err.splitlines()
        (run,) = (RunDir(path.parent) for path in disk.rglob("config.yaml"))
        assert errors[-1].startswith("cifar_lab: the disk is full at ")
        assert "last.pt" in errors[-1]
        assert "run the same line again" in errors[-1]
        assert run.last.read_bytes() == saved["last"]
        assert not list(run.path.glob("*.tmp")) + list(run.path.glob(".*.tmp"))
        assert run.status in ("failed", "interrupted")

        monkeypatch.undo()
        (disk / "ballast").unlink()
        assert train_command.main(line) == 0
        assert differences(reference, run) == []


def test_a_disk_that_fills_in_metrics(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reference: RunDir,
) -> None:
    with mounted(tmp_path / "disk", "2m") as disk:
        append = RunDir.append_metrics

        def full(self: RunDir, row: Any) -> None:
            if row.epoch == 2:
                room = 4096 - self.metrics_file.stat().st_size
                with self.metrics_file.open("a") as handle:  # to the end of its page
                    handle.write("#" * room)
                fill(disk)
            append(self, row)

        monkeypatch.setattr(RunDir, "append_metrics", full)
        line = [*TINY, f"output_dir={disk}"]
        assert train_command.main(line) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("cifar_lab: the disk is full at ")
        assert "metrics.csv" in error
        (run,) = (RunDir(path.parent) for path in disk.rglob("config.yaml"))
        assert load_checkpoint(run.last)["epoch"] == 1

        monkeypatch.undo()
        (disk / "ballast").unlink()
        assert train_command.main(line) == 0
        assert differences(reference, run) == []


def test_a_disk_that_fills_in_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with mounted(tmp_path / "disk", "2m") as disk:
        write_figure = RunDir.write_figure

        def full(self: RunDir, name: str, figure: Any) -> Path:
            fill(disk)
            return write_figure(self, name, figure)

        monkeypatch.setattr(RunDir, "write_figure", full)
        line = [*TINY, *CURVES, "training.epochs=1", f"output_dir={disk}"]
        assert train_command.main(line) == 1
        assert "the disk is full at" in capsys.readouterr().err.splitlines()[-1]
        (run,) = (RunDir(path.parent) for path in disk.rglob("config.yaml"))
        assert load_checkpoint(run.last)["epoch"] == 1
        assert run.read_predictions().accuracy > 0

        monkeypatch.undo()
        (disk / "ballast").unlink()
        assert train_command.main(line) == 0
        assert (run.figures / "curves.png").stat().st_size > 1000
        assert run.status == "finished"


def test_a_disk_that_is_full_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mounted(tmp_path / "disk", "1m") as disk:
        fill(disk)
        assert train_command.main([*TINY, f"output_dir={disk}"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("cifar_lab: the disk is full at ")
        (disk / "ballast").unlink()
        assert train_command.main([*TINY, "training.epochs=0", f"output_dir={disk}"]) == 0


# --- file systems that cannot be written -----------------------------------------------------


def test_a_read_only_output_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mounted(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert train_command.main([*TINY, f"output_dir={disk}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "cannot be written" in line
        assert "choose another output_dir" in line


def test_a_file_where_the_output_folder_should_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "outputs").write_text("mine")
    assert train_command.main([*TINY, f"output_dir={tmp_path / 'outputs'}"]) == 2
    assert "a file is in the way" in capsys.readouterr().err
    assert (tmp_path / "outputs").read_text() == "mine"


# --- damaged checkpoints -----------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path: Path) -> RunDir:
    """A run that was stopped in its second epoch and has two checkpoints."""
    run = make(tmp_path, "training.print_every=1")
    with pytest.raises(Stopped):
        run_experiment(run, stop=StopAt(16))
    assert run.last.exists()
    assert run.previous.exists()
    return run


def within_the_largest_tensor(path: Path) -> int:
    """Return the place of a byte that matters; the padding between records does not."""
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda member: member.file_size)
    header = path.read_bytes()[record.header_offset :][:30]
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    return record.header_offset + 30 + name + extra + record.file_size // 2


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "flipped":
        content[within_the_largest_tensor(path)] ^= 0x10
    elif how == "empty":
        content = bytearray()
    path.unlink()  # last.previous.pt may be another name of the same file
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_it(
    how: str, stopped: RunDir, reference: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(stopped.last, how)
    run_experiment(stopped)
    log = stopped.log_file.read_text()
    assert "last.pt is damaged" in log
    assert "continuing from the checkpoint before it, last.previous.pt" in log
    assert differences(reference, stopped) == []


def test_two_damaged_checkpoints_are_not_trained_over(stopped: RunDir, reference: RunDir) -> None:
    damage(stopped.last, "flipped")
    damage(stopped.previous, "truncated")
    best = stopped.best.read_bytes()
    with pytest.raises(Damaged, match=r"last\.pt is damaged.*rerun=true starts again"):
        run_experiment(stopped)
    assert stopped.status == "failed"
    assert stopped.best.read_bytes() == best
    run_experiment(stopped, rerun=True)
    assert differences(reference, stopped) == []


def test_a_flipped_bit_is_found_or_means_nothing(reference: RunDir, tmp_path: Path) -> None:
    whole = load_checkpoint(reference.best)["model"]
    content = reference.best.read_bytes()
    random = np.random.default_rng(0)
    found = 0
    for position in random.integers(0, len(content), 150):
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(random.integers(8))
        path = tmp_path / "best.pt"
        path.write_bytes(bytes(flipped))
        try:
            model = load_checkpoint(path)["model"]
        except (Damaged, UsageError):
            found += 1
            continue
        assert all(torch.equal(model[name], tensor) for name, tensor in whole.items())
    assert found > 50


def test_a_checkpoint_of_another_model(stopped: RunDir, tmp_path: Path) -> None:
    other = make(tmp_path / "other", "model.widths=[2,2]")
    with pytest.raises(Stopped):
        run_experiment(other, stop=StopAt(1))
    shutil.copy(other.last, stopped.last)
    problem = r"to another model or optimizer.*size mismatch.*rerun=true"
    with pytest.raises(UsageError, match=problem):
        run_experiment(stopped)


def test_a_checkpoint_of_a_newer_version(stopped: RunDir) -> None:
    state = load_checkpoint(stopped.last)
    torch.save({**state, "format": CHECKPOINT_FORMAT + 1}, stopped.last)
    with pytest.raises(UsageError, match=r"format 2, this version reads up to 1"):
        run_experiment(stopped)
    torch.save({"weights": torch.zeros(3)}, stopped.last)
    assert stopped.read_last(lambda line: None) is not None  # the one before it
    stopped.previous.unlink()
    with pytest.raises(Damaged, match="not a checkpoint of cifar_lab"):
        run_experiment(stopped)


def test_last_is_there_at_every_moment_of_its_replacement(
    stopped: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before or after each system call that changes a name, a whole last.pt remains."""
    before, state = stopped.last.read_bytes(), load_checkpoint(stopped.last)
    names = ["link", "replace", "fsync", "unlink"]
    calls = 0

    class Killed(BaseException):
        pass

    def dying(call: Any, at: int, after: bool) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at and not after:
                raise Killed
            result = call(*args, **kwargs)
            if calls == at:
                raise Killed
            return result

        return wrapped

    kills = 0
    for at in range(1, 12):
        for after in (False, True):
            calls = 0
            with monkeypatch.context() as patch:
                for name in names:
                    patch.setattr(os, name, dying(getattr(os, name), at, after))
                try:
                    stopped.write_last(state)
                except Killed:
                    kills += 1
            assert stopped.last.read_bytes()
            assert load_checkpoint(stopped.last)["step"] == state["step"]
            for path in (stopped.last, stopped.previous):
                path.unlink(missing_ok=True)
                path.write_bytes(before)
    assert kills >= 8
    with stopped.lock():
        pass  # whoever holds the lock tidies up
    assert not list(stopped.path.glob(".*.tmp"))


# --- edited by hand -----------------------------------------------------------------------------


def test_a_config_that_was_edited_by_hand_is_not_run_in_a_folder_of_another(
    stopped: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    text = stopped.config_file.read_text()
    stopped.config_file.write_text(text.replace("lr: 0.001", "lr: 0.1"))
    with pytest.raises(UsageError, match=r"config\.yaml was edited.*restore them"):
        run_experiment(stopped)
    with pytest.raises(UsageError, match="was edited"):
        make(stopped.path.parents[1], "training.print_every=1").own_config()
    assert stopped.status == "interrupted"
    stopped.config_file.write_text(text.replace("checkpoint_minutes: 5.0", "checkpoint_minutes: 1"))
    run_experiment(stopped)


@pytest.mark.parametrize("name", ["renamed", "of-20261125"])
def test_a_renamed_folder_whose_config_was_edited_is_not_run(name: str, stopped: RunDir) -> None:
    moved = RunDir(stopped.path.rename(stopped.path.with_name(name)))
    text = moved.config_file.read_text()
    moved.config_file.write_text(text.replace("lr: 0.001", "lr: 0.1"))
    with pytest.raises(UsageError, match=r"config\.yaml was edited.*restore them"):
        run_experiment(moved)


def test_a_folder_of_old_code_is_known_by_its_name(stopped: RunDir) -> None:
    summary = dataclasses.replace(stopped.read_summary(), identity=None)
    stopped.write_summary(summary)
    assert not stopped.holds_other_config(stopped.read_config())
    moved = RunDir(stopped.path.rename(stopped.path.with_name("renamed")))
    assert not moved.holds_other_config(moved.read_config())
    moved = RunDir(moved.path.rename(moved.path.with_name("of-01234567")))
    assert moved.holds_other_config(moved.read_config())


def test_an_edited_config_runs_in_a_folder_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path, "training.epochs=0")
    text = run.config_file.read_text()
    run.config_file.write_text(text.replace("lr: 0.001", "lr: 0.002"))
    assert train_command.main([str(run.path)]) == 0
    others = [p.parent for p in tmp_path.rglob("config.yaml") if p.parent != run.path]
    assert len(others) == 1
    assert RunDir(others[0]).status == "finished"


@pytest.mark.parametrize(
    "text", ["", "[]", "a: b", "dataset: 3", "{", "\x00", "seed: !!python/object/apply:os.abort []"]
)
def test_a_config_that_is_none(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path)
    run.config_file.write_text(text)
    assert train_command.main([str(run.path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.yaml" in line


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "3", "[" * 100_000, '{"status": "done"}', '{"status": [], "seed": 1}'],
)
def test_a_summary_that_is_none(text: str, tmp_path: Path) -> None:
    run = make(tmp_path, "training.epochs=0")
    run.summary_file.write_text(text)
    with pytest.raises(Damaged, match=r"summary\.json is damaged.*rerun=true"):
        run_experiment(run)
    assert run_experiment(run, rerun=True).status == "finished"


# --- two at once ----------------------------------------------------------------------------------


def test_two_processes_on_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path)
    code = (
        "import sys, time\nfrom cifar_lab.runs.run_dir import RunDir\n"
        "with RunDir(sys.argv[1]).lock():\n    print('held', flush=True)\n    time.sleep(60)"
    )
    line = [sys.executable, "-c", code, str(run.path)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert train_command.main([*TINY, f"output_dir={tmp_path}"]) == 3
        (message,) = capsys.readouterr().err.splitlines()
        assert f"is in use by process {holder.pid}" in message
        holder.kill()
    with run.lock():
        assert run.is_locked()
        with pytest.raises(Unavailable):
            run_experiment(run)
    assert not run.is_locked()


# --- the rest of the world ------------------------------------------------------------------------


def test_a_clock_that_jumps_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: RunDir
) -> None:
    hours = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: 1e9 - 3600 * next(hours))
    run = train(tmp_path)
    assert differences(reference, run) == []
    assert all(row.seconds > 0 for row in run.read_metrics())
    assert run.read_summary().seconds > 0


def test_the_memory_of_a_gpu_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    at_yield(monkeypatch, 2, full)
    assert train_command.main([*TINY, f"output_dir={tmp_path}"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "try a smaller training.batch_size" in error
    (run,) = (RunDir(path.parent) for path in tmp_path.rglob("config.yaml"))
    assert run.status == "failed"
    assert "CUDA out of memory" in (run.read_summary().error or "")


def test_a_figure_that_fails_is_no_reason_to_lose_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: Any, **settings: Any) -> None:
        raise ValueError("no such colour")

    broken.__module__, broken.__name__ = "cifar_lab.figures.curves", "draw"
    monkeypatch.setattr("cifar_lab.figures.curves.draw", broken)
    run = train(tmp_path, "training.epochs=0", "figures=standard", "figures.samples=null")
    summary = run.read_summary()
    assert summary.status == "finished"
    assert any("figure curves was not drawn" in w and "colour" in w for w in summary.warnings)
    assert (run.figures / "confusion_matrix.png").exists()


def test_a_loss_that_is_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [*TINY, "optimizer=sgd", "optimizer.lr=1e30", f"output_dir={tmp_path}"]
    assert train_command.main(line) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the training loss became" in error
    assert "try a smaller optimizer.lr (it is 1e+30)" in error
    (run,) = (RunDir(path.parent) for path in tmp_path.rglob("config.yaml"))
    assert run.status == "failed"


def test_data_out_of_reach_leave_the_run_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise Unavailable("no network")

    run = make(tmp_path)
    monkeypatch.setattr("cifar_lab.training.run.load_splits", unreachable)
    with pytest.raises(Unavailable):
        run_experiment(run)
    assert run.status == "queued"
    assert json.loads(run.summary_file.read_text())["error"] == "Unavailable: no network"


def test_a_signal_while_a_figure_is_drawn_is_no_failed_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: RunDir
) -> None:
    def interrupted(self: RunDir, name: str, figure: Any) -> None:
        raise Stopped(15)

    monkeypatch.setattr(RunDir, "write_figure", interrupted)
    run = make(tmp_path, *CURVES, "training.epochs=0")
    with pytest.raises(Stopped):
        run_experiment(run)
    assert run.status == "interrupted"
    monkeypatch.undo()
    assert run_experiment(run).status == "finished"
