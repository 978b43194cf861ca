"""A sweep over groups: Hydra composes each combination of options once, as one by one."""

import itertools
from pathlib import Path

import hydra
import pytest

from cifar_lab.config.compose import compose
from cifar_lab.config.groups import find_options
from cifar_lab.config.run_config import to_plain


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
    assert len(compose(["-m", "optimizer=sgd,adam", "seed=range(0,10)"]).runs) == 20
    assert len(calls) == 1  # an optimizer's file sets its own part and nothing else
    calls.clear()
    assert len(compose(["-m", "dataset=mnist,digits", "seed=range(0,10)"]).runs) == 20
    assert len(calls) == 1 + 2  # the defaults, and each dataset, which chooses the augmentation


@pytest.mark.parametrize(
    "group",
    [
        "dropout",
        *(
            pytest.param(group, marks=pytest.mark.slow)
            for group in ("model", "optimizer", "activation", "scheduler")
        ),
    ],
)
def test_options_that_stand_alone_are_as_hydra_composes_them(group: str, tmp_path: Path) -> None:
    line = ["-m", f"{group}={','.join(find_options()[group])}", "dataset=digits"]
    by_hydra = configs([*line, "--config-dir", str(tmp_path)])  # it might change any part
    assert configs(line) == by_hydra


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
