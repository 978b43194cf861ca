"""Real trackers: an MLflow server with a database, trackio's local store, W&B offline."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import TINY, make, wait_until
from tracker_places import CURVES, PLACES, Place, check_tracked, no_users_tracker

from cifar_lab.runs.run_dir import find_runs
from cifar_lab.training.run import run_experiment

__all__ = ["no_users_tracker"]  # a fixture that is used by being here

WAIT = "tracker.wait_seconds=300"  # of a machine that does much else


@pytest.fixture(params=list(PLACES))
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    """A real tracker, empty; its project is the name of its folder."""
    folder = tmp_path / "lab"
    folder.mkdir()
    made: Place = PLACES[request.param](folder)
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    yield made
    made.close()


def command(tmp_path: Path, place: Place, *overrides: str) -> list[str]:
    line = [sys.executable, "-m", "cifar_lab.train", *TINY, *CURVES, *place.overrides]
    return [*line, f"output_dir={tmp_path / 'out'}", "name=lab", WAIT, *overrides]


@pytest.mark.slow
def test_kill_9_and_resume_is_one_run_at_the_tracker(place: Place, tmp_path: Path) -> None:
    line = command(tmp_path, place, "training.epochs=25")
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def has_sent_an_epoch() -> bool:
        assert process.poll() is None
        sent = list((tmp_path / "out").rglob("trackers.json"))
        return bool(sent) and '"epochs": 0' not in sent[0].read_text()

    wait_until(has_sent_an_epoch, "an epoch at the tracker", 240)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (run,) = find_runs(tmp_path / "out")
    assert run.status == "interrupted"
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "python -m cifar_lab.track" not in done.stderr
    (tracked,) = place.runs().values()
    check_tracked(run, tracked)


@pytest.mark.slow
def test_the_cells_of_a_sweep_are_grouped_by_their_setting(place: Place, tmp_path: Path) -> None:
    line = command(tmp_path, place, "seed=0,1", "optimizer.lr=0.001,0.01", "-m", "jobs=2")
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    by_folder = {tracked.settings["folder"]: tracked for tracked in place.runs().values()}
    runs = find_runs(tmp_path / "out")
    assert len(by_folder) == len(runs) == 4
    groups: dict[str | None, list[float]] = {}
    for run in runs:
        tracked = by_folder[str(run.path.resolve())]
        check_tracked(run, tracked)
        groups.setdefault(tracked.group, []).append(run.read_config().optimizer["lr"])
    assert sorted(groups.values()) == [[0.001] * 2, [0.01] * 2]


@pytest.mark.slow
def test_wandb_offline_has_the_epochs_the_scores_and_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = make(tmp_path, "tracker=wandb", WAIT, *CURVES)
    run_experiment(run)
    (entry,) = json.loads(run.trackers_file.read_text()).values()
    assert entry["complete"]
    (file,) = tmp_path.glob(f"wandb/offline-run-*-{entry['key']}/run-{entry['key']}.wandb")
    content = file.read_bytes()  # protocol buffers with the names as they are
    for name in ("val_accuracy", "result/test_accuracy", "optimizer.lr", "figures/curves"):
        assert name.encode() in content
