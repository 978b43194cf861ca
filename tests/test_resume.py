"""A run that was stopped, anywhere and in any way, ends as one that never stopped."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import NOTED, RICH, TINY, StopIn, config_of, make, started, train, wait_until

from cifar_lab import train as train_command
from cifar_lab.analysis import resume_proof
from cifar_lab.analysis.resume_proof import differences
from cifar_lab.config.compose import compose
from cifar_lab.config.run_config import load
from cifar_lab.errors import Stopped, Unavailable, UsageError
from cifar_lab.runs.files import load_checkpoint, read_arrays
from cifar_lab.runs.metrics import EpochMetrics
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.run import run_experiment

EVERYTHING = [
    *("optimizer=sgd", "optimizer.momentum=0.9", "training.label_smoothing=0.1"),
    *("scheduler=reduce_on_plateau", "scheduler.patience=0", "training.clip_grad_norm=0.5"),
    *("training.ema=0.99", "training.lookahead.every=4", "training.class_weights=balanced"),
    *("augmentation.crop_padding=2", "augmentation.cutout=8", "augmentation.cutmix=1"),
    *("split.sampler=weighted", "training.monitor=val_macro_f1", "training.step_history=true"),
    *("training.frozen_epochs=1", "optimizer.backbone_lr=0.05"),
]
"""What keeps a state of its own between two steps, all in one run."""
MORE_KINDS = {
    "adam": [],
    "muon": ["optimizer=muon", "scheduler=linear", "optimizer.rest=sgd"],
    "patience": ["training.patience=1", "training.min_delta=0.5", "training.epochs=6"],
    "one_cycle": ["scheduler=one_cycle"],
    "bf16": ["precision=bf16", "evaluation.watch_test=true"],
    "graph": ["training.cuda_graph=true", "dropout.conv=0.2"],
}


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(EVERYTHING, id="everything"),
        *(pytest.param(o, id=name, marks=pytest.mark.slow) for name, o in MORE_KINDS.items()),
    ],
)
def test_a_run_stopped_at_random_steps_is_the_run_that_never_stopped(
    overrides: list[str], tmp_path: Path
) -> None:
    config = config_of(*overrides)
    lines = resume_proof.prove(config, tmp_path, stops=2, seed=len(overrides))
    assert lines[-1].startswith(("1 stops", "2 stops"))  # the last may come after the end
    assert "bit for bit" in lines[-1]


def test_a_run_stopped_in_training_and_validation_with_a_torn_row_is_the_same(
    stopped: RunDir, tiny_finished: RunDir
) -> None:
    with stopped.metrics_file.open("a") as handle:
        handle.write("2,0.001,2.1")
    assert all(isinstance(row, EpochMetrics) for row in stopped.read_metrics())
    with pytest.raises(Stopped):
        run_experiment(stopped, stop=StopIn("validation", 2))
    saved = load_checkpoint(stopped.last)
    assert (saved["epoch"], saved["step"]) == (1, 9)
    assert stopped.status == "interrupted"
    assert run_experiment(stopped).status == RunDir(stopped.path).status == "finished"
    assert "resumed at epoch 2, step 3" in stopped.log_file.read_text()
    assert [row.epoch for row in stopped.read_metrics()] == [1, 2]
    assert differences(tiny_finished, stopped) == []


def test_the_proof_finds_a_run_that_is_another_one(
    tiny_finished: RunDir, finished: RunDir, tiny_stopped: RunDir
) -> None:
    assert differences(tiny_finished, finished) == []
    unlike = differences(finished, tiny_stopped)
    assert "metrics.csv" in unlike
    assert any(line.startswith("last.pt: ") for line in unlike)
    state = load_checkpoint(finished.last)
    for place in (state["model"], state["optimizer"]["state"][0]):
        tensor = next(t for t in place.values() if t.is_floating_point() and t.dim())
        tensor.view(-1)[0] += 1e-6
    torch.save(state, finished.last)
    predictions = read_arrays(finished.predictions_file("test", "scored"))
    predictions["logits"] = predictions["logits"] + 1e-6
    finished.write_arrays(finished.predictions_file("test", "scored"), **predictions)
    unlike = differences(tiny_finished, finished)
    assert any(line.startswith("last.pt: model.") for line in unlike)
    assert any(line.startswith("last.pt: optimizer.state") for line in unlike)
    assert "predictions.npz" in unlike


def test_a_kill_between_best_and_last_changes_nothing(
    stopped: RunDir, monkeypatch: pytest.MonkeyPatch, tiny_finished: RunDir
) -> None:
    def killed(self: RunDir, state: Any) -> None:
        raise KeyboardInterrupt  # as abrupt as it gets without ending the test

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "write_last", killed)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(stopped)
    saved = load_checkpoint(stopped.last)
    assert (saved["epoch"], saved["step"]) == (1, 3)  # of the end there is best.pt and a row
    assert load_checkpoint(stopped.best)["epoch"] == 2
    assert len(stopped.read_metrics()) == 2
    run_experiment(stopped)
    assert differences(tiny_finished, stopped) == []


def test_checkpoints_that_cost_much_are_written_where_they_have_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, write = [], RunDir.write_last

    def slow(self: RunDir, state: Any) -> None:
        saved.append((state["epoch"], state["step"]))
        write(self, state)
        time.sleep(0.5)

    monkeypatch.setattr(RunDir, "write_last", slow)
    run = make(tmp_path, "training.epochs=6", *NOTED)
    with pytest.raises(Stopped):
        run_experiment(run, stop=StopIn("train", 4, 3))
    assert saved == [(1, 0), (3, 3)]
    saved.clear()
    run_experiment(run)
    assert saved == [(4, 0), (6, 0)]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The first of the two epochs of `tiny_finished`, as a run of its own."""
    return train(tmp_path_factory.mktemp("first"), "training.epochs=1")


def test_a_run_that_is_trained_on_is_the_run_trained_through(
    tmp_path: Path, first: RunDir, tiny_finished: RunDir
) -> None:
    on = train(tmp_path, f"continue_from={first.path}")
    assert on.path != first.path
    assert on.read_summary().continued_from == str(first.path)
    assert [row.epoch for row in on.read_metrics()] == [1, 2]
    assert differences(tiny_finished, on) == []
    assert len(first.read_metrics()) == 1  # untouched


def test_a_run_that_continues_inherits_the_config(tmp_path: Path, first: RunDir) -> None:
    words = [f"continue_from={first.path}/", "training.epochs=2", f"output_dir={tmp_path}"]
    config, source = compose(words).runs[0].config, first.read_config()
    training = dataclasses.replace(source.training, epochs=2)
    expected: dict[str, Any] = {
        "training": training,
        "continue_from": str(first.path),
        "output_dir": str(tmp_path),
    }
    assert config == dataclasses.replace(source, **expected)
    other = compose([*words, "optimizer=sgd", "seed=5"]).runs[0].config
    assert (other.choices["optimizer"], other.optimizer["lr"], other.seed) == ("sgd", 0.01, 5)
    assert other.model == source.model


def test_a_run_that_was_trained_on_needs_the_first_one_only_to_begin(
    tmp_path: Path, first: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    source = RunDir(shutil.copytree(first.path, tmp_path / first.path.name))
    on = train(tmp_path, f"continue_from={source.path}")
    shutil.rmtree(source.path)
    assert train_command.main([str(on.path)]) == 0
    assert train_command.main([str(on.path), "rerun=true"]) == 2
    assert f"{source.path} is not a run folder" in capsys.readouterr().err
    on.write_summary(dataclasses.replace(on.read_summary(), status="interrupted"))
    assert train_command.main([str(on.path)]) == 0
    assert "resumed at epoch 3, step 0" in capsys.readouterr().out


def test_best_pt_is_where_it_starts_if_last_pt_was_not_kept(
    tmp_path: Path, first: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    source = RunDir(shutil.copytree(first.path, tmp_path / "outputs" / first.path.name))
    for path in source.path.glob("last*.pt"):
        path.unlink()
    with caplog.at_level("INFO", "cifar_lab"):
        on = train(tmp_path, f"continue_from={source.path}", "training.ema=0.9")
    assert "from best.pt, as last.pt was not kept" in caplog.text
    assert [row.epoch for row in on.read_metrics()] == [1, 2]
    assert on.read_metrics()[0] == source.read_metrics()[0]
    source.best.unlink()
    with pytest.raises(UsageError, match=r"neither last\.pt nor best\.pt"):
        train(tmp_path / "again", f"continue_from={source.path}")


def test_a_schedule_of_the_whole_run_starts_anew_over_the_added_epochs(
    tmp_path: Path, first: RunDir
) -> None:
    """9 steps, then 9 over the added epoch; a rate that was asked for is the one in use."""
    on = train(
        tmp_path, *("scheduler=cosine", "optimizer.lr=0.0001", f"continue_from={first.path}")
    )
    # the rate of the last step by hand: 1e-4 * (1 + cos(pi * 8 / 9)) / 2
    assert [row.learning_rate for row in on.read_metrics()] == [
        0.001,
        pytest.approx(3.01537e-6, rel=1e-4),
    ]


@pytest.mark.slow
def test_a_run_that_is_trained_on_resumes_too(tmp_path: Path, first: RunDir) -> None:
    config = config_of("training.epochs=3", "scheduler=cosine", f"continue_from={first.path}")
    assert "bit for bit" in resume_proof.prove(config, tmp_path, stops=3)[-1]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("split.seed=1", "another split"),
        ("model.hidden=8", "another model"),
        ("optimizer=sgd", r"another optimizer\._target_"),
        ("training.epochs=1", "set a larger number"),
    ],
)
def test_what_is_no_beginning_of_a_run_is_not_trained_on(
    override: str, words: str, first: RunDir, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        make(tmp_path / "on", f"continue_from={first.path}", override)
    assert not (tmp_path / "on").exists()


def test_an_unfinished_run_is_not_trained_on(stopped: RunDir, tmp_path: Path) -> None:
    run = make(tmp_path / "on", "training.epochs=3", f"continue_from={stopped.path}")
    with pytest.raises(Unavailable, match="is interrupted; finish it first"):
        run_experiment(run)
    assert run.status == "queued"


def again(run: RunDir, *overrides: str) -> RunDir:
    """Ask for the same run by its command line."""
    return make(run.path.parents[1], *RICH, *overrides)


def test_threads_are_kept_and_others_refused(stopped: RunDir) -> None:
    with pytest.raises(UsageError, match=r"threads=2 is wrong: .* was trained with 1"):
        again(stopped, "threads=2")
    assert load(stopped.config_file).threads == 1
    assert load(again(stopped, "threads=null").config_file).threads == 1
    anew = RunDir.create(dataclasses.replace(stopped.read_config(), threads=2), anew=True)
    assert load(anew.config_file).threads == 2


def test_settings_beside_the_address_are_taken_over(stopped: RunDir) -> None:
    def minutes() -> float | None:
        return load(stopped.config_file).training.checkpoint_minutes

    assert again(stopped, "training.checkpoint_minutes=1").path == stopped.path
    assert minutes() == 1
    with stopped.lock():  # at work: it keeps what it has read
        again(stopped, "training.checkpoint_minutes=2")
    assert minutes() == 1


def test_other_code_is_asked_about_before_it_goes_on(
    stopped: RunDir, monkeypatch: pytest.MonkeyPatch, tiny_finished: RunDir
) -> None:
    saved = stopped.last.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("cifar_lab.runs.summary.RESULTS_VERSION", 99)
        patch.setattr("cifar_lab.training.run.RESULTS_VERSION", 99)
        with pytest.raises(Unavailable, match="made by other code"):
            run_experiment(stopped)
        assert stopped.status == "interrupted"
        assert stopped.last.read_bytes() == saved
        run_experiment(stopped, accept_code=True)
        assert stopped.read_summary().results_version == 99
    with pytest.raises(Unavailable, match="rerun=true"):
        run_experiment(stopped)
    assert differences(tiny_finished, stopped) == []


def start(folder: Path, *overrides: str) -> "subprocess.Popen[str]":
    return started(*TINY, *overrides, f"output_dir={folder}")


def wait_for_rows(folder: Path, rows: int) -> RunDir:
    def found() -> list[Path]:
        tables = folder.rglob("metrics.csv")
        return [path for path in tables if len(path.read_text().splitlines()) > rows]

    wait_until(found, f"{rows} rows", 120)
    return RunDir(found()[0].parent)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_says_how_to_go_on_and_leaves(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    process = start(tmp_path, "training.epochs=400", "model.widths=[8,16]")
    run = wait_for_rows(tmp_path, 2)
    sent = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert time.monotonic() - sent < 5
    lines = [line for line in errors.splitlines() if line.startswith("cifar_lab:")]
    assert len(lines) == 1
    assert "everything is saved, the same command resumes from there" in lines[0]
    assert "Traceback" not in errors
    assert run.status == "interrupted"
    saved = load_checkpoint(run.last)
    assert saved["epoch"] >= 2


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    """A step that never ends: the first Ctrl-C waits for it, the second does not."""
    code = (
        "import time, cifar_lab.training.run as e, cifar_lab.train as t\n"
        "def stuck(*a, **k):\n"
        "    print('stuck', flush=True)\n"
        "    while True: time.sleep(0.1)\n"
        "    yield\n"
        "e.fit = stuck\n"
        "import sys; sys.exit(t.main(sys.argv[1:]))\n"
    )
    line = [sys.executable, "-c", code, *TINY, f"output_dir={tmp_path}"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while process.stdout.readline() != "stuck\n":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - sent < 10  # the interpreter's own end, on busy cores
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL on Windows")
def test_kill_9_loses_at_most_what_came_after_the_last_checkpoint(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    overrides = ["training.epochs=12", "threads=1"]
    kills = 0
    for rows in (2, 5, 8):
        process = start(tmp_path, *overrides)
        run = wait_for_rows(tmp_path, rows)
        process.kill()
        process.communicate(timeout=60)
        kills += process.returncode == -signal.SIGKILL
        assert run.status in ("interrupted", "finished")
        checkpoint = run.read_last()
        assert checkpoint is not None  # of the first epoch, or of a later one if it was cheap
        assert checkpoint["epoch"] >= 1
    assert kills >= 2
    process = start(tmp_path, *overrides)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    through = train(tmp_path_factory.mktemp("through"), *overrides)
    assert differences(through, run) == []
    assert not list(run.path.rglob("*.tmp"))
