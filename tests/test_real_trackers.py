"""Real trackers: an MLflow server with a database, trackio's local store, W&B offline."""

import contextlib
import csv
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest
from tiny_runs import TINY, make, wait_until

from cifar_lab.runs.run_dir import RunDir, find_runs
from cifar_lab.training.run import run_experiment

CURVES = ("figures=none", "+figures.curves._target_=cifar_lab.figures.curves.draw")


@pytest.fixture(scope="module", autouse=True)
def no_users_tracker() -> Iterator[None]:
    """Keep the settings and the data of whoever runs the tests out of them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("MLFLOW_", "WANDB_", "TRACKIO_")):
                patch.delenv(name)
        yield


class Tracked:
    """A run as a tracker has it: its columns as (step, value), scores, settings, figures."""

    def __init__(self) -> None:
        self.columns: dict[str, list[tuple[int, float]]] = {}
        self.scores: dict[str, float] = {}
        self.settings: dict[str, str] = {}
        self.figures: set[str] = set()
        self.group: str | None = None

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Sort the values of a step into columns, scores and figures."""
        for name, value in values.items():
            if name.startswith("figures/"):
                self.figures.add(name.removeprefix("figures/"))
            elif name.startswith("result/"):
                self.scores[name] = value
            elif not name.startswith("_"):
                self.columns.setdefault(name, []).append((step, value))


class Place(Protocol):
    """Where a tracker keeps its runs, and how they are read back."""

    overrides: list[str]
    environment: dict[str, str]

    def __init__(self, folder: Path) -> None: ...
    def runs(self) -> Mapping[str, Tracked]: ...
    def close(self) -> None: ...


class MLflowPlace:
    """An MLflow server on this machine, with a database."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self.environment = {"MLFLOW_TRACKING_URI": self.uri}
        self.overrides = ["tracker=mlflow"]
        options = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--port", str(port)]
        options += ["--artifacts-destination", str(folder / "artifacts"), "--workers", "1"]
        line = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", *options]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        log = folder / "server.log"
        with log.open("wb") as out:
            self.server = subprocess.Popen(
                line, stdout=out, stderr=out, cwd=folder, env=environment, start_new_session=True
            )
        wait_until(self.answers, f"MLflow's server, see {log}", 240)

    def close(self) -> None:
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait(30)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=60):
                return True
        except OSError:
            return False

    def runs(self) -> Mapping[str, Tracked]:
        from mlflow import MlflowClient

        client = MlflowClient(self.uri)
        experiment = client.get_experiment_by_name(self.folder.name)
        assert experiment is not None
        by_id = {}
        for run in client.search_runs([experiment.experiment_id]):
            assert run.info.status == "FINISHED"
            tracked = by_id[run.info.run_id] = Tracked()
            tracked.settings = run.data.params | run.data.tags
            tracked.group = run.data.tags["group"]
            for name in run.data.metrics:
                for point in client.get_metric_history(run.info.run_id, name):
                    tracked.add(point.step, {name: point.value})
            files = client.list_artifacts(run.info.run_id, "figures")
            tracked.figures = {Path(file.path).stem for file in files}
        return by_id


class TrackioPlace:
    """trackio's store on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1"}
        self.overrides = ["tracker=trackio"]

    def close(self) -> None:
        pass

    def runs(self) -> Mapping[str, Tracked]:
        by_name: dict[str, Tracked] = {}
        (path,) = self.folder.glob("*.db")
        with contextlib.closing(sqlite3.connect(path)) as store:
            for name, config in store.execute("SELECT run_name, config FROM configs"):
                settings = json.loads(config)
                tracked = by_name.setdefault(name, Tracked())
                tracked.settings = {key: str(value) for key, value in settings.items()}
                tracked.group = settings["_Group"]
            lines = "SELECT run_name, step, metrics FROM metrics ORDER BY step"
            for name, step, values in store.execute(lines):
                by_name[name].add(step, json.loads(values))
        return by_name


PLACES: dict[str, Callable[[Path], Place]] = {"mlflow": MLflowPlace, "trackio": TrackioPlace}


def check_tracked(run: RunDir, tracked: Tracked) -> None:
    """Check that a tracker has all of a run, and each epoch once."""
    with run.metrics_file.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    for column in ("train_loss", "val_accuracy", "learning_rate", "seconds"):
        steps, values = zip(*tracked.columns[column], strict=True)
        assert list(steps) == [int(row["epoch"]) for row in rows]
        if column != "seconds":  # an epoch that was lost by kill -9 is trained again
            assert values == pytest.approx([float(row[column]) for row in rows])
    summary = run.read_summary()
    assert tracked.scores["result/test_accuracy"] == pytest.approx(summary.test_accuracy)
    assert tracked.scores["result/best_epoch"] == summary.best_epoch
    assert tracked.settings["optimizer.lr"] == str(run.read_config().optimizer["lr"])
    assert tracked.settings["folder"] == str(run.path.resolve())
    assert tracked.figures == {"curves"}


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
