"""A sweep over groups: Hydra composes each combination of options once, as one by one."""

import itertools
from pathlib import Path

import hydra
import pytest
from tiny_runs import TINY

from cifar_lab.config.compose import compose
from cifar_lab.config.run_config import to_plain
from cifar_lab.train import main


def configs(words: list[str]) -> list[object]:
    return [to_plain(run.config) for run in compose(words).runs]


def one_by_one(grid: dict[str, str], fixed: list[str]) -> list[object]:
    axes = [[f"{key}={value}" for value in text.split(",")] for key, text in grid.items()]
    return [config for cell in itertools.product(*axes) for config in configs([*fixed, *cell])]


def test_the_cells_of_a_grid_are_those_composed_one_by_one() -> None:
    # a dataset chooses the augmentation, and a scheduler reads the learning rate
    grid = {"dataset": "cifar10,digits", "scheduler": "none,one_cycle", "optimizer.lr": "0.1,0.2"}
    fixed = ["seed=3", "training.epochs=2"]
    sweep = [f"{key}={values}" for key, values in grid.items()]
    assert configs(["-m", *fixed, *sweep]) == one_by_one(grid, fixed)


def test_hydra_composes_a_combination_of_options_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    real = hydra.compose

    def counted(name: str, overrides: list[str], return_hydra_config: bool) -> object:
        calls.append(overrides)
        return real(name, overrides=overrides, return_hydra_config=return_hydra_config)

    monkeypatch.setattr(hydra, "compose", counted)
    assert len(compose(["-m", "dataset=mnist,digits", "seed=range(0,10)"]).runs) == 20
    assert len(calls) == 1 + 2  # the defaults, and each dataset, which chooses the augmentation


def test_options_of_ones_own_that_change_other_parts(tmp_path: Path) -> None:
    for name, text in {
        "dropout/heavy.yaml": "defaults: [none]\nconv: 0.7\n",
        "dropout/empty.yaml": "# @package _global_\n{}\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    fixed = ["--config-dir", str(tmp_path)]
    grid = {"dropout": "heavy,empty", "optimizer": "sgd,adam"}
    sweep = [f"{key}={values}" for key, values in grid.items()]
    composed = configs(["-m", *fixed, *sweep])
    assert composed == one_by_one(grid, fixed)
    assert len({str(config) for config in composed}) == 4


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
