"""Sweeps that are no full grid: points."""

from pathlib import Path

import pytest
from tiny_runs import TINY

from cifar_lab.config.compose import compose
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.train import main
from cifar_lab.training.preflight import compose_checked

POINTS = (
    "points=[{optimizer:sgd,optimizer.lr:'0.1,0.01'},{optimizer:adam,optimizer.lr:'range(1,3)'},"
    "{optimizer:adam,optimizer.lr:1e-3}]"
)


def runs_of(*words: str) -> list[tuple[str, float, int]]:
    runs = compose(["dataset=digits", *words]).runs
    return [(r.config.choices["optimizer"], r.config.optimizer["lr"], r.config.seed) for r in runs]


def test_points_are_a_union_of_small_grids() -> None:
    expected = [("sgd", 0.1), ("sgd", 0.01), ("adam", 1), ("adam", 2), ("adam", 0.001)]
    assert runs_of("-m", POINTS) == [(*point, 0) for point in expected]
    # what a command line asks for holds in every point, and equal points are one
    assert runs_of("-m", POINTS, "optimizer.lr=0.5") == [("sgd", 0.5, 0), ("adam", 0.5, 0)]


def test_an_experiment_may_hold_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n"
        "hydra: {mode: MULTIRUN}\n"
        "points:\n"
        "  - {optimizer: sgd, optimizer.lr: '0.1,0.01'}\n"
        "  - {optimizer: adam, optimizer.lr: 0.001, model.widths: [4, 8]}\n"
    )
    words = ["-cd", str(tmp_path), *TINY, "experiment=mine", f"output_dir={tmp_path / 'out'}"]
    words.remove("model.widths=[4,8]")
    assert main([*words, "seed=0,1", "plan=true"]) == 0
    assert "6 of 6 cells to run" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_points_of_a_past_run(tmp_path: Path) -> None:
    (run,) = compose_checked([*TINY, f"output_dir={tmp_path}"]).runs
    folder = str(RunDir.create(run.config).path)
    words = ["points=[{optimizer.lr:0.1},{seed:'3,4'}]", "-m"]
    found = [(r.config.optimizer["lr"], r.config.seed) for r in compose([folder, *words]).runs]
    assert found == [(0.1, 0), (0.001, 3), (0.001, 4)]
