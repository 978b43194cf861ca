"""hydra/launcher=ray on a real Ray of several nodes on this machine, none of which has cifar_lab.

The environment of the nodes holds every other package: what a cell runs is the code that was sent.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TINY_CELL, descendants, kill_tree, started, wait_until, weights

from cifar_lab.config.launch import LaunchOptions
from cifar_lab.errors import Unavailable, UsageError
from cifar_lab.runs.run_dir import RunDir, find_runs
from cifar_lab.runs.summary import commit
from cifar_lab.sweeps.ray import RaySettings, task_resources
from cifar_lab.sweeps.search import make_launcher
from cifar_lab.training.preflight import compose_checked

SCRIPT = Path(__file__).parent / "ray_cluster.py"
TINY = (*TINY_CELL, "device=cpu", "precision=fp32")
ON_RAY = ("hydra/launcher=ray", "hydra.launcher.mem_gb=0.5")


class Nodes:
    """The nodes of a cluster, held by a process that ends with them."""

    def __init__(self, python: Path, **head: Any) -> None:
        environment = {
            k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")
        }
        self._process = subprocess.Popen(
            [python, SCRIPT, json.dumps(head)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            env=environment,
        )
        first = self._answer()
        self.address = str(first["address"])
        self.raylets = [int(first["raylet"])]

    def add(self, **node: Any) -> None:
        assert self._process.stdin is not None
        print(json.dumps(node), file=self._process.stdin, flush=True)
        self.raylets.append(int(self._answer()["raylet"]))

    def close(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=60)
        self.kill()

    def kill(self) -> None:
        """End all nodes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for raylet in self.raylets:
            kill_tree(raylet)
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the cluster did not start"
        answer: dict[str, Any] = json.loads(line)
        return answer


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment with all packages but cifar_lab."""
    venv = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(venv)}))
    folders = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "packages.pth").write_text("\n".join(folders) + "\n")
    python = venv / "bin" / "python"
    line = [str(python), "-c", "import ray, torch, cifar_lab"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    tried = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert "No module named 'cifar_lab'" in tried.stderr
    return python


@pytest.fixture(scope="module")
def cluster(bare_python: Path) -> Iterator[Nodes]:
    nodes = Nodes(bare_python, num_cpus=1)
    nodes.add(num_cpus=1)
    nodes.add(num_cpus=1)
    yield nodes
    nodes.close()


@pytest.fixture(scope="module", autouse=True)
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFAR_LAB_DATA", str(tmp_path_factory.mktemp("data")))
        patch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


def train(folder: Path, *overrides: str, address: str = "") -> "subprocess.Popen[str]":
    cluster = [*ON_RAY, f"hydra.launcher.address={address}"] if address else []
    return started("-m", *TINY, f"output_dir={folder}", *overrides, *cluster)


def ended(process: "subprocess.Popen[str]", code: int = 0) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        process.communicate()
        raise
    assert process.returncode == code, out + err
    return out, err


def has_epochs(run: RunDir, count: int) -> bool:
    """Return whether a run has begun an epoch after these; a row comes before its checkpoint."""
    rows = run.metrics_file.read_text().splitlines()[1:] if run.last.exists() else []
    return len(rows) > count


def running_in(run: RunDir, processes: set[int]) -> bool:
    """Return whether one of these processes is working in a run's folder."""
    held = re.search(r"\d+", run.lock_file.read_text()) if run.is_locked() else None
    return held is not None and int(held[0]) in processes


def assert_equal_weights(folder: Path, other: Path) -> None:
    for name in (run.path.name for run in find_runs(folder)):
        a, b = (weights(RunDir(f / name)) for f in (folder, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


LONG = ("training.epochs=6", "training.batch_size=32")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of eight cells by local processes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ended(train(folder, *LONG, "seed=0,1,2,3", "optimizer.lr=0.01,0.001"))
    return folder / "runs"


@pytest.mark.ray
def test_a_node_killed_in_mid_epoch_changes_no_weights(
    tmp_path: Path, cluster: Nodes, undisturbed: Path
) -> None:
    sweep = train(
        tmp_path, *LONG, "seed=0,1,2,3", "optimizer.lr=0.01,0.001", address=cluster.address
    )
    folder = tmp_path / "runs"
    victims: list[RunDir] = []

    def runs_on_the_last_node() -> bool:
        processes = {cluster.raylets[-1], *descendants(cluster.raylets[-1])}
        runs = find_runs(folder) if folder.is_dir() else []
        victims[:] = [run for run in runs if running_in(run, processes)]
        return bool(victims) and has_epochs(victims[0], 1)

    wait_until(runs_on_the_last_node, "a cell on the last node")
    kill_tree(cluster.raylets.pop())
    out, err = ended(sweep)
    assert "8 finished" in out
    assert f"{victims[0].path.name}: " in err
    assert "(try 2 of 6 follows)" in err
    assert "resumed at epoch" in victims[0].log_file.read_text(encoding="utf-8")
    assert_equal_weights(folder, undisturbed)


@pytest.mark.ray
def test_a_head_that_is_restarted_goes_on_with_the_sweep(
    tmp_path: Path, bare_python: Path, undisturbed: Path
) -> None:
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    first = Nodes(bare_python, num_cpus=2, gcs_server_port=port)
    try:
        values = ("seed=0,1", "optimizer.lr=0.01")
        sweep = train(tmp_path, *LONG, *values, address=first.address)
        folder = tmp_path / "runs"
        wait_until(lambda: folder.is_dir() and len(find_runs(folder)) == 2, "the folders")
        wait_until(lambda: any(has_epochs(run, 1) for run in find_runs(folder)), "an epoch")
    finally:
        first.kill()
    second = Nodes(bare_python, num_cpus=2, gcs_server_port=port)
    try:
        assert second.address == first.address
        out, err = ended(sweep)
    finally:
        second.close()
    assert "2 finished" in out
    assert f"Ray ({first.address}) is lost" in err
    assert_equal_weights(folder, undisturbed)


@pytest.mark.ray
def test_a_local_ray_that_dies_is_started_again_and_uses_up_no_tries(
    tmp_path: Path, undisturbed: Path
) -> None:
    """As when a helper of its node dies: Ray then ends the node, and every task at once."""
    values = ("seed=0,1", "optimizer.lr=0.01", "jobs=1", *ON_RAY, "hydra.launcher.max_retries=1")
    sweep = train(tmp_path, *LONG, *values)
    folder = tmp_path / "runs"
    wait_until(lambda: folder.is_dir() and len(find_runs(folder)) == 2, "the folders")
    wait_until(lambda: any(has_epochs(run, 1) for run in find_runs(folder)), "an epoch")
    raylets = [
        process
        for process in descendants(sweep.pid)
        if Path(f"/proc/{process}/exe").resolve().name == "raylet"
    ]
    assert len(raylets) == 1
    os.kill(raylets[0], signal.SIGKILL)
    out, err = ended(sweep)
    assert "2 finished" in out
    assert "Ray (local) is lost" in err
    assert all(run.read_summary().commit == commit() for run in find_runs(folder))
    assert_equal_weights(folder, undisturbed)


@pytest.mark.ray
def test_ctrl_c_saves_what_runs_and_the_same_line_goes_on(tmp_path: Path, cluster: Nodes) -> None:
    line = ("training.epochs=40", "training.patience=40", "seed=0,1", "jobs=1")
    sweep = train(tmp_path, *line, address=cluster.address)
    folder = tmp_path / "runs"
    wait_until(lambda: folder.is_dir() and len(find_runs(folder)) == 2, "the folders")
    running, queued = find_runs(folder)
    wait_until(lambda: has_epochs(running, 1), "an epoch")
    sweep.send_signal(signal.SIGINT)
    out, _ = ended(sweep, 130)
    assert "1 interrupted, 1 queued" in out
    assert [running.status, queued.status] == ["interrupted", "queued"]
    out, _ = ended(train(tmp_path, *line, address=cluster.address))
    assert "2 finished" in out
    assert "resumed at epoch" in running.log_file.read_text(encoding="utf-8")


@pytest.mark.ray
def test_a_worker_that_lacks_the_folder_says_so_in_one_line(
    tmp_path: Path, cluster: Nodes, bare_python: Path
) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    started = subprocess.Popen(
        [
            *("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {hidden} && exec "$@"', "sh"),
            *(bare_python, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"),
            *(f"--address={cluster.address}", '--resources={"blind": 1}'),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    try:
        blind = ("training.epochs=1", "hydra.launcher.resources={blind: 1}", "jobs=1")
        _, err = ended(train(hidden, *blind, address=cluster.address), 3)
        assert f"does not see {hidden}" in err.splitlines()[-1]
        assert "all nodes of the Ray cluster share" in err.splitlines()[-1]
    finally:
        kill_tree(started.pid)
        started.wait()


def test_what_a_cell_takes_of_a_node(tmp_path: Path) -> None:
    request = compose_checked([*TINY, "-m", *ON_RAY, f"output_dir={tmp_path}", "threads=3"])
    config = request.runs[0].config
    settings = RaySettings(mem_gb=0.5, resources={"big": 1.0})
    asked = task_resources(config, settings, LaunchOptions(jobs_per_gpu=4))
    assert asked == {"CPU": 3, "memory": 500_000_000, "big": 1.0}
    on_gpu = dataclasses.replace(config, device="cuda")
    assert task_resources(on_gpu, settings, LaunchOptions(jobs_per_gpu=4))["GPU"] == 0.25


def test_settings_of_the_launcher_are_checked(tmp_path: Path) -> None:
    wrong = "hydra.launcher.address=nowhere"
    request = compose_checked([*TINY, "-m", *ON_RAY, f"output_dir={tmp_path}", wrong])
    with pytest.raises(UsageError, match=f"{wrong} is wrong"):
        make_launcher(request.launcher, request.options)


def test_a_missing_ray_or_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        settings = {"cluster": "ray", "address": address}
        with pytest.raises(Unavailable, match=f"no Ray cluster answers at {address}"):
            make_launcher(settings, LaunchOptions())
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=re.escape("pip install 'cifar-lab[ray]'")):
        make_launcher(settings, LaunchOptions())
