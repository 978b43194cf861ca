"""The process that speaks with Ray for a sweep, and what it has the workers of Ray do.

Ray ends a process whose cluster is lost, handles its signals and writes to its terminal. The
command that runs the sweep therefore leaves Ray to this process, a `server.Server`: each request
is a cell, which becomes a task of Ray.
"""

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cifar_lab.errors import CommandError, Unavailable, first_line
from cifar_lab.sweeps.server import LOST, PACKAGE, answer

_SIGHT_SECONDS = 5.0  # until a network file system shows a new file
_LOCK_SECONDS = 60.0  # until a process whose worker was lost has saved
_SAVING_SECONDS = 60.0  # until cells whose sweep was killed have saved
_STORE_BYTES = 100_000_000  # of a local Ray; cells exchange files only


def serve(address: str, env_vars: dict[str, str]) -> None:
    """Be the server: connect to the cluster, or start one here; make each request a task.

    The answer number 0 is what each node has.
    """
    import ray

    local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={
                "py_modules": [str(PACKAGE)],
                "excludes": ["**/__pycache__"],
                "env_vars": env_vars,
            },
            **(local if address == "local" else {}),
        )
    except Exception as error:
        sys.exit(first_line(error))
    answer(0, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    tasks: dict[int, Any] = {}
    cells: list[threading.Thread] = []
    for request in map(json.loads, sys.stdin):
        number = request["number"]
        if "stop" in request:
            ray.cancel(tasks[number], force=False, recursive=False)
            continue
        needs = dict(request["needs"])
        options = {"num_cpus": needs.pop("CPU", 0), "num_gpus": needs.pop("GPU", 0)}
        options |= {"memory": needs.pop("memory", 0), "resources": needs, "max_retries": 0}
        tasks[number] = ray.remote(run_on_worker).options(**options).remote(request)
        cells.append(threading.Thread(target=_follow, args=(request, tasks[number])))
        cells[-1].start()
    for task in tasks.values():  # the sweep is gone: its cells save
        ray.cancel(task, force=False, recursive=False)
    _within(_SAVING_SECONDS, lambda: not any(cell.is_alive() for cell in cells))
    ray.shutdown()
    os._exit(0)


def _follow(request: dict[str, Any], task: Any) -> None:
    """Follow a task to its end; without a cluster this process ends, and the sweep starts anew."""
    try:
        answer(request["number"], _code_of(request, task))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _code_of(request: dict[str, Any], task: Any) -> int:
    """Wait for a task; return its cell's exit code, LOST if its worker or node is gone."""
    import ray
    from ray import exceptions

    code, error = 3, None
    try:
        code, error = ray.get(task)
    except exceptions.TaskCancelledError:
        code = 143
    except (exceptions.RuntimeEnvSetupError, exceptions.TaskUnschedulableError) as problem:
        error = first_line(problem)
    except exceptions.RayTaskError as problem:
        error = first_line(problem.cause)
    except exceptions.RayError as problem:
        is_alone = isinstance(problem, exceptions.LocalRayletDiedError)
        if is_alone or not any(node["Alive"] for node in ray.nodes()):
            raise  # no try of any cell: without a node each would fail within a second
        code = LOST
    if error is not None:
        from cifar_lab.runs.run_dir import RunDir
        from cifar_lab.sweeps.cell import note  # and with it torch

        note(RunDir(request["folder"]), error)
    return code


def run_on_worker(request: dict[str, Any]) -> tuple[int, str | None]:
    """Run a cell in a process of its own on the node of this worker; return its exit code.

    The text is why it could not be started. `ray.cancel` sends SIGINT, after which the cell saves
    and ends. A worker that is killed takes its cell along, which saves first, as that of a sweep
    that is killed.
    """
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda number, frame: stop.set())
    try:
        return _run(request, stop), None
    except ImportError as error:
        host = socket.gethostname()
        return 3, f"{host} cannot import {error.name}; install cifar-lab[ray] on each node of Ray"
    except CommandError as error:
        return error.exit_code, str(error)


def _run(request: dict[str, Any], stop: threading.Event) -> int:
    folder = Path(request["folder"])
    if not _within(_SIGHT_SECONDS, (folder / "config.yaml").exists):
        raise Unavailable(
            f"{socket.gethostname()} does not see {folder}: output_dir must be on a file system "
            "that all nodes of the Ray cluster share"
        )
    if Path(request["cwd"]).is_dir():  # relative paths in settings mean the same there
        os.chdir(request["cwd"])
        if request["cwd"] not in sys.path:
            sys.path.append(request["cwd"])
    # The worker has these packages, which this process of the sweep never imports.
    from cifar_lab.runs.run_dir import RunDir
    from cifar_lab.sweeps.local import start_process

    run = RunDir(folder)
    _within(_LOCK_SECONDS, lambda: stop.is_set() or not run.is_locked())
    process, was_asked = start_process(run, request["arguments"], {}), False
    while (code := process.poll()) is None:
        if stop.is_set() and not was_asked:
            was_asked = True
            process.terminate()
        time.sleep(0.02)
    return code


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Return whether a condition comes true within some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
