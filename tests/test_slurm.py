"""hydra/launcher=submitit_slurm on a real SLURM of this machine."""

import dataclasses
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_runs import TINY_CELL, started, wait_until, weights

import cifar_lab
from cifar_lab.errors import UsageError
from cifar_lab.runs.run_dir import RunDir, find_runs
from cifar_lab.sweeps.cell import run_cell, sweep_cells
from cifar_lab.sweeps.slurm import sbatch_options, sent_jobs, write_array
from cifar_lab.training.loop import Stop
from cifar_lab.training.preflight import compose_checked
from cifar_lab.training.run import run_experiment

SCRIPT = Path(__file__).parents[1] / "scripts" / "slurm"
LONGEST_ARRAY = 3
TINY = (*TINY_CELL, "device=cpu", "precision=fp32")
ON_SLURM = (
    *("hydra/launcher=submitit_slurm", "hydra.launcher.poll_seconds=0.5"),
    "hydra.launcher.mem_gb=1",
)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The daemons of a SLURM of this machine, started for these tests and stopped after them."""
    if os.geteuid() != 0:
        pytest.skip("slurm: its daemons need root")
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([SCRIPT, "start", folder, f"MaxArraySize={LONGEST_ARRAY}"], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield
        subprocess.run(["scancel", "--me"], check=False)
    subprocess.run([SCRIPT, "stop", folder], check=True)


def train(folder: Path, *overrides: str) -> "subprocess.Popen[str]":
    return started("-m", *TINY, f"output_dir={folder}", *overrides)


def squeue() -> list[str]:
    command = ["squeue", "--noheader", "--array", "--me", "--format=%i"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.slurm
@pytest.mark.usefixtures("slurm")
def test_a_preempted_job_is_queued_again_and_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    process = train(tmp_path / "slurm", *ON_SLURM, "training.epochs=20", "seed=0,1")
    folder = tmp_path / "slurm" / "runs"
    wait_until(lambda: folder.is_dir() and len(find_runs(folder)) == 2, "the folders")
    first = find_runs(folder)[0]
    wait_until(first.last.exists, "a checkpoint")
    job = sorted(squeue())[0]
    subprocess.run(["scancel", "--signal=USR2", job], check=True)

    def queued_again() -> bool:
        shown = subprocess.run(
            ["scontrol", "show", "job", job], capture_output=True, text=True, check=True
        ).stdout
        return "Restarts=1" in shown and "JobState=PENDING" in shown

    wait_until(queued_again, "the job in the queue again")
    assert first.status == "interrupted"
    # SLURM lets a job that was queued again wait for two minutes
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "2 finished" in out
    log = first.log_file.read_text(encoding="utf-8")
    assert "resumed at epoch" in log
    again = train(tmp_path / "slurm", *ON_SLURM, "training.epochs=20", "seed=0,1")
    assert again.communicate(timeout=120)[0].count("finished") >= 2
    assert again.returncode == 0
    request = compose_checked([*TINY, f"output_dir={tmp_path / 'calm'}", "training.epochs=20"])
    undisturbed = RunDir.create(sweep_cells([request.runs[0].config])[0].config)
    threads = torch.get_num_threads()
    run_experiment(undisturbed)
    torch.set_num_threads(threads)
    assert undisturbed.path.name == first.path.name
    assert undisturbed.read_summary().threads == first.read_summary().threads
    a, b = weights(first), weights(undisturbed)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slurm
@pytest.mark.usefixtures("slurm")
def test_a_cancelled_job_is_saved_and_a_line_waits_for_jobs_already_sent(tmp_path: Path) -> None:
    options = (*ON_SLURM, "training.epochs=2000")
    process = train(tmp_path, *options)
    folder = tmp_path / "runs"
    wait_until(lambda: folder.is_dir() and len(find_runs(folder)) == 1, "the folder")
    (run,) = find_runs(folder)
    wait_until(run.last.exists, "a checkpoint")
    (job,) = squeue()
    process.send_signal(signal.SIGINT)
    assert f"scancel {job.partition('_')[0]} ends them" in process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert squeue() == [job]
    again = train(tmp_path, *options)
    assert again.stdout is not None
    assert f"1 jobs in SLURM's queue: {job.partition('_')[0]}" in again.stdout.readline()
    subprocess.run(["scancel", job], check=True)
    _, err = again.communicate(timeout=60)
    assert again.returncode == 3, err
    assert "stopped by SIGTERM" in err
    assert run.status == "interrupted"


@pytest.mark.slurm
@pytest.mark.usefixtures("slurm")
def test_a_detached_sweep_goes_on_without_its_command_and_is_sent_once(tmp_path: Path) -> None:
    """Five cells are two arrays here; the line that waits for them is killed and typed again."""
    options = (
        *ON_SLURM,
        "+hydra.launcher.additional_parameters={hold: true}",  # none ends before it is counted
        "training.epochs=1",
        "seed=0,1,2,3,4",
    )
    first = train(tmp_path, *options, "--detach")
    out, err = first.communicate(timeout=120)
    assert first.returncode == 0, err
    jobs = squeue()
    assert len(jobs) == 5
    arrays = sorted({int(job.partition("_")[0]) for job in jobs})
    assert len(arrays) == 2
    assert f"3 jobs in SLURM's queue: {arrays[0]}\n" in out
    assert f"python -m cifar_lab.summarize {tmp_path / 'runs'}" in out
    waiting = train(tmp_path, *options)
    assert waiting.stdout is not None
    assert "jobs in SLURM's queue: " in waiting.stdout.readline()
    waiting.kill()
    waiting.communicate(timeout=60)
    again = train(tmp_path, *options)
    assert again.stdout is not None
    assert "jobs in SLURM's queue: " in again.stdout.readline()
    subprocess.run(["scontrol", "release", *map(str, arrays)], check=True)
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert "5 finished" in out
    assert len(list((tmp_path / "runs").glob(".sweeps/*/*.code"))) == 5


def test_only_jobs_of_a_cluster_can_be_detached(tmp_path: Path) -> None:
    for words in (["--detach"], ["detach=true", "hydra/launcher=ray"]):
        with pytest.raises(UsageError, match="detach=true needs hydra/launcher=submitit_slurm"):
            cifar_lab.sweep(*TINY, f"output_dir={tmp_path}", "seed=0,1", *words)
    assert not list(tmp_path.iterdir())


def test_jobs_that_an_earlier_line_sent_are_known_by_their_script(tmp_path: Path) -> None:
    slurm = ("hydra/launcher=submitit_slurm", "seed=0,1,2")
    request = compose_checked([*TINY, "-m", f"output_dir={tmp_path}", *slurm])
    cells = sweep_cells([c.config for c in request.runs])
    folder = tmp_path / "runs" / ".sweeps" / "1"
    arguments = [[str(cell.run.path), "--code", cell.code] for cell in cells]
    script = str(write_array(cells, folder, request.launcher, arguments))
    assert sent_jobs({"7_1": script, "8": "/home/a/job.sh"}) == {
        str(cells[1].run.path): ("7_1", folder)
    }


def test_the_node_decides_what_auto_means_and_the_address_does_not_tell(tmp_path: Path) -> None:
    words = [*TINY, "-m", f"output_dir={tmp_path}", "hydra/launcher=submitit_slurm"]
    words += ["precision=auto", "training.epochs=1"]
    request = compose_checked([*words, "device=cuda:1"])  # this machine need not have one
    assert request.runs[0].config.device == "cuda:1"
    words.append("device=auto")
    (cell,) = sweep_cells([c.config for c in compose_checked(words).runs])
    assert (cell.config.device, cell.config.precision) == ("auto", "auto")
    run = RunDir.create(cell.config)
    threads = torch.get_num_threads()
    assert run_cell(run, Stop(), code=cell.code) == 0
    torch.set_num_threads(threads)
    written = RunDir(run.path).read_config()
    assert "auto" not in (written.device, written.precision)
    assert sweep_cells([compose_checked(words).runs[0].config])[0].state() == "finished"
    assert RunDir(run.path).own_config() == written


def test_what_the_launchers_are_asked(tmp_path: Path) -> None:
    options = ("hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=7", "threads=3")
    request = compose_checked(
        [*TINY, "-m", f"output_dir={tmp_path}", "hydra/launcher=submitit_slurm", *options]
    )
    cells = sweep_cells([c.config for c in request.runs])
    asked = sbatch_options(request.launcher, cells)
    assert (asked["partition"], asked["time"], asked["cpus-per-task"]) == ("gpu", 7, 3)
    assert "gpus-per-node" not in asked
    on_gpu = [
        dataclasses.replace(c, config=dataclasses.replace(c.config, device="cuda")) for c in cells
    ]
    assert sbatch_options(request.launcher, on_gpu)["gpus-per-node"] == 1
