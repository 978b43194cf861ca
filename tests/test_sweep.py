import contextlib
import csv
import dataclasses
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_lab import device, planning, sweep
from cifar_lab.door import compose
from cifar_lab.errors import NotNow, RequestError, RunFailed, Stopped
from cifar_lab.execute import Stop, execute
from cifar_lab.planning import SweepCell, sweep_cells
from cifar_lab.run_dir import RunDir
from cifar_lab.sweep import Outcome, run_all

TINY = (
    "-m",
    "dataset=digits",
    "figures=none",
    "model.widths=[2,4]",
    "model.hidden=8",
    "training.epochs=2",
    "split.validation=200",
)


@pytest.fixture(scope="module", autouse=True)
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One data folder for all, as the server that forks keeps the environment it started in."""
    before = os.environ.get("CIFAR_LAB_DATA")
    os.environ["CIFAR_LAB_DATA"] = str(tmp_path_factory.mktemp("data"))
    yield
    if before is None:
        del os.environ["CIFAR_LAB_DATA"]
    else:
        os.environ["CIFAR_LAB_DATA"] = before


def cells_of(folder: Path, *overrides: str) -> list[SweepCell]:
    request = compose([*TINY, f"output_dir={folder}", *overrides])
    return sweep_cells([c.config for c in request.cells], [c.overrides for c in request.cells])


def run(cells: Sequence[SweepCell], **options: Any) -> list[Outcome]:
    with Stop().installed() as stop:
        return run_all(cells, stop=stop, **options)


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return dict(run.read_checkpoint(run.last)["model"])


def assert_same_result(first: RunDir, second: RunDir) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    rows = [
        [dataclasses.replace(r, seconds=0.0, images_per_second=0.0) for r in run.read_metrics()]
        for run in (first, second)
    ]
    assert rows[0] == rows[1]
    summaries = [run.read_summary() for run in (first, second)]
    assert summaries[0].test_accuracy == summaries[1].test_accuracy is not None


def when(condition: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Act as soon as the condition holds, from another thread."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def has_rows(cell: SweepCell) -> bool:
    return cell.run.metrics_file.exists() and cell.epochs_done() > 0


@pytest.mark.slow
def test_the_same_line_skips_what_is_finished_and_a_new_value_runs_alone(tmp_path: Path) -> None:
    first = run(cells_of(tmp_path, "seed=0,1"), jobs=2, command=["-m", "seed=0,1"])
    assert [(o.before, o.after, o.code) for o in first] == [("new", "finished", 0)] * 2
    written = {o.cell.run.summary_file: o.cell.run.summary_file.stat().st_mtime_ns for o in first}
    (record,) = (tmp_path / "runs" / ".sweeps").glob("*/sweep.json")
    noted = json.loads(record.read_text(encoding="utf-8"))
    assert noted["command"] == ["-m", "seed=0,1"]
    assert [c["folder"] for c in noted["cells"]] == [o.cell.run.path.name for o in first]
    assert [c["after"] for c in noted["cells"]] == ["finished", "finished"]

    again = run(cells_of(tmp_path, "seed=0,1,2"), jobs=2)
    assert [o.before for o in again] == ["finished", "finished", "new"]
    assert [o.after for o in again] == ["finished"] * 3
    assert all(path.stat().st_mtime_ns == at for path, at in written.items())
    table = sweep.closing_table(again)
    assert table.splitlines()[0].split()[:3] == ["seed", "before", "after"]
    best = max(again, key=lambda o: o.cell.run.read_summary().best_val_accuracy or 0)
    assert f"best by validation: {best.cell.run.path}" in table
    assert sum(line.count("test accuracy") for line in table.splitlines()) == 1


@pytest.mark.slow
def test_results_do_not_depend_on_jobs_nor_on_the_process(tmp_path: Path) -> None:
    one = run(cells_of(tmp_path / "one"), jobs=1)
    two = run(cells_of(tmp_path / "two", "seed=0,1"), jobs=2)
    assert one[0].cell.config.threads == two[0].cell.config.threads == planning.THREADS
    assert_same_result(one[0].cell.run, two[0].cell.run)
    here = RunDir.create(cells_of(tmp_path / "here")[0].config)
    before = torch.get_num_threads()
    execute(here)
    torch.set_num_threads(before)
    assert_same_result(here, one[0].cell.run)


def test_a_cell_that_fails_is_one_failed_cell(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, "optimizer=sgd", "optimizer.lr=1e30,0.1")
    outcomes = run(cells, jobs=1)
    assert [o.after for o in outcomes] == ["failed", "finished"]
    assert outcomes[0].code == 1
    assert outcomes[0].error is not None
    assert outcomes[0].error.partition(";")[0] in (cells[0].run.read_summary().error or "")
    assert outcomes[0].error[:100] in sweep.closing_table(outcomes)
    with pytest.raises(RunFailed, match="1 of 2 cells failed"):
        sweep.raise_for(outcomes, Stop())
    again = run(cells, jobs=1)
    assert [o.before for o in again] == ["failed", "finished"]


@pytest.mark.slow
def test_a_killed_cell_is_one_failed_cell_and_the_next_call_goes_on(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, "seed=0,1", "training.epochs=6")

    def kill() -> None:
        victim = [c for c in multiprocessing.active_children() if c.name == cells[0].run.path.name]
        assert victim[0].pid is not None
        os.kill(victim[0].pid, signal.SIGKILL)

    when(lambda: cells[0].run.last.exists(), kill)
    outcomes = run(cells, jobs=1)
    assert [o.after for o in outcomes] == ["failed", "finished"]
    assert outcomes[0].error is not None
    assert "SIGKILL" in outcomes[0].error
    assert cells[0].run.read_summary().error == outcomes[0].error
    (again, _) = run(cells, jobs=1)
    assert (again.before, again.after) == ("failed", "finished")
    assert "resumed at epoch" in cells[0].run.log_file.read_text(encoding="utf-8")
    (undisturbed,) = run(cells_of(tmp_path / "calm", "training.epochs=6"), jobs=1)
    assert_same_result(cells[0].run, undisturbed.cell.run)


def test_ctrl_c_saves_what_runs_and_leaves_the_rest_queued(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, "seed=0,1", "training.epochs=500")
    when(lambda: has_rows(cells[0]), lambda: os.kill(os.getpid(), signal.SIGINT))
    with Stop().installed() as stop:
        outcomes = run_all(cells, stop=stop, jobs=1)
        assert [o.after for o in outcomes] == ["interrupted", "queued"]
        with pytest.raises(Stopped, match="2 of 2 cells left") as stopped:
            sweep.raise_for(outcomes, stop)
    assert stopped.value.signal == signal.SIGINT
    checkpoint = cells[0].run.read_last()
    assert checkpoint is not None
    assert checkpoint["epoch"] >= 1
    assert not cells[1].run.metrics_file.exists()
    assert not multiprocessing.active_children()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_images_are_pages_of_the_decoded_file_that_no_cell_copies(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, "seed=0,1", "training.epochs=6")
    kept: list[list[str]] = []

    def look() -> None:
        for process in multiprocessing.active_children():
            lines = Path(f"/proc/{process.pid}/smaps").read_text(encoding="utf-8").splitlines()
            starts = [i for i, line in enumerate(lines) if line.endswith("train_images.npy")]
            kept.extend(lines[start : start + 24] for start in starts)

    def both_train() -> bool:
        return all(cell.run.last.exists() for cell in cells)

    looking = when(both_train, look)
    run(cells, jobs=2)
    looking.join()
    assert kept
    for mapping in kept:
        facts = dict(line.split()[:2] for line in mapping[1:] if len(line.split()) == 3)
        assert int(facts["Rss:"]) > 1000
        assert int(facts["Private_Dirty:"]) == int(facts["Shared_Dirty:"]) == 0


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    (cell,) = cells_of(tmp_path, "training.epochs=500")

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    when(lambda: has_rows(cell), twice)
    with Stop().installed() as stop, pytest.raises(Stopped):
        run_all([cell], stop=stop, jobs=1)
    assert not multiprocessing.active_children()
    assert cell.run.status == "interrupted"


def test_what_another_process_holds_or_other_code_made_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = cells_of(tmp_path, "seed=0,1")
    monkeypatch.setattr(sweep, "_PATIENCE_SECONDS", 0.2)
    RunDir.create(cells[0].config)
    with cells[0].run.lock():
        held, done = run(cells, jobs=1)
    assert (held.after, held.code, done.after) == ("in use", 3, "finished")
    with pytest.raises(NotNow, match="in use by another process"):
        sweep.raise_for([held, done], Stop())

    other = [dataclasses.replace(cell, code="another") for cell in cells]
    outcomes = run(other, jobs=1)
    assert outcomes[1].before == "other code"
    assert outcomes[1].error is not None
    assert "accept_code=true" in outcomes[1].error
    with pytest.raises(NotNow):
        sweep.raise_for(outcomes[1:], Stop())
    taken = run(other[1:], jobs=1, accept_code=True)
    assert (taken[0].after, taken[0].code) == ("finished", 0)


def test_two_configs_of_one_address_are_one_cell(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, "threads=1,2")
    assert len(cells) == 1
    assert cells[0].axes == {"threads": "1"}


def test_a_damaged_folder_is_one_failed_cell(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, "seed=0,1")
    RunDir.create(cells[0].config).summary_file.write_text("{", encoding="utf-8")
    damaged, fine = run(cells, jobs=1)
    assert (damaged.after, damaged.code, fine.after) == ("damaged", 1, "finished")
    assert damaged.error is not None
    assert "summary.json is damaged" in damaged.error
    sweep.closing_table([damaged, fine])


def test_a_plan_writes_nothing_and_is_timed_by_a_probe_then_by_finished_runs(
    tmp_path: Path,
) -> None:
    threads = torch.get_num_threads()
    cells = cells_of(tmp_path, "seed=0,1")
    before = planning.plan(cells, jobs=1)
    assert "2 of 2 cells to run, 1 at a time: at most" in before
    assert "as timed by a probe; nothing was run" in before
    assert not list(tmp_path.iterdir())
    run(cells[:1], jobs=1)
    after = planning.plan(cells, jobs=1)
    states = [line.split()[1] for line in after.splitlines()[1:3]]
    assert states == ["finished", "new"]
    assert "1 of 2 cells to run, 1 at a time: at most" in after
    assert "as timed by finished runs; nothing was run" in after
    torch.set_num_threads(threads)


def test_time_left_fills_the_slots() -> None:
    (cell,) = cells_of(Path("nowhere"), "training.epochs=10")
    pace = planning.Pace()
    assert pace.time_left([cell], jobs=1) is None
    pace.note(cell.config, epoch_seconds=2.0, overhead_seconds=5.0)
    assert pace.seconds(cell.config) == 25.0
    assert pace.seconds(cell.config, epochs_done=9) == 7.0
    assert pace.time_left([cell] * 3, jobs=2) == 50.0


def test_jobs_fit_the_gpus_the_cores_and_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = cells_of(tmp_path)
    on_cpu = [dataclasses.replace(cell.config, device="cpu")] * 9
    on_gpu = [dataclasses.replace(cell.config, device="cuda")] * 9
    monkeypatch.setattr(device, "visible_gpus", lambda: ["2", "5"])
    monkeypatch.setattr(sweep, "_cores", lambda: 8)
    monkeypatch.setattr(sweep, "_free_memory", lambda: 7_500_000_000)
    assert sweep.fitting_jobs(on_gpu, "auto") == (2, ["2", "5"])
    assert sweep.fitting_jobs(on_gpu, "auto", jobs_per_gpu=2) == (4, ["2", "5", "2", "5"])
    assert sweep.fitting_jobs(on_gpu, 8) == (2, ["2", "5"])
    assert sweep.fitting_jobs(on_gpu, 1) == (1, ["2"])
    assert sweep.fitting_jobs(on_cpu, "auto") == (5, [""] * 5)
    assert sweep.fitting_jobs(on_cpu, 3)[0] == 3
    four_threads = [dataclasses.replace(config, threads=4) for config in on_cpu]
    assert sweep.fitting_jobs(four_threads, "auto")[0] == 2


def test_jobs_is_auto_or_a_number() -> None:
    assert compose(["dataset=digits"]).options.jobs == "auto"
    assert compose(["dataset=digits", "jobs=3"]).options.jobs == 3
    with pytest.raises(RequestError, match="jobs=many"):
        compose(["dataset=digits", "jobs=many"])


def descendants(pid: int) -> list[int]:
    """The processes below one, read from /proc."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rpartition(")")[2].split()
            parents[int(status.parent.name)] = int(fields[1])
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


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
