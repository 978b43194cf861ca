"""Cells as tasks of Ray: on an existing cluster, or on a local one that is started here.

A cell whose node or worker is lost goes on elsewhere from its last checkpoint, and so do all cells
when the cluster itself is lost and comes back. The code that runs on the nodes is the code of this
process: it is sent there, and a cell that would run other code is refused.
"""

import importlib.util
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cifar_lab.config.launch import LaunchOptions
from cifar_lab.config.run_config import RunConfig
from cifar_lab.config.schema import parse_as, setting, wrong
from cifar_lab.errors import Unavailable, log, missing_extra
from cifar_lab.runs.summary import commit
from cifar_lab.sweeps.cell import Cell
from cifar_lab.sweeps.pool import Job, Launcher
from cifar_lab.sweeps.server import LOST, ServedProcess, Server
from cifar_lab.training.loop import Stop

_RAY_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # it would send the whole working folder
    # of a local Ray: cells as important as local processes, no workers that cannot run cells
    "RAY_worker_niceness": "0",
    "RAY_prestart_worker_first_driver": "0",
}


@dataclass(frozen=True)
class RaySettings:
    """The settings of hydra/launcher=ray; their meanings are in conf/hydra/launcher/ray.yaml."""

    cluster: Literal["ray"] = "ray"
    address: str | None = None
    mem_gb: float = setting(1.5, ge=0)
    resources: dict[str, float] | None = None
    env_vars: dict[str, str] | None = None
    max_retries: int = setting(5, ge=0)
    reconnect_seconds: float = setting(600, ge=0)

    @property
    def target(self) -> str:
        """The address that Ray is given: `local` starts a Ray on this machine."""
        return self.address or os.environ.get("RAY_ADDRESS", "").strip() or "local"

    def check(self, path: str) -> None:
        """Refuse an address that is none."""
        if self.target not in ("local", "auto") and _host_and_port(self.target) is None:
            name = f"{path}.address" if self.address else "RAY_ADDRESS"
            raise wrong(name, self.target, "HOST:PORT, auto or local")


class RayTasks(Launcher):
    """The launcher whose cells are tasks of Ray; it connects in `prepare`.

    Raises UsageError where Ray is missing, Unavailable where no cluster answers at the address.
    """

    def __init__(self, settings: Mapping[str, Any], options: LaunchOptions) -> None:
        super().__init__(options)
        self.settings = parse_as(RaySettings, settings, "hydra.launcher")
        spec = importlib.util.find_spec("ray")
        if spec is None or spec.origin is None:
            raise missing_extra("hydra/launcher=ray", "Ray", "ray")
        _check_answer(self.settings.target)
        self.server: Server
        self._losses, self._connected = 0, 0.0

    def prepare(self, configs: Sequence[RunConfig]) -> int:
        """Connect to the cluster; return how many cells its nodes hold, or `jobs` if it is set.

        Raises Unavailable if no node can ever hold one and `jobs` does not say to wait for some.
        """
        nodes = self._connect()
        log.info("Ray (%s): %d node%s", self.settings.target, len(nodes), "s" * (len(nodes) != 1))
        if self.options.jobs != "auto":
            return max(1, min(self.options.jobs, len(configs)))
        needs = task_resources(configs[0], self.settings, self.options)
        fitting = [min(node.get(name, 0.0) / n for name, n in needs.items()) for node in nodes]
        count = sum(int(cells + 1e-6) for cells in fitting)  # three thirds are one
        if count == 0:
            self.abandon([])
            names = " and ".join(f"{amount:g} {name}" for name, amount in needs.items())
            raise Unavailable(
                f"no node of the Ray cluster has {names} for a cell; jobs=N waits for nodes to come"
            )
        return min(count, len(configs))

    def _connect(self) -> list[dict[str, float]]:
        """Start the process that speaks with Ray; return what each node has."""
        target = self.settings.target
        passed = {k: v for k, v in os.environ.items() if k.startswith("CIFAR_LAB_")}
        env_vars = {"CIFAR_LAB_COMMIT": commit() or "", **passed, **(self.settings.env_vars or {})}
        code = (
            f"from cifar_lab.sweeps import ray_driver; ray_driver.serve({target!r}, {env_vars!r})"
        )
        self.server = Server(code, {**_RAY_DEFAULTS, **os.environ})
        nodes: list[dict[str, float]] | None = self.server.first_answer()
        if nodes is None:
            self.abandon([])
            raise Unavailable(f"Ray ({target}) cannot be used: {self.server.last_words}")
        self._connected = time.monotonic()
        return nodes

    def start(self, cells: Sequence[Cell]) -> list[Job]:
        """Make each cell a task."""
        return [_RayJob(cell, self) for cell in cells]

    def send(self, cell: Cell) -> ServedProcess:
        """Ask for a cell, for the first time or again."""
        return self.server.start(
            folder=str(cell.run.path.absolute()),
            arguments=self.arguments(cell),
            cwd=str(Path.cwd()),
            needs=task_resources(cell.config, self.settings, self.options),
        )

    def wait(self, jobs: Sequence[Any], stop: Stop) -> None:
        """Return when a job has ended or a signal came; send again what is lost."""
        super().wait(jobs, stop)
        lost = [job for job in jobs if job.is_lost()]
        losses = int(self.server.is_alive())  # the loss of the whole cluster uses up no try
        if lost and not losses:
            self._reconnect(stop)
        for job in lost:
            job.was_asked |= stop.signal is not None
            job.go_on(losses, self.settings.max_retries)

    def abandon(self, jobs: Sequence[Job]) -> None:
        """End the process that speaks with Ray, and with it what is left of a local one."""
        self.server.close(0 if jobs else 15)

    def _reconnect(self, stop: Stop) -> None:
        """Wait for a lost cluster, or start a local one again."""
        target, seconds = self.settings.target, self.settings.reconnect_seconds
        self.abandon([])
        is_early = time.monotonic() - self._connected < 60
        self._losses = self._losses + 1 if is_early else 0
        what = f"Ray ({target}) is lost: {self.server.last_words}"
        if self._losses > self.settings.max_retries:  # it would go on like this for ever
            raise Unavailable(f"{what}; it is lost again and again")
        log.warning("%s; waiting up to %g s", what, seconds)
        deadline = time.monotonic() + seconds
        while stop.signal is None:
            try:
                _check_answer(target)
                self._connect()
                return
            except Unavailable as error:
                if time.monotonic() > deadline:
                    raise Unavailable(f"{error}; the same line goes on from here") from None
                time.sleep(1)


class _RayJob(Job):
    """A cell that is a task of Ray, and is sent again when that is lost."""

    def __init__(self, cell: Cell, launcher: RayTasks) -> None:
        super().__init__(cell, launcher.send(cell))
        self._launcher, self._losses, self._is_given_up = launcher, 0, False

    def is_lost(self) -> bool:
        """Return whether the worker of the task is gone, and the task is to be sent again."""
        return not self._is_given_up and self.process.poll() == LOST

    def poll(self) -> int | None:
        return None if self.is_lost() else self.process.poll()

    def go_on(self, losses: int, retries: int) -> None:
        """Send the cell again after a loss, unless it was stopped or is lost often."""
        self._losses += losses
        self._is_given_up = self.was_asked or self._losses > retries
        if self._is_given_up:
            self.loss = f"its worker or its node was lost {self._losses} times"
            return
        if losses:
            why, name = "its worker or its node is lost", self.cell.run.path.name
            log.warning("%s: %s (try %d of %d follows)", name, why, self._losses + 1, retries + 1)
        self.process = self._launcher.send(self.cell)


def task_resources(
    config: RunConfig, settings: RaySettings, options: LaunchOptions
) -> dict[str, float]:
    """Return what the task of a cell takes of its node, by the names of Ray's resources."""
    gpus = 1 / options.jobs_per_gpu if config.device.startswith("cuda") else 0
    needs = {"CPU": config.threads or 1, "GPU": gpus, "memory": int(settings.mem_gb * 1e9)}
    return {name: n for name, n in {**needs, **(settings.resources or {})}.items() if n}


def _host_and_port(address: str) -> tuple[str, int] | None:
    host, _, port = address.rpartition(":")
    return (host, int(port)) if host and port.isdigit() else None


def _check_answer(address: str) -> None:
    """Raise Unavailable if nothing can be reached at an address: Ray would try for a long time."""
    if (place := _host_and_port(address)) is not None:
        try:
            socket.create_connection(place, timeout=5).close()
        except OSError as error:
            reason = error.strerror or error
            raise Unavailable(f"no Ray cluster answers at {address} ({reason})") from None
