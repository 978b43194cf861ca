"""Trackers get what the folder of a run holds, and can neither stop a run nor change it."""

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fixtures import Capture, Patch
from test_real_trackers import CURVES, no_users_tracker
from tiny_runs import TINY, assert_same_result, make, train

from cifar_lab import track
from cifar_lab import train as train_command
from cifar_lab.errors import Stopped
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.loop import Progress, Stop
from cifar_lab.training.preflight import compose_checked
from cifar_lab.training.run import run_experiment

__all__ = ["no_users_tracker"]  # a fixture that is used by being here


@pytest.mark.slow
def test_tensorboard_gets_a_run_with_its_figures_and_changes_no_bit_of_it(tmp_path: Path) -> None:
    plain, run = (
        train(tmp_path / folder, *CURVES, f"tracker={folder}") for folder in ("none", "tensorboard")
    )
    assert run.path.name == plain.path.name
    assert_same_result(plain, run)
    read = check_events(run)
    (image,) = read.Images("figures/curves")
    assert image.encoded_image_string == (run.figures / "curves.png").read_bytes()
    start = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"optimizer.lr" in start


def events(run: RunDir) -> Any:
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    read: Any = module.EventAccumulator(str(run.path / "tensorboard"))
    read.Reload()
    return read


def check_events(run: RunDir) -> Any:
    """Check that each epoch is in the events once, and that the final scores are."""
    read = events(run)
    scalars = read.Scalars("val_accuracy")
    assert [event.step for event in scalars] == [row.epoch for row in run.read_metrics()]
    values = [row.val_accuracy for row in run.read_metrics()]
    assert [event.value for event in scalars] == pytest.approx(values)
    (score,) = read.Scalars("result/test_accuracy")
    assert score.value == pytest.approx(run.read_summary().test_accuracy)
    return read


class StopAfterEpoch2(Stop):
    def is_wanted(self, progress: Progress) -> bool:
        return progress.kind == "epoch" and progress.epoch == 2


@pytest.mark.slow
def test_a_resumed_run_adds_to_its_events_and_rerun_starts_new_ones(tmp_path: Path) -> None:
    asked = ("tracker=tensorboard", "training.epochs=4")
    run = make(tmp_path, *asked)
    with pytest.raises(Stopped):
        run_experiment(run, stop=StopAfterEpoch2())
    before = json.loads(run.trackers_file.read_text())
    assert before["tensorboard"]["epochs"] == 2
    train(tmp_path, *asked)
    check_events(run)
    assert len(list((run.path / "tensorboard").iterdir())) == 2
    after = json.loads(run.trackers_file.read_text())
    assert after["tensorboard"]["key"] == before["tensorboard"]["key"]
    assert after["tensorboard"]["complete"]
    train(tmp_path, *asked, rerun=True)
    check_events(run)
    again = json.loads(run.trackers_file.read_text())
    assert again["tensorboard"]["key"] != before["tensorboard"]["key"]


FAKE = '''
import os
import subprocess
import time
from dataclasses import dataclass

from cifar_lab.trackers import Tracker

@dataclass(frozen=True, kw_only=True)
class Fake(Tracker):
    """A tracker that fails in the way that is asked for, and tells the environment's secrets."""

    how: str = "is full"
    package = "json"
    title = "Fake"

    def destination(self, project):
        return f"nowhere {os.environ.get('MLFLOW_TRACKING_URI')}"

    def open(self, run):
        if self.how == "hangs":
            time.sleep(3600)
        if self.how == "dies":
            os._exit(3)
        told = {name: text for name, text in os.environ.items() if "hushed" in text}
        print(told, flush=True)
        subprocess.run(["env"])  # as a client's own processes print
        raise OSError(f"no space left {told}\\nsecond line")
'''
TO_FAKE = ("+tracker._target_=fake_tracker.Fake", "--trust", "fake_tracker")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "fake_tracker.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("hangs", "Fake: it did not take everything within 0.5 seconds"),
        ("dies", "Fake: its process ended"),
        ("is full", "Fake: OSError: no space left"),
    ],
)
@pytest.mark.usefixtures("fake")
def test_a_tracker_that_fails_costs_one_warning_and_no_run(
    how: str, words: str, tmp_path: Path
) -> None:
    run = train(
        tmp_path,
        "trust=[fake_tracker]",
        "+tracker._target_=fake_tracker.Fake",
        f"+tracker.how={how}",
        "+tracker.wait_seconds=0.5" if how == "hangs" else "+tracker.wait_seconds=30",
        "training.epochs=4",
    )
    assert run.status == "finished"
    (warning,) = [line for line in run.log_file.read_text().splitlines() if "Fake" in line]
    assert words in warning
    assert f"python -m cifar_lab.track {run.path} " in warning


@pytest.mark.slow
@pytest.mark.usefixtures("fake")
def test_track_gives_up_on_a_tracker_that_hangs(finished: RunDir) -> None:
    line = [sys.executable, "-m", "cifar_lab.track", str(finished.path), *TO_FAKE]
    line += ["+tracker.how=hangs", "+tracker.wait_seconds=0.5"]
    ended = subprocess.run(line, capture_output=True, text=True, check=False)
    assert ended.returncode == 3
    (said,) = ended.stderr.splitlines()
    assert "was not sent: the tracker gave no answer within 0.5 seconds" in said


SECRETS = {
    "MLFLOW_TRACKING_URI": "http://hushed-me:hushed-1@127.0.0.1:9/api?token=hushed-2",
    "MLFLOW_TRACKING_PASSWORD": "hushed-3",
    "MLFLOW_TRACKING_TOKEN": "hushed-4",
    "DATABRICKS_TOKEN": "hushed-5",
    "AWS_SECRET_ACCESS_KEY": "hushed-6",
    "WANDB_API_KEY": "hushed-7-" + 31 * "0",
    "WANDB_BASE_URL": "http://hushed-me:hushed-8@127.0.0.1:9",
    "TRACKIO_SERVER_URL": "http://127.0.0.1:9/?write_token=hushed-9",
    "TRACKIO_WRITE_TOKEN": "hushed-10",
    "HF_TOKEN": "hf_hushed-11",
}


def check_hushed(folder: Path, *printed: str) -> None:
    """Check that no secret is in what was printed nor in any file of a folder."""
    for text in printed:
        assert "hushed" not in text
    for path in folder.rglob("*"):
        assert not path.is_file() or b"hushed" not in path.read_bytes(), path


@pytest.mark.parametrize("follow", [(), ("--follow",)])
@pytest.mark.usefixtures("fake")
def test_no_password_is_printed_or_written(
    follow: tuple[str, ...], finished: RunDir, monkeypatch: Patch, capfd: Capture
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    assert track.main([str(finished.path), *TO_FAKE, *follow]) in (1, 3)
    printed = capfd.readouterr()
    assert "MLFLOW_TRACKING_TOKEN=***" in printed.err
    assert "no space left" in printed.err
    assert "127.0.0.1:9" in finished.trackers_file.read_text()
    check_hushed(finished.path, *printed)


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["mlflow", "wandb", "trackio", "tensorboard"])
def test_no_password_of_a_real_tracker_is_printed_or_written(tracker: str, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "cifar_lab.train", *TINY, f"tracker={tracker}"]
    line += [f"output_dir={tmp_path / 'out'}", "tracker.wait_seconds=20"]
    environment = {**os.environ, **SECRETS, "WANDB_DIR": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        line, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    check_hushed(tmp_path / "out", done.stdout, done.stderr)


def test_a_missing_package_is_one_line_that_names_the_extra(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert train_command.main([*TINY, f"output_dir={tmp_path / 'out'}", "tracker=mlflow"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install -e '.[mlflow]'" in line
    assert not (tmp_path / "out").exists()


def test_track_sends_a_finished_run_once(finished: RunDir, capsys: Capture) -> None:
    folder = str(finished.path.parent)
    assert track.main([folder, "tracker=tensorboard"]) == 0
    assert capsys.readouterr().out == f"{finished.path}: sent\n"
    read = check_events(finished)
    (text,) = read.Tensors("settings")
    table = text.tensor_proto.string_val[0].decode()
    assert "| optimizer.lr | 0.001 |" in table
    assert f"| folder | {finished.path.resolve()} |" in table
    assert track.main(["tracker=tensorboard", folder]) == 0
    assert capsys.readouterr().out == f"{finished.path}: was there already\n"
    assert len(list((finished.path / "tensorboard").iterdir())) == 1


def test_track_goes_on_after_a_damaged_folder_and_says_so(
    finished: RunDir, capsys: Capture
) -> None:
    other = make(finished.path.parents[1], "seed=5")
    other.summary_file.write_text("{")
    assert track.main([str(other.path.parent), "tracker=tensorboard"]) == 1
    printed = capsys.readouterr()
    assert f"{finished.path}: sent" in printed.out
    assert str(other.summary_file) in printed.err


def test_the_checks_of_a_tracker_contact_nobody() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.1)
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        compose_checked([*TINY, "tracker=mlflow", f"tracker.uri={uri}"])
        with pytest.raises(TimeoutError):
            server.accept()
