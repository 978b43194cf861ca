"""Many runs at once: a process for each, so many at a time, one live line, a table at the end.

A cell that fails, diverges or is killed is one failed cell; the others go on. The processes are
forked from a server that has imported torch once and started no thread (Linux), or spawned anew.
"""

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal

from cifar_lab import components, device
from cifar_lab.cli import EXIT_CODES
from cifar_lab.config import RunConfig
from cifar_lab.errors import NotNow, RequestError, RunFailed, Stopped
from cifar_lab.execute import Stop, execute, note_killed
from cifar_lab.files import write_text
from cifar_lab.planning import SLOW_IMPORTS, Pace, SweepCell, duration, short_names, table
from cifar_lab.run_dir import RunDir
from cifar_lab.schema import shorten

log = logging.getLogger("cifar_lab")

_LEFT_OUT = (3, 130, 143)  # exit codes of cells that did not fail: not now, or stopped and saved
_BYTES_PER_JOB = 1_500_000_000  # what a process with torch and CIFAR-10 needs, with room
_PATIENCE_SECONDS = 15.0  # for a folder whose process is just ending
_PRELOADED = ("cifar_lab.door", "cifar_lab.sweep", *SLOW_IMPORTS)  # what a fork starts with


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: its state before and after, wall clock seconds, exit code, error."""

    cell: SweepCell
    before: str
    after: str
    seconds: float = 0.0
    code: int = 0
    error: str | None = None


def fitting_jobs(
    configs: Sequence[RunConfig], jobs: int | Literal["auto"], jobs_per_gpu: int = 1
) -> tuple[int, list[str]]:
    """Return how many cells run at a time, and the GPU of each such slot ("" where none is given).

    auto fills the GPUs that are visible, or else the cores, as far as the memory goes.
    """
    wanted: int | None = None if jobs == "auto" else jobs
    if any(config.device == "cuda" for config in configs):
        gpus = device.visible_gpus()
        fitting = len(gpus) * jobs_per_gpu
        count = max(1, min(wanted or fitting, fitting, len(configs)))
        return count, [gpus[slot % len(gpus)] for slot in range(count)]
    if wanted is None:
        threads = max((config.threads or 1 for config in configs), default=1)
        on_mps = any(config.device == "mps" for config in configs)
        wanted = 1 if on_mps else min(_cores() // threads, _free_memory() // _BYTES_PER_JOB)
    count = max(1, min(wanted, len(configs)))
    return count, [""] * count


def run_all(
    cells: Sequence[SweepCell],
    *,
    stop: Stop,
    jobs: int | Literal["auto"] = "auto",
    jobs_per_gpu: int = 1,
    rerun: bool = False,
    accept_code: bool = False,
    trust: Sequence[str] = (),
    command: Sequence[str] = (),
) -> list[Outcome]:
    """Run the cells that are not finished, each in its own process; return all outcomes in order.

    All folders are made first, queued, so that nothing that is edited later changes a cell.

    The first signal that `stop` receives lets the running cells save and leaves the rest queued
    (the caller looks at `stop.signal`); a second one kills them and raises Stopped.
    """
    started, pace = time.monotonic(), Pace()
    outcomes, waiting, before = sort_out(cells, rerun=rerun, accept_code=accept_code)
    if not waiting:
        return [outcomes[index] for index in range(len(cells))]
    for cell in cells:
        pace.learn(cell)
    record = Record(cells, command)
    count, gpus = fitting_jobs([cells[i].config for i in waiting], jobs, jobs_per_gpu)
    log.info(
        "%d cell%s: %d to run, %d at a time, %d finished before",
        len(cells),
        "s" * (len(cells) != 1),
        len(waiting),
        count,
        sum(outcome.after == "finished" for outcome in outcomes.values()),
    )
    free = list(reversed(gpus))
    running: dict[int, Worker] = {}
    context = process_context()
    with stop.graceful(), _Line(len(cells), pace) as line:
        try:
            while (waiting and stop.signal is None) or running:
                if stop.signal is not None:
                    for worker in running.values():
                        worker.ask_to_stop()
                elif len(running) < count and (index := _next(cells, waiting, running)) is not None:
                    if cells[index].run.is_locked():
                        outcomes[index] = Outcome(
                            cells[index], before[index], "in use", 0.0, 3, _in_use(cells[index])
                        )
                    else:
                        arguments = (rerun, accept_code, tuple(trust))
                        running[index] = Worker(context, cells[index], free.pop(), arguments)
                        continue
                connection.wait([w.process.sentinel for w in running.values()], timeout=0.25)
                for index in [i for i, worker in running.items() if not worker.process.is_alive()]:
                    worker = running.pop(index)
                    free.append(worker.gpu)
                    outcomes[index] = worker.outcome(
                        before[index], stopping=stop.signal is not None
                    )
                    pace.learn(cells[index])
                    line.finished(outcomes[index], time.monotonic() - started)
                line.show(cells, waiting, running, outcomes, count)
        finally:  # nothing is running here but after a second signal or an error of ours
            for worker in running.values():
                worker.process.kill()
                worker.process.join()
    for index in waiting:
        outcomes[index] = Outcome(cells[index], before[index], cells[index].state())
    ordered = [outcomes[index] for index in range(len(cells))]
    record.close(ordered)
    return ordered


def closing_table(outcomes: Sequence[Outcome]) -> str:
    """Return what became of each cell, and the test score of the best one by validation."""
    cells = [outcome.cell for outcome in outcomes]
    rows, best = [], None
    for outcome in outcomes:
        summary = outcome.cell.summary() if outcome.after != "damaged" else None
        validation = summary.best_val_accuracy if summary else None
        if summary and outcome.after == "finished" and validation is not None:
            best = max(
                best or (validation, outcome, summary),
                (validation, outcome, summary),
                key=lambda b: b[0],
            )
        rows.append(
            [
                *outcome.cell.axes.values(),
                outcome.before,
                outcome.after,
                f"{validation:.4f}" if validation is not None else "-",
                duration(outcome.seconds) if outcome.seconds else "-",
                str(outcome.cell.run.path),
                shorten(outcome.error or "", 160),
            ]
        )
    header = [*short_names(cells), "before", "after", "val accuracy", "time", "folder", "error"]
    lines = [table(header, rows)]
    count = {
        state: sum(o.after == state for o in outcomes) for o in outcomes for state in [o.after]
    }
    lines.append(", ".join(f"{number} {state}" for state, number in count.items()))
    if best is not None and best[2].test_accuracy is not None:
        lines.append(
            f"best by validation: {best[1].cell.run.path} "
            f"(test accuracy {best[2].test_accuracy:.2%})"
        )
    return "\n".join(lines)


def raise_for(outcomes: Sequence[Outcome], stop: Stop) -> None:
    """Raise what the command ends with: Stopped, RunFailed or NotNow; nothing if all is well."""
    count = len(outcomes)
    if stop.signal is not None:
        left = sum(o.after not in ("finished", "failed") for o in outcomes)
        raise Stopped(
            stop.signal, f"stopped with {left} of {count} cells left; the same line goes on"
        )
    failed = [o for o in outcomes if o.code not in (0, *_LEFT_OUT)]
    if failed:
        raise RunFailed(
            f"{len(failed)} of {count} cells failed (the table says why); the same line tries "
            "them again"
        )
    not_now = [o for o in outcomes if o.code in _LEFT_OUT]
    if not_now:
        raise NotNow(f"{len(not_now)} of {count} cells were left out: {not_now[0].error}")


def sort_out(
    cells: Sequence[SweepCell], *, rerun: bool, accept_code: bool
) -> tuple[dict[int, Outcome], list[int], list[str]]:
    """Make the folders that are not there, queued; return what is settled, what is to run, states.

    Cells are named by their index.
    """
    outcomes: dict[int, Outcome] = {}
    before = [cell.state() for cell in cells]
    for index, (cell, state) in enumerate(zip(cells, before, strict=True)):
        if state in ("new", "queued"):
            RunDir.create(cell.config)
        done = _without_running(cell, state, rerun=rerun, accept_code=accept_code)
        if done is not None:
            outcomes[index] = done
    return outcomes, [i for i in range(len(cells)) if i not in outcomes], before


def carry_out(
    run: RunDir,
    code: str,
    stop: Stop,
    *,
    rerun: bool,
    accept_code: bool,
    trust: Sequence[str],
) -> tuple[int, str | None]:
    """Execute a folder in a process of its own; return the exit code and the line that says why.

    `code` is the hash of the sources when the sweep began: a cell that would run others is refused.
    """
    try:
        components.trust(list(trust))
        if components.code_hash(run.config) != code:
            raise NotNow("the code was changed while the sweep ran; run the same line again")
        execute(run, stop=stop, rerun=rerun, accept_code=accept_code)
    except Stopped as stopped:
        name = signal.Signals(stopped.signal).name
        return 128 + stopped.signal, f"stopped by {name}; all is saved"
    except (RequestError, NotNow, RunFailed) as error:
        exit_code = next(c for kind, c in EXIT_CODES.items() if isinstance(error, kind))
        return exit_code, str(error)
    except OSError as error:
        return 1, f"{error.filename or run.path}: {error.strerror or error}"
    return 0, None


def _without_running(
    cell: SweepCell, state: str, *, rerun: bool, accept_code: bool
) -> Outcome | None:
    """Return the outcome of a cell that needs no process, or None."""
    if state == "damaged":
        return Outcome(cell, state, state, 0.0, 1, cell.problem())
    if rerun:
        return None
    if state == "other code" and not accept_code:
        error = "made by other code: rerun=true runs it again, accept_code=true takes it as it is"
        return Outcome(cell, state, state, 0.0, 3, error)
    finished = state == "finished" or (state == "other code" and cell.is_finished())
    return Outcome(cell, state, "finished") if finished else None


def _next(cells: Sequence[SweepCell], waiting: list[int], running: Mapping[int, Any]) -> int | None:
    """Take the next cell whose folder is free; one that stays in use is taken when none is left."""
    for index in waiting:
        if not cells[index].run.is_locked():
            waiting.remove(index)
            return index
    if running or not waiting:
        return None
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while cells[waiting[0]].run.is_locked() and time.monotonic() < deadline:
        time.sleep(0.1)
    return waiting.pop(0)


def _in_use(cell: SweepCell) -> str:
    return f"{cell.run.path} is in use by another process; wait for it or stop it"


class Record:
    """The sweep's own record, `.sweeps/<id>/sweep.json` beside its cells: command, cells, ends."""

    def __init__(self, cells: Sequence[SweepCell], command: Sequence[str]) -> None:
        parent = cells[0].run.path.parent / ".sweeps"
        started = datetime.now(UTC)
        self.folder = parent / f"{started:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
        self.folder.mkdir(parents=True)
        self._folders = [cell.run.path for cell in cells]
        self._content: dict[str, Any] = {
            "command": list(command),
            "started": started.isoformat(timespec="seconds"),
            "cells": [
                {"folder": os.path.relpath(c.run.path, parent.parent), "axes": dict(c.axes)}
                for c in cells
            ],
        }
        self._write()

    def note_jobs(self, jobs: Mapping[Path, str]) -> None:
        """Note the ids of the jobs that run the cells, by folder."""
        for cell, folder in zip(self._content["cells"], self._folders, strict=True):
            if folder in jobs:
                cell["job"] = jobs[folder]
        self._write()

    def close(self, outcomes: Sequence[Outcome]) -> None:
        """Note what became of each cell."""
        self._content["ended"] = datetime.now(UTC).isoformat(timespec="seconds")
        for cell, outcome in zip(self._content["cells"], outcomes, strict=True):
            cell |= {
                "before": outcome.before,
                "after": outcome.after,
                "seconds": round(outcome.seconds, 3),
                "error": outcome.error,
            }
        self._write()

    def _write(self) -> None:
        write_text(
            self.folder / "sweep.json",
            json.dumps(self._content, indent=1, ensure_ascii=False) + "\n",
        )


class Worker:
    """The process of one cell, seen from the sweep."""

    def __init__(
        self, context: Any, cell: SweepCell, gpu: str, arguments: tuple[bool, bool, tuple[str, ...]]
    ) -> None:
        self.cell, self.gpu = cell, gpu
        self._started = time.monotonic()
        self._receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_work,
            args=(str(cell.run.path), cell.code, gpu, *arguments, sender),
            name=cell.run.path.name,
            daemon=True,
        )
        with _environment(OMP_NUM_THREADS="1"):  # no thread in the server that forks
            self.process.start()
        sender.close()
        self._asked = False

    def ask_to_stop(self) -> None:
        """Let the cell save and end, once."""
        if not self._asked:
            self._asked = True
            self.process.terminate()

    def outcome(self, before: str, *, stopping: bool) -> Outcome:
        """Return what the ended process came to; a killed one is noted as failed in its folder."""
        self.process.join()
        code, error = self.process.exitcode or 0, None
        with contextlib.suppress(EOFError, OSError):
            if self._receiver.poll():
                code, error = self._receiver.recv()
        self._receiver.close()
        if code < 0 and not stopping:
            name = signal.Signals(-code).name if -code in list(signal.Signals) else f"{-code}"
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            error = f"killed by {name}{hint}"
        elif code not in (0, *_LEFT_OUT) and error is None:
            error = f"its process ended with exit code {code}; train.log in its folder says where"
        if error is not None and code not in (0, *_LEFT_OUT):
            with contextlib.suppress(NotNow, RequestError, RunFailed, OSError):
                note_killed(self.cell.run, error)
        seconds = time.monotonic() - self._started
        return Outcome(self.cell, before, self.cell.state(), seconds, code, error)


def _work(
    path: str,
    code: str,
    gpu: str,
    rerun: bool,
    accept_code: bool,
    trust: tuple[str, ...],
    sender: Any,
) -> None:
    """Be the process of one cell: execute its folder, send (exit code, error line), and end.

    What is printed here goes to the cell's train.log. A sweep that dies takes its cells along:
    they save and stop, so that the same line can go on at once.
    """
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C reaches the sweep alone, which passes it on once
    run = RunDir(path)
    with run.log_file.open("a", encoding="utf-8") as output:
        sys.stdout.flush()
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
    log.setLevel(logging.INFO)
    log.propagate = False
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    with Stop().installed() as stop:
        result = carry_out(run, code, stop, rerun=rerun, accept_code=accept_code, trust=trust)
    sender.send(result)
    sender.close()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def process_context() -> Any:
    """Return how processes start: forked from a server that imported all, or anew.

    macOS's libraries do not survive a fork, Windows has none.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Line:
    """One live line on a terminal; elsewhere a plain line for each cell that ends."""

    def __init__(self, total: int, pace: Pace) -> None:
        self._total, self._pace = total, pace
        self._bar: Any = None
        self._shown = 0.0

    def __enter__(self) -> "_Line":
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._total,
                desc="cells",
                dynamic_ncols=True,
                leave=False,
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}",
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def finished(self, outcome: Outcome, elapsed: float) -> None:
        """Say that a cell has ended; on a terminal only if it did not finish."""
        if self._bar is None or outcome.code:
            log.info(
                "%s: %s in %s%s",
                outcome.cell.run.path.name,
                outcome.after,
                duration(outcome.seconds),
                f" ({outcome.error})" if outcome.error else "",
            )

    def show(
        self,
        cells: Sequence[SweepCell],
        waiting: Sequence[int],
        running: Mapping[int, Any],
        outcomes: Mapping[int, Outcome],
        jobs: int,
    ) -> None:
        """Bring the live line up to date, once a second."""
        if self._bar is None or time.monotonic() - self._shown < 1:
            return
        self._shown = time.monotonic()
        failed = sum(outcome.code not in (0, *_LEFT_OUT) for outcome in outcomes.values())
        left = self._pace.time_left([cells[i] for i in (*running, *waiting)], jobs)
        self._bar.set_postfix_str(
            f"{len(running)} running, {failed} failed"
            + (f", {duration(left)} left" if left is not None else ""),
            refresh=False,
        )
        self._bar.update(len(outcomes) - self._bar.n)
        self._bar.refresh()


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _free_memory() -> int:
    """Return the bytes that new processes may take; a lot where the system does not say."""
    source = Path("/proc/meminfo")
    lines = source.read_text(encoding="ascii").splitlines() if source.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else 1 << 60
