"""What the console can do to a run: nothing. Signals save it, broken output does not end it."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import TINY, at_yield, config_of, make

from cifar_lab import train
from cifar_lab.errors import Stopped
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.console import Pace
from cifar_lab.training.loop import Progress
from cifar_lab.training.run import run_experiment
from cifar_lab.training.signals import Stop

TRAIN = f"{sys.executable} -m cifar_lab.train {shlex.join(TINY)}"


def only_run(folder: Path) -> RunDir:
    (config,) = folder.rglob("config.yaml")
    return RunDir(config.parent)


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
    command = line.format(train=f"{TRAIN} training.epochs=1 output_dir='{tmp_path}'")
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        at_yield(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert train.main([*TINY, f"output_dir={tmp_path}"]) == 128 + signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
    run = only_run(tmp_path)
    assert run.status == "interrupted"
    assert run.last.exists()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_nohup_keeps_a_run_going() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop().installed() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_is_stopped_before_it_starts_stays_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: object) -> None:
        raise Stopped(signal.SIGINT)

    run = make(tmp_path)
    monkeypatch.setattr("cifar_lab.training.run.load_splits", stopped)
    with pytest.raises(Stopped):
        run_experiment(run)
    assert run.status == "queued"


@pytest.mark.parametrize("threads", [1, 2])
def test_steps_that_stretch_are_told_once(
    threads: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    config, state = config_of(), SimpleNamespace(seconds=0.0)
    pace = Pace(config)
    seconds_per_step = [0.1, 0.1, 0.12, 0.1, 0.3, 0.1, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]
    for step, seconds in enumerate(seconds_per_step, start=1):
        state.seconds += seconds
        told = caplog.text.count("times as long as at best in epoch 1")
        assert told == (step > 9)  # after the third slow yield in a row
        pace.notice(state, Progress("step", "train", 1, step, 20, 0.0, 0.0))  # type: ignore[arg-type]
    (line,) = caplog.messages
    assert "takes 3.0 times as long" in line
    assert ("threads=1" in line) == (threads > 1)
