"""Cells as jobs of SLURM, sent as arrays by sbatch.

    python -m cifar_lab.sweeps.slurm FOLDER     (a job of the array whose files are in FOLDER)

A job runs the cell in a folder, as every launcher does. When SLURM takes its place away (a
preemption or the end of its time, announced by SIGUSR2) the cell saves, the job is queued again,
and goes on from there, in another process and perhaps on another machine.
"""

import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from cifar_lab.config.launch import LaunchOptions
from cifar_lab.errors import Unavailable, UsageError, log, shorten
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.sweeps import cell as cell_module
from cifar_lab.sweeps.cell import Cell, note
from cifar_lab.sweeps.pool import Job, Launcher
from cifar_lab.sweeps.server import LOST, python_path
from cifar_lab.training.loop import Stop

_OURS = (  # settings that are no option of sbatch by their own name
    *("cluster", "poll_seconds", "max_num_timeout", "array_parallelism", "setup", "name"),
    *("additional_parameters", "signal_delay_s", "timeout_min", "mem_gb"),
)


class Slurm(Launcher):
    """The launcher whose jobs SLURM runs, as arrays: all at a time, since it has a queue.

    UsageError where there is no SLURM.
    """

    is_detached = True

    def __init__(self, settings: Mapping[str, Any], options: LaunchOptions) -> None:
        super().__init__(options)
        if shutil.which("sbatch") is None:
            raise UsageError("hydra/launcher=submitit_slurm: there is no SLURM here (no sbatch)")
        self._settings = settings
        self.queue = _jobs_in_queue()
        self._sent = sent_jobs(self.queue)  # by earlier commands
        setting = re.search(r"^MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config"), re.M)
        self.most_at_once = max(1, int(setting[1])) if setting else 1001  # SLURM's default

    def is_sent(self, cell: Cell) -> bool:
        """Return whether the queue has a job of this cell."""
        return str(cell.run.path.absolute()) in self._sent

    def start(self, cells: Sequence[Cell]) -> list[Job]:
        """Send the cells as one array, but for those that an earlier command sent."""
        to_send = [cell for cell in cells if not self.is_sent(cell)]
        if to_send:
            folder = to_send[0].run.path.absolute().parent / ".sweeps" / str(time.time_ns())
            script = write_array(to_send, folder, self._settings, map(self.arguments, to_send))
            try:
                array = _ask("sbatch", "--parsable", str(script)).partition(";")[0].strip()
            except UsageError as error:
                raise Unavailable(
                    f"SLURM did not take {len(to_send)} jobs: {error}; the jobs that it took "
                    "before go on, and the same line sends the others"
                ) from None
            self._sent |= sent_jobs({f"{array}_{n}": str(script) for n in range(len(to_send))})
        jobs = []
        for cell in cells:
            name, folder = self._sent.pop(str(cell.run.path.absolute()))
            output = folder / f"{name.partition('_')[2]}.out"
            loss = f"job {name} ended without a result; {output} may say why"
            jobs.append(Job(cell, _SlurmJob(name, output.with_suffix(".code"), self), loss))
        log.info("%d jobs in SLURM's queue: %s", len(jobs), _arrays(jobs))
        return jobs

    def wait(self, jobs: Sequence[Job], stop: Stop) -> None:
        """Look at the queue again after a while, or at once when a signal came."""
        deadline = time.monotonic() + self._settings["poll_seconds"]
        while (left := deadline - time.monotonic()) > 0 and stop.signal is None:
            time.sleep(min(0.25, left))
        self.queue = _jobs_in_queue()

    def abandon(self, jobs: Sequence[Job]) -> None:
        """Let the jobs go on."""
        if jobs:
            log.info("the jobs go on; scancel %s ends them", _arrays(jobs))


class _SlurmJob:
    """A job of SLURM, which writes its exit code into a file."""

    def __init__(self, name: str, code: Path, launcher: Slurm) -> None:
        self.name, self._code, self._launcher, self._missing = name, code, launcher, 0

    def terminate(self) -> None:
        subprocess.run(["scancel", self.name], check=False, timeout=60)

    def poll(self) -> int | None:
        if self._code.exists():
            return int(self._code.read_text(encoding="ascii"))
        # twice: a network file system may show the file after SLURM has forgotten the job
        self._missing = 0 if self.name in self._launcher.queue else self._missing + 1
        return LOST if self._missing > 1 else None


def sbatch_options(settings: Mapping[str, Any], cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the options of sbatch for an array of these cells, without their dashes."""
    given = {k.replace("_", "-"): v for k, v in settings.items() if k not in _OURS}
    given = {k: v for k, v in given.items() if v is not None} | settings["additional_parameters"]
    defaults = {"cpus-per-task": max((cell.config.threads or 1 for cell in cells), default=1)}
    asks_for_gpus = any(name.startswith(("gres", "gpus")) for name in given)
    if not asks_for_gpus and any(cell.config.device.startswith("cuda") for cell in cells):
        defaults["gpus-per-node"] = 1
    return {
        "job-name": settings["name"],
        "time": settings["timeout_min"],
        "mem": f"{int(settings['mem_gb'] * 1024)}M",
        "signal": f"USR2@{settings['signal_delay_s']}",
        "array": f"0-{len(cells) - 1}%{settings['array_parallelism']}",
        "open-mode": "append",
        "requeue": True,
        **defaults,
        **given,
    }


def write_array(
    cells: Sequence[Cell], folder: Path, settings: Mapping[str, Any], arguments: Iterable[list[str]]
) -> Path:
    """Write into a new folder what the jobs of an array need; return the script for sbatch."""
    folder.mkdir(parents=True)
    content = {
        "cells": list(arguments),
        "seconds": 60 * settings["timeout_min"] - settings["signal_delay_s"],
        "restarts": settings["max_num_timeout"],
    }
    (folder / "array.json").write_text(json.dumps(content), encoding="utf-8")
    options = sbatch_options(settings, cells) | {"output": folder / "%a.out"}
    script = folder / "array.sh"
    command = [sys.executable, "-u", "-m", __name__, str(folder)]
    lines = [
        "#!/bin/bash",
        *(
            f"#SBATCH --{name}" + f"={shlex.quote(str(value))}" * (value is not True)
            for name, value in options.items()
            if value is not False
        ),
        f"export PYTHONPATH={shlex.quote(python_path())}",
        *(settings["setup"] or ()),
        f"exec srun --unbuffered --cpus-per-task={options['cpus-per-task']} {shlex.join(command)}",
    ]
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return script


def sent_jobs(queue: Mapping[str, str]) -> dict[str, tuple[str, Path]]:
    """Return the jobs of a queue that sweeps have sent and the folder of each, by run folders.

    SLURM knows the script of each job, and the cells of its array are beside that: the jobs of a
    command that was killed while it was sending are found too.
    """
    read = functools.cache(lambda file: json.loads(file.read_bytes())["cells"])
    sent = {}
    for job, script in queue.items():
        folder = Path(script).parent
        if folder.parent.name == ".sweeps" and (file := folder / "array.json").exists():
            sent[read(file)[int(job.partition("_")[2])][0]] = (job, folder)
    return sent


class _Notice(Stop):
    """SLURM's signals: a second one is no impatience, and SIGUSR2 (queue again) outranks all."""

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            super()._receive(number, frame)
        elif number == signal.SIGUSR2:
            self.signal = number


def main(argv: Sequence[str] | None = None) -> int:
    """Be a job: run its cell, which goes on from its checkpoint if SLURM started it before."""
    (name,) = sys.argv[1:] if argv is None else argv
    folder, task, started = Path(name), os.environ["SLURM_ARRAY_TASK_ID"], time.monotonic()
    content = json.loads((folder / "array.json").read_bytes())
    arguments = content["cells"][int(task)]
    notice = _Notice()
    signal.signal(signal.SIGUSR2, notice._receive)
    code = cell_module.main(arguments, notice)
    if code in cell_module.STOPPED:
        time.sleep(1)  # SLURM may send SIGTERM just before SIGUSR2
    if code > 128 and notice.signal == signal.SIGUSR2:
        is_out_of_time = time.monotonic() - started > content["seconds"] - 60
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        if not is_out_of_time or restarts < content["restarts"]:
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"
            return subprocess.run(["scontrol", "requeue", job], check=False).returncode
        note(RunDir(arguments[0]), "it ran into the time of its job too often", "failed")
        code = 1
    (folder / f"{task}.code").write_text(str(code), encoding="ascii")
    return code


def _arrays(jobs: Sequence[Job]) -> str:
    """Return the ids of the arrays of jobs, as scancel takes them."""
    return " ".join(dict.fromkeys(job.process.name.partition("_")[0] for job in jobs))


def _jobs_in_queue() -> dict[str, str]:
    """Return the user's jobs in SLURM's queue, each of an array by itself, and their scripts."""
    answer = _ask("squeue", "--noheader", "--array", "--me", "--format=%i %o")
    return {job: script for job, _, script in (line.partition(" ") for line in answer.splitlines())}


def _ask(*command: str) -> str:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        detail = str(getattr(error, "stderr", None) or error).strip().splitlines() or ["no reason"]
        raise UsageError(f"SLURM does not answer: {shorten(detail[-1], 120)}") from None
    return answer.stdout


if __name__ == "__main__":
    sys.exit(main())
