"""The process that speaks with Ray for a sweep, and what it has the workers of Ray do.

Ray ends a process whose cluster is lost, handles its signals and writes to its terminal. The
command that runs the sweep therefore leaves Ray to this process. Both exchange lines of JSON:

| from the command | |
|---|---|
| the first line | `{address, env_vars, modules}` |
| `{start: ID, cell: {...}, needs: {...}}` | submit a cell as a task with these options |
| `{stop: ID}` | let a cell save and end |
| `{quit: true}` | end all cells and this process |
| end of file | let all cells save and end, then end |

| from this process | |
|---|---|
| `{nodes: [{CPU: 4.0, ...}, ...]}` or `{error: TEXT}` | connected, or not |
| `{ended: ID, code: 0, error: null}` | what a cell came to |
| `{lost: ID, error: TEXT}` | its worker or its node is gone |
"""

import contextlib
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from cifar_lab.errors import RunFailed, Unavailable, UsageError, first_line, shorten

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of this package, whose code is sent to the nodes."""

_RAY_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # it would send the whole working folder
    # of a local Ray: cells as important as local processes, no workers that cannot run cells
    "RAY_worker_niceness": "0",
    "RAY_prestart_worker_first_driver": "0",
}
_QUIT_SECONDS = 15.0
_SIGHT_SECONDS = 5.0  # until a network file system shows a new file
_LOCK_SECONDS = 60.0  # until a process whose worker was lost has saved
_SAVING_SECONDS = 60.0  # until cells whose sweep was killed have saved
_STORE_BYTES = 100_000_000  # of a local Ray; cells exchange files only


class RayDriver:
    """The process that speaks with Ray, seen from the command. `nodes` is what each node has.

    Raises Unavailable if the process cannot connect to the cluster at `address`, or start it.
    `modules` are the files and folders of code that it sends to the nodes.
    """

    def __init__(self, address: str, env_vars: Mapping[str, str], modules: Sequence[str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import {__name__} as driver; driver.main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C reaches the sweep alone
            env={**_RAY_DEFAULTS, **os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        code = [str(PACKAGE), *modules]
        try:
            self.send({"address": address, "env_vars": dict(env_vars), "modules": code})
            answer = self.receive(None) or {}
        except EOFError:
            answer = {"error": self.last_words()}
        except BaseException:
            self._process.terminate()
            self.close()
            raise
        self.nodes: list[dict[str, float]] = answer.get("nodes", [])
        if "error" in answer:
            self.close()
            raise Unavailable(f"Ray ({address}) cannot be used: {answer['error']}")

    def send(self, command: Mapping[str, Any]) -> None:
        """Send one line; a process that has ended is noticed by `receive`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()

    def receive(self, seconds: float | None) -> dict[str, Any] | None:
        """Return the next answer, None if there is none in time; EOFError if the process ended."""
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            return None
        if not line:
            raise EOFError
        answer: dict[str, Any] = json.loads(line)
        return answer

    def last_words(self) -> str:
        """Return the last line that an ended process wrote, or its exit code."""
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return shorten(lines[-1], 160) if lines else f"its process ended with exit code {code}"

    def close(self) -> None:
        """End the process, and with it the cells that have not ended: they save."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.send({"quit": True})
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_QUIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):  # what is left of a local Ray
                os.killpg(self._process.pid, signal.SIGKILL)
        self._reader.join()
        self._process.stdout.close()
        self._log.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")


def main() -> None:
    """Be the process that speaks with Ray: read lines from stdin, answer on stdout."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what Ray prints
        tasks = _Tasks(answers)
        first = json.loads(sys.stdin.readline())
        try:
            nodes = _connect(first)
        except Exception as error:
            tasks.answer(error=first_line(error))
            return
        tasks.answer(nodes=nodes)
        tasks.serve(sys.stdin)


class _Tasks:
    """The tasks of a sweep that have not ended."""

    def __init__(self, answers: TextIO) -> None:
        self._answers = answers
        self._commands: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._running: dict[Any, int] = {}

    def answer(self, **content: Any) -> None:
        """Write one line; nobody may be there to read it."""
        with contextlib.suppress(BrokenPipeError):
            self._answers.write(json.dumps(content) + "\n")
            self._answers.flush()

    def serve(self, lines: TextIO) -> None:
        """Do what the lines say until they end or say quit."""
        import ray

        threading.Thread(target=self._read, args=(lines,), daemon=True).start()
        deadline: float | None = None
        while deadline is None or (self._running and time.monotonic() < deadline):
            for command in self._new_commands():
                if command is None:
                    self._cancel(self._running, force=False)
                    deadline = time.monotonic() + _SAVING_SECONDS
                elif "quit" in command:
                    self._cancel(self._running, force=True)
                    deadline = time.monotonic()
                elif "stop" in command:
                    chosen = [r for r, number in self._running.items() if number == command["stop"]]
                    self._cancel(chosen, force=False)
                else:
                    task = ray.remote(run_on_worker).options(max_retries=0, **command["needs"])
                    self._running[task.remote(command["cell"])] = command["start"]
            if self._running:
                done, _ = ray.wait(list(self._running), timeout=0.1)
                for reference in done:
                    self._report(reference, self._running.pop(reference))
        ray.shutdown()

    def _read(self, lines: TextIO) -> None:
        for line in lines:
            self._commands.put(json.loads(line))
        self._commands.put(None)

    def _new_commands(self) -> list[dict[str, Any] | None]:
        """Return the commands that have come; wait for one where no task runs."""
        found = [] if self._running else [self._commands.get()]
        while not self._commands.empty():
            found.append(self._commands.get())
        return found

    def _cancel(self, references: Any, *, force: bool) -> None:
        import ray

        for reference in list(references):
            ray.cancel(reference, force=force, recursive=False)

    def _report(self, reference: Any, number: int) -> None:
        """Answer with what an ended task came to."""
        import ray
        from ray import exceptions

        try:
            code, error = ray.get(reference)
            self.answer(ended=number, code=code, error=error)
        except exceptions.TaskCancelledError:
            self.answer(ended=number, code=143, error="stopped while it waited for a node")
        except (exceptions.RuntimeEnvSetupError, exceptions.TaskUnschedulableError) as error:
            self.answer(ended=number, code=1, error=first_line(error))
        except exceptions.RayTaskError as error:
            self.answer(ended=number, code=1, error=first_line(error.cause))
        except exceptions.RayError as error:
            self.answer(lost=number, error=first_line(error))


def _connect(request: dict[str, Any]) -> list[dict[str, float]]:
    """Connect to a cluster, or start one here; return what each of its nodes has."""
    import ray

    is_local = request["address"] == "local"
    local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
    ray.init(
        address=request["address"],
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={
            "py_modules": request["modules"],
            "excludes": ["**/__pycache__"],
            "env_vars": request["env_vars"],
        },
        **(local if is_local else {}),
    )
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def run_on_worker(request: dict[str, Any]) -> tuple[int, str | None]:
    """Run a cell in a process of its own on the node of this worker; return its code and message.

    `ray.cancel` sends SIGINT, after which the cell saves and ends. A worker that is killed takes
    its cell along, which saves first, as that of a sweep that is killed.
    """
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        return _run(request, lambda: bool(asked))
    except ImportError as error:
        host = socket.gethostname()
        return 3, f"{host} cannot import {error.name}; install cifar-lab[ray] on each node of Ray"
    except (UsageError, Unavailable, RunFailed) as error:
        return error.exit_code, str(error)
    finally:
        signal.signal(signal.SIGINT, before)


def _run(request: dict[str, Any], is_asked: Callable[[], bool]) -> tuple[int, str | None]:
    if not _within(_SIGHT_SECONDS, Path(request["record"]).exists):
        raise Unavailable(
            f"{socket.gethostname()} does not see {request['folder']}: output_dir must be on a "
            "file system that all nodes of the Ray cluster share"
        )
    if Path(request["cwd"]).is_dir():  # relative paths in settings mean the same there
        os.chdir(request["cwd"])
        if request["cwd"] not in sys.path:
            sys.path.append(request["cwd"])
    # The worker has these packages, which this process of the sweep never imports.
    from cifar_lab.config.launch import LaunchOptions
    from cifar_lab.runs.run_dir import RunDir
    from cifar_lab.sweeps import workers
    from cifar_lab.sweeps.cell import Cell
    from cifar_lab.training.signals import Stop

    run = RunDir(request["folder"])
    _within(_LOCK_SECONDS, lambda: is_asked() or not run.is_locked())
    local = workers.launcher(LaunchOptions(**request["options"]))
    config = run.read_config()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") if config.device == "cuda" else ""
    local.free_gpus = [visible]
    (job,) = local.start([Cell(run, config, {}, request["code"])], Path(request["folder"]))
    while not job.has_ended():
        if is_asked():
            job.ask_to_stop()
        local.wait([job], Stop())
    return job.result()


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Return whether a condition comes true within some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
