"""A sweep over groups: few compositions of Hydra, and the same configs as one by one."""

import itertools
from pathlib import Path

import hydra
import pytest

from cifar_lab.config.compose import compose
from cifar_lab.config.run_config import to_plain

GRIDS = [
    # a dataset chooses the augmentation, and a scheduler reads the learning rate
    {"dataset": "cifar10,digits,npz", "scheduler": "none,one_cycle", "optimizer.lr": "0.1,0.2"},
    # an experiment changes every part, also those of groups that are chosen beside it
    {"experiment": "none,airbench", "optimizer": "sgd,adam", "dropout": "none,standard"},
]


def configs(words: list[str]) -> list[object]:
    return [to_plain(run.config) for run in compose(words).runs]


def one_by_one(grid: dict[str, str], fixed: list[str]) -> list[object]:
    axes = [[f"{key}={value}" for value in text.split(",")] for key, text in grid.items()]
    return [config for cell in itertools.product(*axes) for config in configs([*fixed, *cell])]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "-".join(grid))
def test_the_cells_of_a_grid_are_those_composed_one_by_one(grid: dict[str, str]) -> None:
    fixed = ["seed=3", "training.epochs=2"]
    sweep = [f"{key}={values}" for key, values in grid.items()]
    assert configs(["-m", *fixed, *sweep]) == one_by_one(grid, fixed)


def test_hydra_composes_each_option_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    real = hydra.compose

    def counted(name: str, overrides: list[str], return_hydra_config: bool) -> object:
        calls.append(overrides)
        return real(name, overrides=overrides, return_hydra_config=return_hydra_config)

    monkeypatch.setattr(hydra, "compose", counted)
    words = ["optimizer=sgd,adam,adamw,muon", "activation=relu,tanh,gelu", "dropout=none,standard"]
    assert len(compose(["-m", *words]).runs) == 24
    assert len(calls) == 1 + 1 + 3 + 2 + 1  # the defaults, a first cell, and each other option


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A config folder whose options depend on one another."""
    for name, text in {
        "dropout/heavy.yaml": "defaults: [none]\nconv: 0.7\n",
        "dropout/empty.yaml": "# @package _global_\n{}\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_options_of_ones_own_that_change_other_parts(own: Path) -> None:
    fixed = ["--config-dir", str(own)]
    grid = {"dropout": "standard,heavy,empty", "optimizer": "sgd,adam"}
    sweep = [f"{key}={values}" for key, values in grid.items()]
    found = configs(["-m", *fixed, *sweep])
    assert found == one_by_one(grid, fixed)
    assert len({str(config) for config in found}) == 6


def test_an_option_chosen_by_a_combination_of_others(own: Path) -> None:
    """Nothing that differs from the first cell in one option shows such a dependence."""
    (own / "both").mkdir()
    (own / "both" / "adam_tanh.yaml").write_text("# @package _global_\ntraining: {epochs: 99}\n")
    (own / "mine.yaml").write_text(
        "defaults: [config, _self_, {optional both: '${optimizer}_${activation}'}]\n"
    )
    fixed = ["--config-dir", str(own), "--config-name", "mine"]
    grid = {"optimizer": "sgd,adam", "activation": "relu,tanh"}
    sweep = [f"{key}={values}" for key, values in grid.items()]
    epochs = [run.config.training.epochs for run in compose(["-m", *fixed, *sweep]).runs]
    assert epochs == [10, 10, 10, 99]
