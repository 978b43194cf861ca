"""A run that was stopped, anywhere and in any way, ends as one that never stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TINY, StopAt, at_yield, every_step, make, train

from cifar_lab import prove_resume
from cifar_lab.analysis import resume_proof
from cifar_lab.analysis.run_differences import differences
from cifar_lab.config.run_config import load
from cifar_lab.errors import RunFailed, Stopped, Unavailable, UsageError
from cifar_lab.runs.checkpoints import load_checkpoint
from cifar_lab.runs.metrics import EpochMetrics
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.preflight import check, compose_checked
from cifar_lab.training.run import run_experiment

KINDS = {
    "adam": [],
    "sgd": ["optimizer=sgd", "optimizer.momentum=0.9"],
    "plateau": ["scheduler=reduce_on_plateau", "scheduler.patience=0"],
    "ema": ["training.ema=0.99"],
    "patience": ["training.patience=1", "training.min_delta=0.5", "training.epochs=6"],
}
MORE_KINDS = {
    "augmented": [
        *("augmentation.policy=trivial_augment", "augmentation.cutout=8"),
        *("augmentation.mixup=0.2", "augmentation.cutmix=1", "training.class_weights=balanced"),
    ],
    "weighted_classes_clipped": ["training.class_weights=balanced", "training.clip_grad_norm=0.5"],
    "one_cycle": ["scheduler=one_cycle"],
    "cosine": ["scheduler=cosine"],
    "subset": ["split.sampler=subset"],
    "weighted": ["split.sampler=weighted"],
    "bf16": ["precision=bf16"],
    "steps": ["training.step_history=true", "evaluation.watch_test=true"],
    "amsgrad": ["optimizer.amsgrad=true", "training.label_smoothing=0.1"],
}


@pytest.mark.parametrize(
    "overrides",
    [
        *(pytest.param(o, id=name) for name, o in KINDS.items()),
        *(pytest.param(o, id=name, marks=pytest.mark.slow) for name, o in MORE_KINDS.items()),
    ],
)
def test_a_run_stopped_at_random_steps_is_the_run_that_never_stopped(
    overrides: list[str], tmp_path: Path
) -> None:
    config = compose_checked([*TINY, *overrides]).runs[0].config
    lines = resume_proof.prove(config, tmp_path, stops=3, seed=len(overrides))
    assert "3 stops" in lines[-1]
    assert "bit for bit" in lines[-1]


@pytest.mark.slow
def test_twenty_stops(tmp_path: Path) -> None:
    config = compose_checked([*TINY, "training.epochs=4"]).runs[0].config
    lines = resume_proof.prove(config, tmp_path, stops=20)
    assert len(lines) == 21


def test_the_proof_finds_a_run_that_is_another_one(tmp_path: Path) -> None:
    one = train(tmp_path, "training.epochs=1")
    other = train(tmp_path, "training.epochs=1", "seed=1")
    found = differences(one, other)
    assert {"metrics.csv", "predictions.npz"} <= set(found)
    assert any(line.startswith("last.pt: model.") for line in found)
    assert any(line.startswith("last.pt: optimizer.state") for line in found)
    assert any(line.startswith("best.pt") for line in found)


def test_the_proof_fails_when_something_is_not_in_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(self: Any, state: dict[str, Any], *, load: Any = None) -> None:
        whole(self, state)
        self.generator.manual_seed(7)

    from cifar_lab.training.state import TrainState

    whole = TrainState.load_state_dict
    monkeypatch.setattr(TrainState, "load_state_dict", forgetful)
    config = compose_checked([*TINY, "training.epochs=1"]).runs[0].config
    with pytest.raises(RunFailed, match=r"another one: last\.pt"):
        resume_proof.prove(config, tmp_path, stops=3)


def test_the_proof_as_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert prove_resume.main([*TINY, "training.epochs=1", "--stops", "1"]) == 0
    assert "1 stops on cpu" in capsys.readouterr().out
    assert prove_resume.main([*TINY, "--stops", "0"]) == 2
    assert prove_resume.main([*TINY, "optimizer.lrr=1"]) == 2


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return train(tmp_path_factory.mktemp("reference"))


def test_a_kill_between_best_and_last_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: RunDir
) -> None:
    run = make(tmp_path)
    calls = []

    def killed(self: RunDir, state: Any) -> None:
        calls.append(state["epoch"])
        if state["epoch"] == 2:
            raise KeyboardInterrupt  # as abrupt as it gets without ending the test

    monkeypatch.setattr(RunDir, "write_last", killed)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(run)
    monkeypatch.undo()
    assert calls == [1, 2]
    assert not run.last.exists()  # nothing of epoch 2 but best.pt and a row
    assert len(run.read_metrics()) == 2
    run_experiment(run)
    assert differences(reference, run) == []


def test_a_stop_within_validation_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: RunDir
) -> None:
    every_step(monkeypatch)
    run = make(tmp_path)
    steps = len(range(0, 537, 64))
    with pytest.raises(Stopped):
        run_experiment(run, stop=StopAt(steps + 3))
    saved = load_checkpoint(run.last)
    assert (saved["epoch"], saved["step"]) == (0, steps)
    assert run.status == "interrupted"
    run_experiment(run)
    assert differences(reference, run) == []


def test_a_row_torn_by_a_crash_is_written_again(tmp_path: Path, reference: RunDir) -> None:
    run = make(tmp_path)
    with pytest.raises(Stopped):
        run_experiment(run, stop=StopAt(6))
    with run.metrics_file.open("a") as handle:
        handle.write("2,0.001,2.1")
    assert all(isinstance(row, EpochMetrics) for row in run.read_metrics())
    run_experiment(run)
    assert [row.epoch for row in run.read_metrics()] == [1, 2]
    assert differences(reference, run) == []


def test_runs_before_and_beside_change_nothing(tmp_path: Path, reference: RunDir) -> None:
    """Two runs interleaved step by step in one process, after others, with other seeds."""
    from cifar_lab.training.build import build_state
    from cifar_lab.training.data import load_splits
    from cifar_lab.training.loop import fit

    def start(config: Any) -> Any:
        splits = load_splits(config, "cpu")
        state, batches = build_state(config, splits, "cpu")
        return state, fit(state, batches, splits.validation, config.training)

    config = reference.read_config()
    other = compose_checked([*TINY, "seed=5", "optimizer=sgd"]).runs[0].config
    with pytest.MonkeyPatch.context() as patch:
        every_step(patch)
        (state, mine), (_, theirs) = start(config), start(other)
        for _ in mine:
            torch.rand(3)  # somebody else's draws
            next(theirs, None)
    expected = load_checkpoint(reference.last)
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(tensor, expected["model"][name]), name
    rows = [(r.train_loss, r.val_loss, r.val_accuracy) for r in state.history]
    assert rows == [(r.train_loss, r.val_loss, r.val_accuracy) for r in reference.read_metrics()]


def test_a_failed_run_is_tried_again_from_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: RunDir
) -> None:
    every_step(monkeypatch)

    def crash() -> None:
        raise ValueError("cosmic ray")

    run = make(tmp_path)
    with monkeypatch.context() as patch:
        at_yield(patch, 16 + 12, crash)
        with pytest.raises(RunFailed, match="cosmic ray"):
            run_experiment(run)
    assert run.status == "failed"
    assert run.read_summary().error == "ValueError: cosmic ray"
    assert "Traceback" in run.log_file.read_text()
    assert load_checkpoint(run.last)["epoch"] == 1
    assert run_experiment(run).status == "finished"
    assert run.read_summary().error is None
    assert differences(reference, run) == []


# --- training on ------------------------------------------------------------------------------


def test_a_run_that_is_trained_on_is_the_run_trained_through(
    tmp_path: Path, reference: RunDir
) -> None:
    first = train(tmp_path, "training.epochs=1")
    on = train(tmp_path, f"continue_from={first.path}")
    assert on.path != first.path
    assert on.read_summary().continued_from == str(first.path)
    assert [row.epoch for row in on.read_metrics()] == [1, 2]
    assert differences(reference, on) == []
    assert len(first.read_metrics()) == 1  # untouched


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        # 9 steps, then 18 over the two added epochs: the rate of an epoch's last step by hand,
        # 1e-3 * (1 + cos(pi * step / length)) / 2 at 8 of 9, 8 of 18 and 17 of 18
        (
            "cosine",
            lambda r: (
                r == [pytest.approx(v, rel=1e-4) for v in (3.01537e-5, 5.86824e-4, 7.59612e-6)]
            ),
        ),
        ("reduce_on_plateau", lambda r: r[-1] <= r[0]),
    ],
)
def test_a_schedule_of_the_whole_run_starts_anew_over_the_added_epochs(
    scheduler: str, rates: Any, tmp_path: Path
) -> None:
    first = train(tmp_path, "training.epochs=1", f"scheduler={scheduler}")
    overrides = ["training.epochs=3", f"scheduler={scheduler}", f"continue_from={first.path}"]
    on = train(tmp_path, *overrides)
    assert rates([row.learning_rate for row in on.read_metrics()])


def test_training_on_with_another_rate_uses_it(tmp_path: Path) -> None:
    first = train(tmp_path, "training.epochs=1")
    on = train(tmp_path, "optimizer.lr=0.0001", f"continue_from={first.path}")
    assert [row.learning_rate for row in on.read_metrics()] == [0.001, 0.0001]


@pytest.mark.slow
def test_a_run_that_is_trained_on_resumes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every_step(monkeypatch)
    first = train(tmp_path / "a", "training.epochs=1", "scheduler=cosine")
    overrides = ["training.epochs=3", "scheduler=cosine", f"continue_from={first.path}"]
    through = train(tmp_path / "b", *overrides)
    run = make(tmp_path / "c", *overrides)
    for _ in range(3):
        with pytest.raises(Stopped):
            run_experiment(run, stop=StopAt(7))
    run_experiment(run)
    assert differences(through, run) == []
    assert run.read_summary().continued_from == str(first.path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("split.seed=1", "another split"),
        ("split.validation=800", "another split"),
        ("model.hidden=8", "another model"),
        ("optimizer=sgd", r"another optimizer\._target_"),
        ("training.epochs=1", "set a larger number"),
    ],
)
def test_what_is_no_beginning_of_a_run_is_not_trained_on(
    override: str, words: str, tmp_path: Path
) -> None:
    first = make(tmp_path, "training.epochs=1")
    with pytest.raises(UsageError, match=words):
        make(tmp_path / "on", f"continue_from={first.path}", override)
    assert not (tmp_path / "on").exists()


def test_an_unfinished_run_is_not_trained_on(tmp_path: Path) -> None:
    first = make(tmp_path, "training.epochs=1")
    run = make(tmp_path, f"continue_from={first.path}")
    with pytest.raises(Unavailable, match="is queued; finish it first"):
        run_experiment(run)
    assert run.status == "queued"


# --- threads, code, settings ---------------------------------------------------------------------


def test_threads_are_kept_and_others_refused(tmp_path: Path) -> None:
    run = make(tmp_path)
    with pytest.raises(Stopped):
        run_experiment(run, stop=StopAt(1))
    with pytest.raises(UsageError, match=r"threads=2 is wrong: .* was trained with 1"):
        make(tmp_path, "threads=2")
    assert load(run.config_file).threads == 1
    assert make(tmp_path, "threads=null").read_config().threads == 1


def test_settings_beside_the_address_are_taken_over(tmp_path: Path) -> None:
    run = make(tmp_path)
    again = make(tmp_path, "training.checkpoint_minutes=1", "training.keep_last=false")
    assert again.path == run.path
    assert RunDir(run.path).read_config().training.checkpoint_minutes == 1
    with run.lock():  # at work: it keeps what it has read
        make(tmp_path, "training.checkpoint_minutes=2")
    assert RunDir(run.path).read_config().training.checkpoint_minutes == 1


def test_other_code_is_asked_about_before_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: RunDir
) -> None:
    run = make(tmp_path)
    with pytest.raises(Stopped):
        run_experiment(run, stop=StopAt(1))
    saved = run.last.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("cifar_lab.runs.provenance.RESULTS_VERSION", 99)
        patch.setattr("cifar_lab.training.run.RESULTS_VERSION", 99)
        with pytest.raises(Unavailable, match="made by other code"):
            run_experiment(run)
        assert run.status == "interrupted"
        assert run.last.read_bytes() == saved
        run_experiment(run, accept_code=True)
        assert run.read_summary().results_version == 99
    with pytest.raises(Unavailable, match="rerun=true"):
        run_experiment(run)
    assert differences(reference, run) == []


def test_a_finished_run_is_left_alone_and_rerun_runs_it(reference: RunDir, tmp_path: Path) -> None:
    run = train(tmp_path, "training.epochs=1")
    before = run.last.stat().st_mtime_ns
    run_experiment(run)
    assert run.last.stat().st_mtime_ns == before
    again = run_experiment(run, rerun=True)
    assert again.status == "finished"
    assert run.last.stat().st_mtime_ns > before


# --- real signals in real processes ------------------------------------------------------------

LONG = ["training.epochs=400", "model.widths=[8,16]"]


def start(folder: Path, *overrides: str) -> "subprocess.Popen[str]":
    line = [sys.executable, "-m", "cifar_lab.train", *TINY, *overrides, f"output_dir={folder}"]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_rows(folder: Path, rows: int) -> RunDir:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for path in folder.rglob("metrics.csv"):
            if len(path.read_text().splitlines()) > rows:
                return RunDir(path.parent)
        time.sleep(0.05)
    raise TimeoutError(f"{rows} rows did not come")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_says_how_to_go_on_and_leaves(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    process = start(tmp_path, *LONG)
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
        assert checkpoint is not None
        assert checkpoint["epoch"] >= rows - 1
    assert kills >= 2
    process = start(tmp_path, *overrides)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    through = train(tmp_path_factory.mktemp("through"), *overrides)
    assert differences(through, run) == []
    assert not list(run.path.rglob("*.tmp"))


def test_the_checked_config_of_a_run_is_the_run(reference: RunDir) -> None:
    assert check(reference.read_config()) == reference.read_config()
