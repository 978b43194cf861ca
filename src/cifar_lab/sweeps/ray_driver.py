"""The process that speaks with Ray for a sweep, and what it has the workers of Ray do.

Ray ends a process whose cluster is lost, handles its signals and writes to its terminal. The
command that runs the sweep therefore leaves Ray to this process, a `server.Server`: each request
is a cell, which becomes a task of Ray.
"""

import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cifar_lab.errors import RunFailed, Unavailable, UsageError, first_line
from cifar_lab.sweeps.server import LOST, PACKAGE, Request, receive

_SIGHT_SECONDS = 5.0  # until a network file system shows a new file
_LOCK_SECONDS = 60.0  # until a process whose worker was lost has saved
_SAVING_SECONDS = 60.0  # until cells whose sweep was killed have saved
_STORE_BYTES = 100_000_000  # of a local Ray; cells exchange files only


def serve(address: str, env_vars: dict[str, str], modules: list[str]) -> None:
    """Be the server: connect to the cluster, or start one here; make each request a task.

    The first line to the sweep is `{"nodes": [what each node has, ...]}` or `{"error": TEXT}`.
    """
    import ray

    is_local = address == "local"
    local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
    with socket.socket(fileno=os.dup(0)) as requests:
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={
                    "py_modules": [str(PACKAGE), *modules],
                    "excludes": ["**/__pycache__"],
                    "env_vars": env_vars,
                },
                **(local if is_local else {}),
            )
        except Exception as error:
            requests.sendall(json.dumps({"error": first_line(error)}).encode() + b"\n")
            return
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        requests.sendall(json.dumps({"nodes": nodes}).encode() + b"\n")
        while (request := receive(requests)) is not None:
            request.answer(os.getpid())
            threading.Thread(target=_follow, args=(request,), name="cell").start()
    # Their standard input has ended with that of the sweep: the cells save.
    deadline = time.monotonic() + _SAVING_SECONDS
    for thread in threading.enumerate():
        if thread.name == "cell":
            thread.join(max(0.0, deadline - time.monotonic()))
    ray.shutdown()
    os._exit(0)


def _follow(request: Request) -> None:
    """Follow a cell to its end; without a cluster this process ends, and the sweep starts anew."""
    try:
        _follow_task(request)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _follow_task(request: Request) -> None:
    """Run a cell as a task; answer with its exit code, LOST if its worker or node is gone."""
    import ray
    from ray import exceptions

    task = ray.remote(run_on_worker).options(max_retries=0, **request.content["needs"])
    reference = task.remote(request.content)
    was_asked = False
    while not ray.wait([reference], timeout=0.1)[0]:
        if not was_asked and select.select([request.stdin], [], [], 0)[0]:
            was_asked = True
            ray.cancel(reference, force=False, recursive=False)
    code, error = 1, None
    try:
        code, error = ray.get(reference)
    except exceptions.TaskCancelledError:
        code = 143
    except (exceptions.RuntimeEnvSetupError, exceptions.TaskUnschedulableError) as problem:
        error = first_line(problem)
    except exceptions.RayTaskError as problem:
        error = first_line(problem.cause)
    except exceptions.RayError:
        code = LOST
    if error is not None:
        from cifar_lab.runs.run_dir import RunDir
        from cifar_lab.sweeps.cell import note  # and with it torch

        note(RunDir(request.content["folder"]), error)
    request.answer(code)
    request.close()


def run_on_worker(content: dict[str, Any]) -> tuple[int, str | None]:
    """Run a cell in a process of its own on the node of this worker; return its exit code.

    The text is why it could not be started. `ray.cancel` sends SIGINT, after which the cell saves
    and ends. A worker that is killed takes its cell along, which saves first, as that of a sweep
    that is killed.
    """
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        return _run(content, lambda: bool(asked)), None
    except ImportError as error:
        host = socket.gethostname()
        return 3, f"{host} cannot import {error.name}; install cifar-lab[ray] on each node of Ray"
    except (UsageError, Unavailable, RunFailed) as error:
        return error.exit_code, str(error)
    finally:
        signal.signal(signal.SIGINT, before)


def _run(content: dict[str, Any], is_asked: Callable[[], bool]) -> int:
    folder = Path(content["folder"])
    if not _within(_SIGHT_SECONDS, (folder / "config.yaml").exists):
        raise Unavailable(
            f"{socket.gethostname()} does not see {folder}: output_dir must be on a file system "
            "that all nodes of the Ray cluster share"
        )
    if Path(content["cwd"]).is_dir():  # relative paths in settings mean the same there
        os.chdir(content["cwd"])
        if content["cwd"] not in sys.path:
            sys.path.append(content["cwd"])
    # The worker has these packages, which this process of the sweep never imports.
    from cifar_lab.runs.run_dir import RunDir
    from cifar_lab.sweeps.local import start_process

    run = RunDir(folder)
    _within(_LOCK_SECONDS, lambda: is_asked() or not run.is_locked())
    process = start_process(run, content["arguments"], {})
    assert process.stdin is not None
    while (code := process.poll()) is None:
        if is_asked() and not process.stdin.closed:
            process.stdin.close()
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
