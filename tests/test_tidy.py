"""What takes space, and its removal: only what is named, and after a question."""

import dataclasses
import os
import zipfile
from pathlib import Path

import pytest
from tiny_runs import make

from cifar_lab import load_run, tidy
from cifar_lab.runs.run_dir import RunDir


def test_what_is_named_is_removed_and_nothing_else(
    finished: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished.path.parents[1]
    failed = make(folder, "seed=3")
    failed.write_summary(dataclasses.replace(failed.read_summary(), status="failed"))
    assert tidy.main([str(folder)]) == 0
    assert "1 failed runs (--failed)" in capsys.readouterr().out
    before = sorted(folder.rglob("*"))
    both = [str(folder), "--last-checkpoints", "--failed"]
    assert tidy.main([*both, "--dry-run"]) == 0
    assert tidy.main(both) == 2, "there is no terminal to ask at"
    assert tidy.main([*both, "--older-than", "1d", "--yes"]) == 2
    assert sorted(folder.rglob("*")) == before
    with finished.lock():
        assert tidy.main([*both, "--yes"]) == 0
    assert not failed.path.exists()
    assert finished.last.exists(), "a run in use is left alone"
    assert tidy.main([*both, "--yes"]) == 0
    assert not finished.last.exists()
    assert finished.best.exists()


def test_an_archive_opens_elsewhere(finished: RunDir, tmp_path: Path) -> None:
    os.utime(finished.summary_file, (0, 0))
    file = tmp_path / "runs.zip"
    line = [str(finished.path.parents[1]), "--archive", str(file), "--older-than", "30d"]
    assert tidy.main(line) == 0
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path / "elsewhere")
    (path,) = (tmp_path / "elsewhere").rglob("summary.json")
    assert load_run(path.parent).status == "finished"
    assert tidy.main(line) == 2
