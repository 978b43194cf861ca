"""Real trackers on this machine: where their runs are, and how they are read back."""

import csv
import importlib
import json
import os
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cifar_lab.runs.run_dir import RunDir

CURVES = ("figures=none", "+figures.curves._target_=cifar_lab.figures.curves.draw")


@pytest.fixture(scope="module", autouse=True)
def no_users_tracker() -> Iterator[None]:
    """Keep the settings and the data of whoever runs the tests out of them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("MLFLOW_", "WANDB_", "TRACKIO_")):
                patch.delenv(name)
        yield


class Found:
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


class Place:
    """Where a tracker keeps its runs, and how they are read back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.overrides: list[str] = []
        self.environment: dict[str, str] = {}

    def runs(self) -> Mapping[str, Found]:
        """Return the runs by their ids."""
        raise NotImplementedError

    def close(self) -> None:
        """End what was started."""


class MLflowPlace(Place):
    """An MLflow server on this machine, with a database."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self.environment = {"MLFLOW_TRACKING_URI": self.uri}
        self.overrides = ["tracker=mlflow"]
        self.log = (folder / "server.log").open("wb")
        options = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--port", str(port)]
        options += ["--artifacts-destination", str(folder / "artifacts"), "--workers", "1"]
        line = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", *options]
        self.server = subprocess.Popen(
            line,
            stdout=self.log,
            stderr=self.log,
            cwd=folder,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            start_new_session=True,
        )
        deadline = time.monotonic() + 240
        while True:
            try:
                self.get("/health")
                return
            except OSError:
                assert time.monotonic() < deadline, (folder / "server.log").read_text()
                time.sleep(0.5)

    def close(self) -> None:
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait(30)
        self.log.close()

    def get(self, path: str, data: Any = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.uri + path, body)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text.startswith(b"{") else text

    def runs(self) -> Mapping[str, Found]:
        api = "/api/2.0/mlflow"
        listed = self.get(f"{api}/experiments/search", {"max_results": 100})["experiments"]
        ids = [one["experiment_id"] for one in listed if one["name"] == self.folder.name]
        found = {}
        for run in self.get(f"{api}/runs/search", {"experiment_ids": ids}).get("runs", []):
            name, one = run["info"]["run_id"], Found()
            assert run["info"]["status"] == "FINISHED"
            tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
            one.settings = {p["key"]: p["value"] for p in run["data"]["params"]} | tags
            one.group = tags["group"]
            for metric in run["data"]["metrics"]:
                query = f"run_id={name}&metric_key={metric['key']}"
                for point in self.get(f"{api}/metrics/get-history?{query}")["metrics"]:
                    one.add(point["step"], {metric["key"]: point["value"]})
            files = self.get(f"{api}/artifacts/list?run_id={name}&path=figures").get("files", [])
            one.figures = {Path(file["path"]).stem for file in files}
            found[name] = one
        return found


class WandBPlace(Place):
    """W&B without a network: files for `wandb sync`, one folder for each part of a run."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.environment = {"WANDB_DIR": str(folder), "WANDB_MODE": "offline"}
        self.overrides = ["tracker=wandb"]

    def runs(self) -> Mapping[str, Found]:
        found: dict[str, Found] = {}
        for path in sorted(self.folder.glob("wandb/offline-run-*/run-*.wandb")):
            one = found.setdefault(path.stem.removeprefix("run-"), Found())
            for record in wandb_records(path):
                kind = record.WhichOneof("record_type")
                if kind == "run":
                    assert record.run.run_id == path.stem.removeprefix("run-")
                    one.group = record.run.run_group
                    for item in record.run.config.update:
                        one.settings[item.key] = str(json.loads(item.value_json))
                elif kind == "history":
                    values = {
                        item.key or item.nested_key[0]: json.loads(item.value_json)
                        for item in record.history.item
                    }
                    one.add(record.history.step.num, values)
                elif kind == "summary":
                    for item in record.summary.update:
                        name = item.key or item.nested_key[0]
                        if name.startswith("result/"):
                            one.scores[name] = json.loads(item.value_json)
        return found


def wandb_records(path: Path) -> Iterator[Any]:
    """Yield the records of a file that W&B wrote: protocol buffers in LevelDB's log format."""
    proto: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")

    data, block = path.read_bytes(), 32768
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        if block - position % block < 7:  # no header fits there
            position += block - position % block
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        part = data[position + 7 : position + 7 + length]
        if kind == 0 or len(part) < length:  # the process was killed while it wrote
            return
        parts = part if kind in (1, 2) else parts + part  # 1: whole; 2, 3, 4: first, middle, last
        position += 7 + length
        if kind in (1, 4):
            yield proto.Record.FromString(parts)


class TrackioPlace(Place):
    """trackio's store on this machine."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.environment = {"TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1"}
        self.overrides = ["tracker=trackio"]

    def runs(self) -> Mapping[str, Found]:
        found: dict[str, Found] = {}
        (path,) = self.folder.glob("*.db")
        with sqlite3.connect(path) as store:
            for name, config in store.execute("SELECT run_name, config FROM configs"):
                settings = json.loads(config)
                one = found.setdefault(name, Found())
                one.settings = {key: str(value) for key, value in settings.items()}
                one.group = settings["_Group"]
            lines = "SELECT run_name, step, metrics FROM metrics ORDER BY step"
            for name, step, values in store.execute(lines):
                found[name].add(step, json.loads(values))
        store.close()
        return found


PLACES = {"mlflow": MLflowPlace, "wandb": WandBPlace, "trackio": TrackioPlace}


def check_found(run: RunDir, found: Found) -> None:
    """Check that a tracker has all of a run, and each epoch once."""
    with run.metrics_file.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    for column in ("train_loss", "val_accuracy", "learning_rate", "seconds"):
        steps, values = zip(*found.columns[column], strict=True)
        assert list(steps) == [int(row["epoch"]) for row in rows]
        if column != "seconds":  # an epoch that was lost by kill -9 is trained again
            assert values == pytest.approx([float(row[column]) for row in rows])
    summary = run.read_summary()
    assert found.scores["result/test_accuracy"] == pytest.approx(summary.test_accuracy)
    assert found.scores["result/best_epoch"] == summary.best_epoch
    assert found.settings["optimizer.lr"] == str(run.read_config().optimizer["lr"])
    assert found.settings["folder"] == str(run.path.resolve())
    assert found.figures == {"curves"}
