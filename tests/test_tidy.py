"""What takes space, and its removal: only what is named, and after a question."""

import dataclasses
import importlib.util
import os
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
from fixtures import Capture, Patch
from tiny_runs import make, train

from cifar_lab import load_run, tidy
from cifar_lab.runs.run_dir import RunDir


def test_what_is_named_is_removed_and_nothing_else(finished: RunDir, capsys: Capture) -> None:
    folder = finished.path.parents[1]
    failed, linked = make(folder, "seed=3"), make(folder, "seed=2")
    for run in (failed, linked):
        run.write_summary(dataclasses.replace(run.read_summary(), status="failed"))
    linked.steps_file.symlink_to(finished.metrics_file)  # so it is not locked, but left
    assert tidy.main([str(folder)]) == 0
    assert "2 failed runs (--failed)" in capsys.readouterr().out
    make(folder, "seed=4").summary_file.write_text("{")  # it keeps nobody from tidying the others
    before = sorted(folder.rglob("*"))
    both = [str(folder), "--last-checkpoints", "--failed"]
    assert tidy.main([*both, "--dry-run", "--archive", str(folder / "a.zip")]) == 0
    assert tidy.main(both) == 2, "there is no terminal to ask at"
    assert tidy.main([*both, "--older-than", "1d", "--yes"]) == 2
    assert sorted(folder.rglob("*")) == before
    with finished.lock():
        assert tidy.main([*both, "--yes", "--archive", str(folder / "a.zip")]) == 0
    assert "a.zip (3 of 4 runs, " in capsys.readouterr().out
    assert (failed.path.exists(), linked.path.exists()) == (False, True)
    assert finished.last.exists(), "a run in use is left alone"
    assert tidy.main([*both, "--yes"]) == 0
    assert (finished.last.exists(), finished.best.exists()) == (False, True)


@pytest.mark.parametrize("kind", ["zip", "tar.zst"])
def test_an_archive_opens_elsewhere(
    kind: str, finished: RunDir, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    os.utime(finished.summary_file, (0, 0))
    monkeypatch.chdir(finished.path)
    file, elsewhere = tmp_path / f"runs.{kind}", tmp_path / "elsewhere"
    line = ["../..", "--archive", str(file), "--older-than", "30d"]
    if kind == "zip" or sys.version_info >= (3, 14):
        assert tidy.main(line) == 0
        shutil.unpack_archive(file, elsewhere)
    elif importlib.util.find_spec("zstandard") is None:
        assert tidy.main(line) == 2
        assert "needs Python 3.14 or `pip install zstandard`" in capsys.readouterr().err
        assert not list(tmp_path.glob("*runs*"))
        return
    else:
        import zstandard

        assert tidy.main(line) == 0
        with zstandard.open(file) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            archive.extractall(elsewhere)
    (path,) = elsewhere.glob(f"{finished.path.parents[1].name}/*/*/summary.json")
    assert load_run(path.parent).status == "finished"
    assert tidy.main(line) == 2


def test_last_pt_goes_where_nothing_needs_it(tmp_path: Path) -> None:
    only = train(tmp_path / "only", "training.keep_last=false", "evaluation.scored_weights=last")
    assert tidy.main([str(tmp_path), "--last-checkpoints", "--yes"]) == 0
    assert only.last.exists(), "the scored weights are nowhere else"
    auto = ["training.keep_last=auto", "training.epochs=3", "split.validation=1300"]
    whole = train(tmp_path / "whole", *auto)
    stopped = train(tmp_path / "stopped", *auto, "training.patience=1", "training.min_delta=1")
    only = train(tmp_path / "only", "training.keep_last=false", "split.validation=0")
    assert [run.last.exists() for run in (whole, stopped, only)] == [False, True, True]
    assert whole.best.exists()
    assert tidy.main([str(only.path), "--last-checkpoints", "--yes"]) == 0
    assert only.last.exists(), "it has no other weights"
