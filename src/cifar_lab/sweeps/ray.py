"""Cells as tasks of Ray: on an existing cluster, or on a local one that is started here.

A cell whose node or worker is lost goes on elsewhere from its last checkpoint, and so do all cells
when the cluster itself is lost and comes back. The code that runs on the nodes is the code of this
process: it is sent there, and a cell that would run other code is refused.
"""

import contextlib
import importlib.util
import logging
import math
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
from cifar_lab.errors import RunFailed, Unavailable, UsageError, missing_extra
from cifar_lab.sweeps.cell import Cell
from cifar_lab.sweeps.launcher import Job, Launcher
from cifar_lab.sweeps.ray_driver import RayDriver
from cifar_lab.training.run import note_killed
from cifar_lab.training.signals import Stop

log = logging.getLogger("cifar_lab")


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
        host_port = _host_and_port(self.target)
        if self.target not in ("local", "auto") and host_port is None:
            name = f"{path}.address" if self.address else "RAY_ADDRESS"
            raise wrong(name, self.target, "HOST:PORT, auto or local")


def launcher(settings: Mapping[str, Any], options: LaunchOptions) -> Launcher:
    """Return the launcher of these settings.

    Raises UsageError where Ray is missing, Unavailable where no cluster answers at the address.
    """
    parsed = parse_as(RaySettings, settings, "hydra.launcher")
    spec = importlib.util.find_spec("ray")
    if spec is None or spec.origin is None:
        raise missing_extra("hydra/launcher=ray", "Ray", "ray")
    problem = _no_answer(parsed.target)
    if problem is not None:
        raise Unavailable(problem)
    return _Ray(parsed, options)


class _Ray(Launcher):
    """The launcher whose cells are tasks of Ray; it connects in `prepare`."""

    def __init__(self, settings: RaySettings, options: LaunchOptions) -> None:
        super().__init__(options)
        self.settings = settings
        self._driver: RayDriver | None = None
        self._jobs: dict[int, _RayJob] = {}
        self._folder = Path()

    def prepare(self, configs: Sequence[RunConfig]) -> int:
        """Connect to the cluster; return how many cells its nodes hold, or `jobs` if it is set.

        Raises Unavailable if no node can ever hold one and `jobs` does not say to wait for some.
        """
        self._driver = driver = self._connect()
        count = len(driver.nodes)
        log.info("Ray (%s): %d node%s", self.settings.target, count, "s" * (count != 1))
        if self.options.jobs != "auto":
            return max(1, min(self.options.jobs, len(configs)))
        fitting = min(sum(_fitting(node, self._needs(c)) for node in driver.nodes) for c in configs)
        if fitting == 0:
            driver.close()
            self._driver = None
            needs = " and ".join(f"{v:g} {k}" for k, v in _resources(self._needs(configs[0])))
            raise Unavailable(
                f"no node of the Ray cluster has {needs} for a cell; jobs=N waits for nodes to come"
            )
        return min(fitting, len(configs))

    def _needs(self, config: RunConfig) -> dict[str, Any]:
        return task_options(config, self.settings, self.options)

    def _connect(self) -> RayDriver:
        passed = {k: v for k, v in os.environ.items() if k.startswith("CIFAR_LAB_")}
        return RayDriver(
            self.settings.target,
            {**passed, **(self.settings.env_vars or {})},
            _own_modules(self.options.trust),
        )

    def start(self, cells: Sequence[Cell], folder: Path) -> list["_RayJob"]:
        self._folder = folder.absolute()
        jobs = [_RayJob(cell, self) for cell in cells]
        for job in jobs:
            self.submit(job)
        return jobs

    def submit(self, job: "_RayJob") -> None:
        """Send a cell to Ray, for the first time or again."""
        self._jobs[id(job)] = job
        cell = {
            "folder": str(job.cell.run.path.absolute()),
            "code": job.cell.code,
            "record": str(self._folder / "sweep.json"),
            "cwd": str(Path.cwd()),
            "options": {
                "trust": self.options.trust,
                "rerun": job.is_to_rerun(),
                "accept_code": self.options.accept_code,
            },
        }
        self._send(start=id(job), cell=cell, needs=self._needs(job.cell.config))

    def cancel(self, job: "_RayJob") -> None:
        """Let a cell save and end."""
        self._send(stop=id(job))

    def wait(self, jobs: Sequence["_RayJob"], stop: Stop) -> None:
        assert self._driver is not None
        deadline = time.monotonic() + 0.25
        while (left := deadline - time.monotonic()) > 0:
            try:
                answer = self._driver.receive(left)
            except EOFError:
                self._reconnect(stop)
                return
            if answer is None:
                return
            job = self._jobs.pop(answer["ended" if "ended" in answer else "lost"])
            if "ended" in answer:
                job.ended = (answer["code"], answer["error"])
            else:
                job.lose(answer["error"])

    def abandon(self, jobs: Sequence["_RayJob"]) -> None:
        if self._driver is not None:
            self._driver.close()

    def _send(self, **command: Any) -> None:
        assert self._driver is not None
        self._driver.send(command)

    def _reconnect(self, stop: Stop) -> None:
        """Wait for a lost cluster, then send the cells again that it ran."""
        assert self._driver is not None
        why = self._driver.last_words()
        self._driver.close()
        self._driver = None
        seconds = self.settings.reconnect_seconds
        log.warning("Ray (%s) is lost: %s; waiting up to %g s", self.settings.target, why, seconds)
        deadline = time.monotonic() + seconds
        while stop.signal is None:
            try:
                problem = _no_answer(self.settings.target)
                if problem is not None:
                    raise Unavailable(problem)
                self._driver = self._connect()
                break
            except Unavailable as error:
                if time.monotonic() > deadline:
                    raise Unavailable(f"{error}; the same line goes on from here") from None
                time.sleep(1)
        lost, self._jobs = list(self._jobs.values()), {}
        for job in lost:
            if stop.signal is not None:
                job.was_asked = True
            job.lose("the Ray cluster was lost")


class _RayJob(Job):
    """A task of Ray, seen from the sweep."""

    def __init__(self, cell: Cell, launcher: _Ray) -> None:
        super().__init__(cell)
        self.ended: tuple[int, str | None] | None = None
        self._launcher = launcher
        self._losses = 0
        self._summary_before = self._summary()

    def stop(self) -> None:
        self._launcher.cancel(self)

    def has_ended(self) -> bool:
        return self.ended is not None

    def result(self) -> tuple[int, str | None]:
        assert self.ended is not None
        return self.ended

    def is_to_rerun(self) -> bool:
        """Return whether results in the folder are to be discarded: not those of this sweep."""
        return self._launcher.options.rerun and self._summary() == self._summary_before

    def lose(self, why: str) -> None:
        """Send the cell again after its worker was lost, unless it was stopped or is lost often."""
        self._losses += 1
        allowed = self._launcher.settings.max_retries
        if self.was_asked:
            self.ended = 143, "stopped; it goes on from its last checkpoint"
        elif self._losses > allowed:
            error = f"lost {self._losses} times, now: {why}"
            with contextlib.suppress(Unavailable, UsageError, RunFailed, OSError):
                note_killed(self.cell.run, error)
            self.ended = 1, error
        else:
            name = self.cell.run.path.name
            log.warning("%s: %s (try %d of %d follows)", name, why, self._losses + 1, allowed + 1)
            self._launcher.submit(self)

    def _summary(self) -> bytes:
        with contextlib.suppress(OSError):
            return self.cell.run.summary_file.read_bytes()
        return b""


def task_options(
    config: RunConfig, settings: RaySettings, options: LaunchOptions
) -> dict[str, Any]:
    """Return what the task of a cell takes of its node: CPUs, GPUs, bytes of memory, others."""
    on_gpu = config.device.startswith("cuda")
    return {
        "num_cpus": config.threads or 1,
        "num_gpus": 1 / options.jobs_per_gpu if on_gpu else 0,
        "memory": int(settings.mem_gb * 1e9),
        "resources": settings.resources or {},
    }


def _own_modules(trusted: Sequence[str]) -> list[str]:
    """Return the files of trusted modules that are not installed packages: workers lack them."""
    found = []
    for name in dict.fromkeys(module.partition(".")[0] for module in trusted):
        spec = importlib.util.find_spec(name)
        if spec is not None and name != "cifar_lab":
            folders = list(spec.submodule_search_locations or ())
            path = Path(folders[0] if folders else spec.origin or "").absolute()
            if path.exists() and not {"site-packages", "dist-packages"} & set(path.parts):
                found.append(str(path))
    return found


def _fitting(node: Mapping[str, float], needs: Mapping[str, Any]) -> int:
    """Return how many cells with these needs a node holds."""
    each = [node.get(name, 0.0) / amount for name, amount in _resources(needs) if amount > 0]
    return math.floor(min(each) + 1e-6) if each else 0


def _resources(needs: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return the needs of a task by the names of Ray's resources."""
    named = [("CPU", needs["num_cpus"]), ("GPU", needs["num_gpus"]), ("memory", needs["memory"])]
    return [*named, *needs["resources"].items()]


def _host_and_port(address: str) -> tuple[str, int] | None:
    host, _, port = address.rpartition(":")
    return (host, int(port)) if host and port.isdigit() else None


def _no_answer(address: str) -> str | None:
    """Return why nothing can be reached at an address of a cluster, or None.

    Ray itself would try for a long time.
    """
    place = _host_and_port(address)
    if place is None:
        return None
    try:
        socket.create_connection(place, timeout=5).close()
    except OSError as error:
        return f"no Ray cluster answers at {address} ({error.strerror or error})"
    return None
