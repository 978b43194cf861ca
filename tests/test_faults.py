"""Faults, injected for real: nothing that was safe is lost, one clear line, a way to go on.

What a command answers to a damaged file of a finished run is in test_damages.py.
"""

import contextlib
import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import Capture, CaptureLog, Patch
from test_damages import Damage, cut, flip
from tiny_runs import RICH, TINY, at_yield, config_of, make

from cifar_lab import train
from cifar_lab.analysis.resume_proof import differences
from cifar_lab.errors import Damaged, RunFailed, Stopped, Unavailable, UsageError
from cifar_lab.runs.files import CHECKPOINT_FORMAT, load_checkpoint
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.summary import RunSummary
from cifar_lab.training.console import StepPace
from cifar_lab.training.loop import Progress, Stop
from cifar_lab.training.run import run_experiment


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


def fill(folder: Path, leave: int = 0) -> None:
    """Fill a file system up to `leave` bytes."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as handle, contextlib.suppress(OSError):
        while True:
            handle.write(b"\0" * 4096)
    if leave:
        os.truncate(ballast, ballast.stat().st_size - leave)


def only_run(folder: Path) -> RunDir:
    (config,) = folder.rglob("config.yaml")
    return RunDir(config.parent)


def test_a_disk_that_fills(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture, tiny_finished: RunDir
) -> None:
    with mounted(tmp_path / "disk", "4m") as disk:
        write, saved = RunDir.write_last, []

        def full(self: RunDir, state: Any) -> None:
            if self.last.exists():
                saved.append(self.last.read_bytes())
                fill(disk, leave=20_000)  # room for a part
            write(self, state)

        line = [*TINY, *RICH, f"output_dir={disk}"]
        with monkeypatch.context() as patch:
            patch.setattr(RunDir, "write_last", full)
            assert train.main(line) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        run = only_run(disk)
        assert error.startswith("cifar_lab: the disk is full at ")
        assert "last.pt" in error
        assert "run the same line again" in error
        assert [run.last.read_bytes()] == saved
        assert not list(run.path.glob("*.tmp")) + list(run.path.glob(".*.tmp"))
        assert run.status in ("failed", "interrupted")
        (disk / "ballast").unlink()
        assert train.main(line) == 0
        assert differences(tiny_finished, run) == []


def test_a_disk_that_is_full_or_read_only_at_the_start(tmp_path: Path, capsys: Capture) -> None:
    with mounted(tmp_path / "disk", "1m") as disk:
        fill(disk)
        line = [*TINY, "training.epochs=0", f"output_dir={disk}"]
        assert train.main(line) == 1
        assert capsys.readouterr().err.startswith("cifar_lab: the disk is full at ")
        (disk / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert train.main(line) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert "be read or written (Read-only file system); choose another folder" in error


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_damaged_checkpoint_is_not_trained_over(damage: Damage, stopped: RunDir) -> None:
    damage(stopped.last)
    best = stopped.best.read_bytes()
    with pytest.raises(Damaged, match=r"last\.pt is damaged.*rerun=true starts again"):
        run_experiment(stopped)
    assert stopped.status == "failed"
    assert stopped.best.read_bytes() == best


def test_a_flipped_bit_is_found_or_means_nothing(tiny_finished: RunDir, tmp_path: Path) -> None:
    whole = load_checkpoint(tiny_finished.best)["model"]
    content = tiny_finished.best.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for position in random.integers(0, len(content), 60):
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(random.integers(8))
        path = tmp_path / "best.pt"
        path.write_bytes(bytes(flipped))
        try:
            model = load_checkpoint(path)["model"]
        except (Damaged, UsageError):
            refused += 1
            continue
        assert all(torch.equal(model[name], tensor) for name, tensor in whole.items())
    assert refused > 20


def test_a_checkpoint_of_another_model_or_version(stopped: RunDir) -> None:
    state = load_checkpoint(stopped.last)
    name = next(iter(state["model"]))
    torch.save({**state, "model": {**state["model"], name: torch.zeros(2, 2)}}, stopped.last)
    problem = r"to another model or optimizer.*size mismatch.*rerun=true"
    with pytest.raises(UsageError, match=problem):
        run_experiment(stopped)
    torch.save({**state, "format": CHECKPOINT_FORMAT + 1}, stopped.last)
    with pytest.raises(UsageError, match=r"format 2, this version reads up to 1"):
        run_experiment(stopped)
    torch.save({"weights": torch.zeros(3)}, stopped.last)
    with pytest.raises(Damaged, match="not a checkpoint of cifar_lab"):
        run_experiment(stopped)


class Killed(BaseException):
    pass


def test_last_is_there_at_every_moment_of_its_replacement(
    stopped: RunDir, monkeypatch: Patch
) -> None:
    """Killed before or after each system call that changes a name, a whole last.pt remains."""
    before, state = stopped.last.read_bytes(), load_checkpoint(stopped.last)
    calls = kills = 0

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

    for at, after in [(at, after) for at in range(1, 12) for after in (False, True)]:
        calls = 0
        with monkeypatch.context() as patch:
            for name in ("link", "replace", "fsync", "unlink"):
                patch.setattr(os, name, dying(getattr(os, name), at, after))
            try:
                stopped.write_last(state)
            except Killed:
                kills += 1
        assert stopped.last.read_bytes()
        assert load_checkpoint(stopped.last)["step"] == state["step"]
        stopped.last.write_bytes(before)
    assert kills >= 6
    with stopped.lock():
        pass  # whoever holds the lock tidies up
    assert not list(stopped.path.glob(".*.tmp"))


def test_a_config_that_was_edited_is_not_run_in_the_folder_of_another(stopped: RunDir) -> None:
    text = stopped.config_file.read_text().replace("lr: 0.001", "lr: 0.1")
    stopped.config_file.write_text(text.replace("epochs: 2", "epochs: 0"))
    with pytest.raises(UsageError, match=r"config\.yaml was edited.*restore them"):
        run_experiment(stopped)
    assert stopped.status == "interrupted"
    assert train.main([str(stopped.path)]) == 0, "in a folder of its own"
    assert stopped.status == "interrupted"


def test_a_folder_in_use_is_named_with_its_process(stopped: RunDir, capsys: Capture) -> None:
    with stopped.lock():
        assert stopped.is_locked()
        assert train.main([str(stopped.path)]) == 3
    (message,) = capsys.readouterr().err.splitlines()
    assert f"is in use by process {os.getpid()}" in message
    assert not stopped.is_locked()


def no_locks(*_: Any) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_file_system_that_syncs_and_maps_nothing(
    stopped: RunDir, tiny_finished: RunDir, monkeypatch: Patch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    def cannot_map(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr("cifar_lab.datasets.store.np.memmap", cannot_map)
    run_experiment(stopped)
    assert differences(tiny_finished, stopped) == []


def test_without_locks_a_second_process_of_this_machine_is_refused(
    stopped: RunDir, monkeypatch: Patch, caplog: CaptureLog
) -> None:
    stopped.lock_file.unlink()  # where there are locks, its last process stays named
    monkeypatch.setattr("fcntl.flock", no_locks)
    with stopped.lock():
        assert f"the file system of {stopped.lock_file} has no locks" in caplog.text
        assert stopped.is_locked()
        with pytest.raises(Unavailable, match=f"in use by process {os.getpid()}"):
            run_experiment(stopped)
    assert not stopped.is_locked()
    assert run_experiment(stopped).status == "finished"


def test_without_locks_the_first_process_ends_when_another_machine_begins_to_write(
    stopped: RunDir, monkeypatch: Patch
) -> None:
    stopped.lock_file.unlink()  # where there are locks, its last process stays named
    monkeypatch.setattr("fcntl.flock", no_locks)
    written: list[bytes] = []

    def begin() -> None:
        stopped.lock_file.write_text("process 1 on another-machine")
        written.extend(path.read_bytes() for path in (stopped.metrics_file, stopped.summary_file))

    at_yield(monkeypatch, 2, begin)
    with pytest.raises(Unavailable, match=r"process 1 on another-machine\) has begun to train"):
        run_experiment(stopped)
    assert [stopped.metrics_file.read_bytes(), stopped.summary_file.read_bytes()] == written
    assert stopped.lock_file.read_text() == "process 1 on another-machine"


FULL = "the GPU's memory is full, try a smaller training.batch_size"
MPS = "MPS backend out of memory"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SystemExit(0), "SystemExit"),
        (ValueError("half \ud800"), r"ValueError: half \ud800"),
        (torch.OutOfMemoryError("CUDA: 20 GiB"), f"OutOfMemoryError: {FULL} (CUDA: 20 GiB)"),
        (RuntimeError(MPS), f"RuntimeError: {FULL} ({MPS})"),
    ],
    ids=["sys.exit", "a lone surrogate", "memory of CUDA", "memory of MPS"],
)
def test_whatever_ends_a_run_is_recorded_and_tried_again_from_its_last_checkpoint(
    error: BaseException, reason: str, stopped: RunDir, monkeypatch: Patch, tiny_finished: RunDir
) -> None:
    def end() -> None:
        raise error

    at_yield(monkeypatch, 2, end)
    with pytest.raises(RunFailed, match=f"failed with {re.escape(reason)}; see the traceback"):
        run_experiment(stopped)
    assert (stopped.status, stopped.read_summary().error) == ("failed", reason)
    assert type(error).__name__ in stopped.log_file.read_text()
    monkeypatch.undo()
    assert run_experiment(stopped).error is None
    assert differences(tiny_finished, stopped) == []


def test_a_figure_that_fails_is_no_reason_to_lose_a_run(tmp_path: Path, monkeypatch: Patch) -> None:
    def broken(run: Any, **settings: Any) -> None:
        raise ValueError("no such colour")

    broken.__module__, broken.__name__ = "cifar_lab.figures.curves", "draw"
    monkeypatch.setattr("cifar_lab.figures.curves.draw", broken)
    left_out = ("figures.samples=null", "figures.confusion_matrix=null")
    run = make(tmp_path, "training.epochs=0", "figures=standard", *left_out)
    summary = run_experiment(run)
    assert summary.status == "finished"
    assert any("figure curves was not drawn" in w and "colour" in w for w in summary.warnings)
    assert (run.figures / "reliability.png").exists()


def test_a_loss_that_is_no_number(tmp_path: Path, capsys: Capture) -> None:
    line = [*TINY, "optimizer=sgd", "optimizer.lr=1e30", f"output_dir={tmp_path}"]
    assert train.main(line) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the training loss became" in error
    assert "try a smaller optimizer.lr (it is 1e+30)" in error
    assert only_run(tmp_path).status == "failed"


@pytest.mark.parametrize("error", [Unavailable("no network"), Stopped(signal.SIGINT)])
def test_data_out_of_reach_or_a_stop_before_it_starts_leave_the_run_queued(
    error: Exception, tmp_path: Path, monkeypatch: Patch
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise error

    run = make(tmp_path)
    monkeypatch.setattr("cifar_lab.training.build.load_splits", unreachable)
    with pytest.raises(type(error)):
        run_experiment(run)
    assert run.status == "queued"
    reason = run.read_summary().error
    assert reason == (None if isinstance(error, Stopped) else "Unavailable: no network")


def test_a_signal_while_a_figure_is_drawn_is_no_failed_figure(
    stopped: RunDir, monkeypatch: Patch, tiny_finished: RunDir
) -> None:
    def interrupted(*_: object) -> None:
        raise Stopped(15)

    make(stopped.path.parents[1], *RICH)  # with a figure
    with monkeypatch.context() as patch:
        patch.setattr("cifar_lab.training.console.save", interrupted)
        with pytest.raises(Stopped):
            run_experiment(stopped)
    assert stopped.status == "interrupted"
    assert run_experiment(stopped).status == "finished"
    assert differences(tiny_finished, stopped) == []


def test_a_signal_as_a_run_ends_costs_no_training(stopped: RunDir, monkeypatch: Patch) -> None:
    """Without last.pt, a run that is not finished would train anew."""
    write = RunDir.write_summary

    def interrupted(run: RunDir, summary: RunSummary) -> None:
        write(run, summary)
        if summary.status == "finished":
            raise Stopped(15)

    make(stopped.path.parents[1], *RICH, "training.keep_last=false")
    monkeypatch.setattr(RunDir, "write_summary", interrupted)
    with pytest.raises(Stopped):
        run_experiment(stopped)
    assert stopped.status == "finished"


# --- what the console can do to a run -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "line",
    [
        "{train} >&- 2>&-",
        "{train} > /dev/full 2> /dev/full",
        "{train} | true",
        "{train} 2>&1 | head -1",
        "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 PYTHONIOENCODING=ascii {train}",
    ],
)
def test_output_that_cannot_be_written_does_not_fail_a_run(line: str, tmp_path: Path) -> None:
    words = [*TINY, "training.epochs=1", f"output_dir={tmp_path}"]
    command = line.format(train=f"{sys.executable} -m cifar_lab.train {shlex.join(words)}")
    ended = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert only_run(tmp_path).status == "finished"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_command_whose_output_is_its_result_says_that_it_is_lost() -> None:
    command = f"{sys.executable} -m cifar_lab.describe --version > /dev/full"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert "the disk is full at standard output" in line


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_a_terminal_that_closes_stops_a_run_as_sigterm_does(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with Stop().installed() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert stop.signal is None
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        at_yield(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert train.main([*TINY, f"output_dir={tmp_path}"]) == 128 + signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
    run = only_run(tmp_path)
    assert run.status == "interrupted"
    assert run.last.exists()


@pytest.mark.parametrize("threads", [1, 2])
def test_steps_that_stretch_are_told_once(
    threads: int, caplog: CaptureLog, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    config, state = config_of(), SimpleNamespace(seconds=0.0)
    pace = StepPace(config)
    seconds_per_step = [0.1, 0.1, 0.12, 0.1, 0.3, 0.1, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]
    for step, seconds in enumerate(seconds_per_step, start=1):
        state.seconds += seconds
        told = caplog.text.count("times as long as at best in epoch 1")
        assert told == (step > 9)  # after the third slow yield in a row
        pace.notice(state, Progress("train", 1, step, 20, 0.0, 0.0))  # type: ignore[arg-type]
    (line,) = caplog.messages
    assert "takes 3.0 times as long" in line
    assert ("threads=1" in line) == (threads > 1)
