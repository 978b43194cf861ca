import contextlib
import csv
import dataclasses
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TINY_CELL, assert_same_result, descendants, started, wait_until

from cifar_lab import train
from cifar_lab.config.launch import LaunchOptions
from cifar_lab.errors import RunFailed, Unavailable
from cifar_lab.runs.run_dir import RunDir, find_runs
from cifar_lab.runs.summary import queued
from cifar_lab.sweeps import local, pool
from cifar_lab.sweeps.cell import THREADS, Cell, run_cell, sweep_cells
from cifar_lab.sweeps.outcome import Outcome, Pace, closing_table, plan, raise_for
from cifar_lab.sweeps.pool import run_all
from cifar_lab.sweeps.server import LOST
from cifar_lab.training import device
from cifar_lab.training.loop import Stop
from cifar_lab.training.preflight import compose_checked
from cifar_lab.training.run import run_experiment

TINY = ("-m", *TINY_CELL, "training.epochs=2")


def cells_of(folder: Path, *overrides: str) -> list[Cell]:
    request = compose_checked([*TINY, f"output_dir={folder}", *overrides])
    return sweep_cells([c.config for c in request.runs], [c.overrides for c in request.runs])


def run(cells: Sequence[Cell], **options: Any) -> list[Outcome]:
    with Stop().installed() as stop:
        return run_all(cells, local.LocalProcesses(LaunchOptions(**options)), stop=stop)


@pytest.mark.slow
def test_a_killed_cell_is_one_failed_cell_and_the_next_call_goes_on(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, "seed=0,1", "training.epochs=6")

    def kill() -> None:
        wait_until(cells[0].run.last.exists, "a checkpoint", 60)
        holder = cells[0].run.lock_file.read_text(encoding="utf-8")  # process N on HOST
        os.kill(int(holder.split()[1]), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    outcomes = run(cells, jobs=1)
    assert [o.after for o in outcomes] == ["failed", "finished"]
    assert "SIGKILL" in (outcomes[0].error or "")
    assert cells[0].run.read_summary().error == outcomes[0].error
    cells = cells_of(tmp_path, "seed=0,1", "training.epochs=6", "training.print_every=3")
    (again, _) = run(cells, jobs=1)
    assert (again.before, again.after) == ("failed", "finished")
    assert again.cell.run.read_config().training.print_every == 3
    assert "resumed at epoch" in cells[0].run.log_file.read_text(encoding="utf-8")
    (undisturbed,) = run(cells_of(tmp_path / "calm", "training.epochs=6"), jobs=1)
    assert_same_result(cells[0].run, undisturbed.cell.run)


@pytest.mark.slow
def test_the_same_line_skips_what_is_finished_and_a_new_value_runs_alone(tmp_path: Path) -> None:
    first = run(cells_of(tmp_path, "seed=0,1"), jobs=2)
    assert [(o.before, o.after, o.code) for o in first] == [("new", "finished", 0)] * 2
    written = {o.cell.run.summary_file: o.cell.run.summary_file.stat().st_mtime_ns for o in first}
    again = run(cells_of(tmp_path, "seed=0,1,2"), jobs=2)
    assert [o.before for o in again] == ["finished", "finished", "new"]
    assert [o.after for o in again] == ["finished"] * 3
    assert all(path.stat().st_mtime_ns == at for path, at in written.items())
    table = closing_table(again)
    assert table.splitlines()[0].split()[:3] == ["seed", "before", "after"]
    assert table.splitlines()[-1].endswith(f"python -m cifar_lab.summarize {tmp_path / 'runs'}")


def test_the_last_lines_name_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = cells_of(tmp_path, "optimizer=sgd,adam", "seed=0,1,2")
    accuracies = [0.95, 0.5, 0.5, 0.8, 0.8, 0.8]  # the best single run is one of SGD's
    for cell, accuracy in zip(cells, accuracies, strict=True):
        scores: dict[str, Any] = {"best_val_accuracy": accuracy, "test_accuracy": accuracy - 0.1}
        done = dataclasses.replace(queued(cell.config), status="finished", test_size=360, **scores)
        RunDir.create(cell.config).write_summary(done)
    table = closing_table([Outcome(cell, "finished", "finished") for cell in cells])
    *_, best, closest, command = table.splitlines()
    assert all(w in best for w in ("optimizer=adam", "mean of 3 runs", "test accuracy 70.00"))
    assert "It is not told apart from optimizer=sgd." in best
    assert "the best two are 15.00 points apart" in closest
    assert table.count("test accuracy") == 1
    assert command == f"to compare them: python -m cifar_lab.summarize {tmp_path / 'runs'}"
    line = [*TINY, f"output_dir={tmp_path}", "optimizer=sgd,adam", "seed=0,1,2"]
    assert train.main([*line, "figures=standard"]) == 0
    assert capsys.readouterr().out.count("figures=standard: `cifar_lab.draw` draws") == 1


@pytest.mark.slow
def test_results_do_not_depend_on_jobs_nor_on_the_process(tmp_path: Path) -> None:
    one = run(cells_of(tmp_path / "one"), jobs=1)
    two = run(cells_of(tmp_path / "two", "seed=0,1"), jobs=2)
    assert one[0].cell.config.threads == two[0].cell.config.threads == THREADS
    assert_same_result(one[0].cell.run, two[0].cell.run)
    here = RunDir.create(cells_of(tmp_path / "here")[0].config)
    before = torch.get_num_threads()
    run_experiment(here)
    torch.set_num_threads(before)
    assert_same_result(here, one[0].cell.run)


def test_a_cell_that_fails_is_one_failed_cell(tmp_path: Path) -> None:
    (cell,) = cells_of(tmp_path, "optimizer=sgd", "optimizer.lr=1e30", "threads=1")
    code = run_cell(RunDir.create(cell.config), Stop(), code=cell.code)
    outcome = Outcome(cell, "new", cell.state(), code=code, error=cell.why(code))
    assert (outcome.after, outcome.code) == ("failed", 1)
    assert "the training loss became" in (cell.run.read_summary().error or "")
    assert cell.run.read_summary().error == outcome.error
    assert (outcome.error or "")[:100] in closing_table([outcome])
    with pytest.raises(RunFailed, match="1 of 1 cells failed"):
        raise_for([outcome], Stop())


@pytest.mark.slow
def test_what_is_damaged_held_by_another_process_or_made_by_other_code_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *cells, last = cells_of(tmp_path, "seed=0,1,2")
    monkeypatch.setattr(pool, "PATIENCE_SECONDS", 0.2)
    RunDir.create(cells[0].config)
    RunDir.create(last.config).summary_file.write_text("{", encoding="utf-8")
    with cells[0].run.lock():
        held, done, damaged = run([*cells, last], jobs=1)
    assert (damaged.after, damaged.code) == ("damaged", 1)
    assert "summary.json is damaged" in (damaged.error or "")
    assert (held.after, held.code, done.after) == ("in use", 3, "finished")
    with pytest.raises(Unavailable, match="in use by process"):
        raise_for([held, done], Stop())

    other = [dataclasses.replace(cell, code="another") for cell in cells]
    outcomes = run(other, jobs=1)
    assert outcomes[1].before == "other code"
    assert outcomes[1].error is not None
    assert "accept_code=true" in outcomes[1].error
    with pytest.raises(Unavailable):
        raise_for(outcomes[1:], Stop())
    taken = run(other[1:], jobs=1, accept_code=True)
    assert (taken[0].after, taken[0].code) == ("finished", 0)


def test_a_cell_does_not_run_other_code_than_the_sweep_began_with(tmp_path: Path) -> None:
    (cell,) = cells_of(tmp_path)
    queued_run = RunDir.create(cell.config)
    code = run_cell(queued_run, Stop(), code="another")
    assert code == 3
    message = cell.why(code)
    assert message is not None
    assert "the code was changed while the sweep ran" in message
    assert queued_run.status == "queued"
    with queued_run.lock():
        assert run_cell(RunDir(cell.run.path), Stop(), code=cell.code) == 3
        assert "another process took it first" in (cell.why(3) or "")


def test_two_configs_of_one_address_are_one_cell(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, "threads=1,2")
    assert len(cells) == 1
    assert cells[0].axes == {"threads": "1"}


def test_a_cell_that_outlives_its_server_has_ended_once_its_lock_is_free(tmp_path: Path) -> None:
    (cell,) = cells_of(tmp_path)
    process = types.SimpleNamespace(poll=lambda: LOST)
    job = pool.Job(cell, process)
    with RunDir.create(cell.config).lock():
        assert job.poll() is None
    assert job.poll() == LOST
    with cell.run.lock():  # by another sweep
        assert job.poll() == LOST
    outcome = job.outcome()
    assert (outcome.after, outcome.code) == ("failed", 1)
    assert outcome.error == "its process ended; see its train.log"


@pytest.mark.slow
def test_a_plan_writes_nothing_and_is_timed_by_a_probe_then_by_finished_runs(
    tmp_path: Path,
) -> None:
    threads = torch.get_num_threads()
    cells = cells_of(tmp_path, "seed=0,1")
    before = plan(cells, jobs=1)
    assert "2 of 2 cells to run, 1 at a time: about" in before
    assert "as timed by a probe; nothing was run" in before
    assert not list(tmp_path.iterdir())
    run(cells[:1], jobs=1)
    after = plan(cells, jobs=1)
    states = [line.split()[1] for line in after.splitlines()[1:3]]
    assert states == ["finished", "new"]
    assert "1 of 2 cells to run, 1 at a time: about" in after
    assert "as timed by finished runs; nothing was run" in after
    torch.set_num_threads(threads)


def test_time_left_fills_the_slots() -> None:
    (cell,) = cells_of(Path("nowhere"), "training.epochs=10")
    pace = Pace()
    assert pace.time_left([cell], jobs=1) is None
    pace.note(cell.config, epoch_seconds=2.0, overhead_seconds=5.0)
    assert pace.seconds(cell.config) == 25.0
    assert pace.seconds(cell.config, epochs_done=9) == 7.0
    assert pace.time_left([cell] * 3, jobs=2) == 50.0
    (other,) = cells_of(Path("nowhere"), "training.epochs=10", "optimizer=sgd")
    assert pace.seconds(other.config) is None
    assert pace.time_left([cell, other], jobs=1) == 50.0, "the one that trains may be at its end"


def test_jobs_fit_the_gpus_the_cores_and_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = cells_of(tmp_path)
    on_cpu = [dataclasses.replace(cell.config, device="cpu")] * 9
    on_gpu = [dataclasses.replace(cell.config, device="cuda")] * 9
    monkeypatch.setattr(device, "visible_gpus", lambda: ["2", "5"])
    monkeypatch.setattr(local, "_cores", lambda: 8)
    monkeypatch.setattr(local, "_free_memory", lambda: 7_500_000_000)
    assert local.fitting_jobs(on_gpu, "auto") == (2, ["2", "5"])
    assert local.fitting_jobs(on_gpu, "auto", jobs_per_gpu=2) == (4, ["2", "5", "2", "5"])
    assert local.fitting_jobs(on_gpu, 8) == (2, ["2", "5"])
    assert local.fitting_jobs(on_gpu, 1) == (1, ["2"])
    second = [dataclasses.replace(cell.config, device="cuda:1")] * 9
    assert local.fitting_jobs(second, "auto", jobs_per_gpu=2) == (2, ["", ""])
    assert local.fitting_jobs(on_cpu, "auto") == (5, [""] * 5)
    assert local.fitting_jobs(on_cpu, 3)[0] == 3
    four_threads = [dataclasses.replace(config, threads=4) for config in on_cpu]
    assert local.fitting_jobs(four_threads, "auto")[0] == 2


def start_sweep(folder: Path, *overrides: str) -> "subprocess.Popen[str]":
    """A sweep in a process group of its own, as a terminal starts it."""
    words = (*TINY, "seed=0,1,2", "jobs=2", f"output_dir={folder}", *overrides)
    return started(*words, start_new_session=True)


def statuses(folder: Path) -> list[str]:
    return [run.status for run in find_runs(folder)] if folder.is_dir() else []


def server_of(sweep: "subprocess.Popen[str]") -> int | None:
    """The process that forks the cells of a sweep."""
    for pid in descendants(sweep.pid):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_text()
            parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
            if "local.serve" in command and int(parent) == sweep.pid:
                return pid
    return None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("search", [False, True])
def test_an_early_ctrl_c_leaves_what_never_started_queued(tmp_path: Path, search: bool) -> None:
    overrides = ("search=optuna", "search.trials=2", "optimizer.lr=interval(0.1,1)") * search
    sweep = start_sweep(tmp_path, *overrides)
    wait_until(lambda: server_of(sweep), "the server", 120)  # and it is still importing torch
    os.killpg(sweep.pid, signal.SIGINT)
    out, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 130, err
    assert set(statuses(tmp_path)) == {"queued"}
    assert not any(run.last.exists() for run in find_runs(tmp_path))
    logs = [run.log_file.read_text() for run in find_runs(tmp_path) if run.log_file.exists()]
    assert "Traceback" not in "".join([out, err, *logs])
    if search:
        assert "2 running" in out  # in the words of Optuna: not failed, and taken up again


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sigterm_to_the_process_group_saves_what_runs(tmp_path: Path) -> None:
    sweep = start_sweep(tmp_path, "training.epochs=500", "training.patience=null")
    wait_until(lambda: len(list(tmp_path.glob("runs/*/last.pt"))) == 2, "two checkpoints", 120)
    os.killpg(sweep.pid, signal.SIGTERM)
    _, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 143, err
    assert "the same line goes on" in err
    assert statuses(tmp_path) == ["interrupted", "interrupted", "queued"]
    assert all("Traceback" not in run.log_file.read_text() for run in find_runs(tmp_path)[:2])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_sweep_outlives_the_server_that_forks_its_cells(tmp_path: Path) -> None:
    sweep = start_sweep(tmp_path, "training.epochs=20", "training.patience=null")
    wait_until(lambda: len(list(tmp_path.glob("runs/*/last.pt"))) == 2, "two checkpoints", 120)
    os.kill(server_of(sweep) or 0, signal.SIGKILL)
    most = 0
    while sweep.poll() is None:
        most = max(most, statuses(tmp_path).count("running"))
        time.sleep(0.02)
    _, err = sweep.communicate()
    assert sweep.returncode == 0, err
    assert statuses(tmp_path) == ["finished"] * 3
    assert most <= 2
    assert all("resumed" not in run.log_file.read_text() for run in find_runs(tmp_path))


def summary_table(folder: Path) -> list[dict[str, str]]:
    """The rows of summary.csv as `summarize` writes it, without the times."""
    command = [sys.executable, "-m", "cifar_lab.summarize", str(folder), "--test"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with (folder / "summary.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)
        ]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_sweep_killed_at_any_moment_is_finished_by_the_same_line(tmp_path: Path) -> None:
    epochs = 8
    line = [sys.executable, "-m", "cifar_lab.train", *TINY, "optimizer=sgd,adam", "seed=0,1"]
    line += [f"training.epochs={epochs}", "jobs=2"]
    calm, killed = tmp_path / "calm" / "runs", tmp_path / "killed" / "runs"
    assert subprocess.run([*line, f"output_dir={calm.parent}"], check=False).returncode == 0

    def epochs_done() -> int:
        return sum(
            max(0, len(file.read_text().splitlines()) - 1) for file in killed.glob("*/metrics.csv")
        )

    # Moments of the work, not of the clock, so that all five fall into it however fast it goes.
    chance = random.Random()
    moments = sorted(chance.randrange(4 * epochs - 1) for _ in range(5))
    print("killed after epochs", moments)
    for moment in moments:
        process = subprocess.Popen([*line, f"output_dir={killed.parent}"])
        while process.poll() is None and epochs_done() < moment:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))
        cells = descendants(process.pid) if chance.random() < 0.5 else []
        for pid in [process.pid, *cells]:  # half the time the cells too, before they can save
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert subprocess.run([*line, f"output_dir={killed.parent}"], check=False).returncode == 0
    folders = sorted(p.name for p in calm.glob("digits*"))
    assert len(folders) == 4
    for name in folders:
        assert_same_result(RunDir(calm / name), RunDir(killed / name))
    assert summary_table(calm) == summary_table(killed)


DAEMONIC = """
import multiprocessing, os, sys
import cifar_lab

class Tee:
    def write(self, text): return len(text)
    def flush(self): pass

def files():
    paths = {int(n): f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")}
    names = {os.readlink(path) for path in paths.values() if os.path.exists(path)}
    return {name for name in names if not name.endswith(".bin")}  # mapped images

def sweep(stream):
    sys.stdout = sys.stderr = {"tee": Tee(), "none": None}[stream]
    before = files(), multiprocessing.get_start_method(), dict(os.environ)
    statuses = [run.status for run in cifar_lab.sweep(*sys.argv[1:], f"name={stream}")]
    after = files(), multiprocessing.get_start_method(), dict(os.environ)
    assert before[1:] == after[1:], set(before[2].items()) ^ set(after[2].items())
    return statuses, len(after[0] - before[0])

if __name__ == "__main__":
    with multiprocessing.Pool(1) as pool:
        print([pool.apply(sweep, (stream,)) for stream in ("tee", "none")])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_sweep_in_a_daemonic_process_without_streams_leaves_only_its_server(
    tmp_path: Path,
) -> None:
    """As under Celery, Airflow or a service: the pipes to the warm server stay, for the next."""
    script = tmp_path / "daemonic.py"
    script.write_text(DAEMONIC)
    line = [sys.executable, str(script), *TINY, f"output_dir={tmp_path}", "seed=0,1", "jobs=1"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    finished = ["finished"] * 2
    assert done.stdout.strip() == str([(finished, 2), (finished, 0)])
