"""One run in several processes: their parts of a batch, and torchrun with real processes (gloo)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fixtures import Capture, Patch
from tiny_runs import TINY, StopAt, train

from cifar_lab import compare, summarize
from cifar_lab.errors import Stopped
from cifar_lab.runs.files import load_checkpoint
from cifar_lab.runs.run_dir import RunDir, find_runs
from cifar_lab.training.distributed import part_of_batch
from cifar_lab.training.run import run_experiment

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
EXACT = (
    "model.batch_norm=false",
    "split.validation=922",  # of 1,437: the last of 9 batches has three images
    "optimizer=sgd",
    "training.class_weights=balanced",
    "training.label_smoothing=0.1",
    "training.clip_grad_norm=1",
    "training.ema=0.9",
    "training.monitor=val_macro_f1",
    "training.step_history=true",
)
MIXED = ("augmentation.cutmix=1.0", "augmentation.erasing=0.0")
ALONE = ("augmentation.erasing=0.5", "augmentation.crop_padding=2")


def start(*words: str, processes: int = 2, module: str = "train") -> "subprocess.Popen[str]":
    """Start a command of cifar_lab with torchrun."""
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    environment["OMP_NUM_THREADS"] = "1"
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line += [f"--nproc-per-node={processes}", "-m", f"cifar_lab.{module}", *words]
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Return exit code, output and messages of a process."""
    output, messages = process.communicate(timeout=300)
    return process.returncode, output, messages


def told(messages: str) -> list[str]:
    """Return the lines that cifar_lab has written, without those of torchrun."""
    return [line for line in messages.splitlines() if line.startswith("cifar_lab: ")]


def as_process(monkeypatch: Patch, rank: int) -> None:
    """Give this process the environment of one of torchrun's."""
    values = (str(rank), str(rank), "2", "2", "127.0.0.1", "29500")
    for name, value in zip(VARIABLES, values, strict=True):
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("world", [2, 3, 4, 7])
def test_the_parts_of_a_batch_are_the_batch(world: int) -> None:
    for total in (1, 2, 3, 5, 8, 13, 64):
        parts = [part_of_batch(total, rank, world) for rank in range(world)]
        rows = [row for part in parts if part.counted for row in range(part.first, part.last)]
        sizes = [part.last - part.first for part in parts]
        assert rows == list(range(total))
        assert min(sizes) >= min(2, total)  # batch norm needs two
        assert max(sizes) - min(sizes) <= 1
        assert {part.total for part in parts} == {total}


@pytest.mark.parametrize(("command", "words"), [(summarize, ["."]), (compare, ["a", "b"])])
def test_other_commands_refuse_torchrun_in_one_line(
    command: object, words: list[str], monkeypatch: Patch, capsys: Capture
) -> None:
    for rank, code, lines in ((0, 2, 1), (1, 0, 0)):
        as_process(monkeypatch, rank)
        assert command.main(words) == code  # type: ignore[attr-defined]
        printed = capsys.readouterr()
        assert printed.out == ""
        assert len(printed.err.splitlines()) == lines
        assert "torchrun is for one run" in printed.err or not lines


ENDS = """
import atexit
from cifar_lab import cli, train
atexit.register(print, "too late")  # what stands for a thread of gloo that aborts the process
cli.run = lambda *_, **__: 3
train.main([])
"""


def test_a_process_ends_before_what_may_abort_it(monkeypatch: Patch) -> None:
    as_process(monkeypatch, 1)
    line = [sys.executable, "-c", ENDS]
    ended = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stdout) == (3, "")


@pytest.mark.slow
@pytest.mark.parametrize("augmentation", [ALONE, MIXED], ids=["parts", "mixed"])
def test_two_processes_train_as_one_to_rounding(
    tmp_path: Path, augmentation: tuple[str, ...]
) -> None:
    words = (*EXACT, *augmentation)
    code, output, messages = finish(start(*TINY, *words, f"output_dir={tmp_path / 'two'}"))
    assert code == 0, messages
    assert output.count("splits verified disjoint") == 1  # printed by one process
    (two,) = find_runs(tmp_path / "two")
    one = train(tmp_path / "one", *words)
    assert two.path.name == one.path.name
    for a, b in zip(one.read_steps(), two.read_steps(), strict=True):
        assert (a.epoch, a.step) == (b.epoch, b.step)
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        assert b.accuracy == pytest.approx(a.accuracy, abs=1e-6)
    for row, other in zip(one.read_metrics(), two.read_metrics(), strict=True):
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_macro_f1"):
            assert getattr(other, name) == pytest.approx(getattr(row, name), rel=1e-5), name
    first, second = load_checkpoint(one.last), load_checkpoint(two.last)
    assert (first.get("processes"), second["processes"]) == (None, 2)
    for name, weight in first["averaged"].items():
        torch.testing.assert_close(second["averaged"][name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_sigterm_stops_all_processes_and_one_alone_resumes(tmp_path: Path) -> None:
    words = [*TINY, "training.epochs=100000", f"output_dir={tmp_path}"]
    process = start(*words)
    deadline = time.monotonic() + 200
    while not any(run.read_metrics() for run in find_runs(tmp_path)):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    stopped = time.monotonic()
    _, _, messages = finish(process)
    assert time.monotonic() - stopped < 25  # torchrun kills what is left after 30
    (line,) = told(messages)
    assert "everything is saved, the same command resumes from there" in line
    (run,) = find_runs(tmp_path)
    saved = load_checkpoint(run.last)
    assert run.read_summary().status == "interrupted"
    assert saved["processes"] == 2
    with pytest.raises(Stopped):
        run_experiment(RunDir(run.path), stop=StopAt(3))
    log = (run.path / "train.log").read_text()
    assert log.count("warning: the number of processes changes from 2 to 1") == 1
    again = load_checkpoint(run.last)
    assert (again["epoch"], again["step"]) > (saved["epoch"], saved["step"])
    assert "processes" not in again


BROKEN = """
import os
from torch import nn

class Breaks(nn.ReLU):
    calls = 0

    def forward(self, input):
        if os.environ.get("RANK") == "1" and self.training and len(input) > 2:
            Breaks.calls += 1
            if Breaks.calls > 20 and os.environ.get("KILLED"):
                os.kill(os.getpid(), 9)
            if Breaks.calls > 20:
                raise ArithmeticError("out of order")
        return super().forward(input)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed", "why"),
    [
        ("", "process 1 of 2 failed with ArithmeticError: out of order"),
        ("yes", "the connection to another of the 2 processes was lost: it was killed"),
    ],
)
def test_a_process_that_fails_or_is_killed_fails_the_run_with_a_reason(
    killed: str, why: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    (tmp_path / "breaks.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("KILLED", killed)
    own = ["trust=[breaks]", "activation._target_=breaks.Breaks"]
    began = time.monotonic()
    code, _, messages = finish(start(*TINY, *own, f"output_dir={tmp_path / 'out'}"))
    assert code == 1
    assert time.monotonic() - began < 200
    assert why in messages
    assert killed or {line.removeprefix("cifar_lab: ") for line in told(messages)} == {why}
    (run,) = find_runs(tmp_path / "out")
    summary = json.loads(run.summary_file.read_text())
    assert (summary["status"], why in summary["error"]) == ("failed", True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["-m", "seed=0,1"], "torchrun is for one run"),
        (["training.batch_size=3"], "training.batch_size=3 is wrong: it must be at least 4"),
    ],
    ids=["sweep", "batch"],
)
def test_what_several_processes_cannot_train_is_refused_once(
    tmp_path: Path, words: list[str], why: str
) -> None:
    code, output, messages = finish(start(*TINY, *words, f"output_dir={tmp_path / 'out'}"))
    (line,) = told(messages)
    assert code != 0
    assert output == ""
    assert why in line
    assert not (tmp_path / "out").exists()
