"""What a run is: addresses that never move, configs that survive, protocols that are laid over."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import pytest

from cifar_lab.config.identity import address, identity
from cifar_lab.config.run_config import RunConfig, dump, load, parse, to_plain
from cifar_lab.errors import UsageError, shorten
from cifar_lab.training.preflight import compose_checked

GOLDEN = {
    (): "cifar10-convnet-adam-relu-lr0.001-seed0-7cf6801b",
    ("dataset=mnist", "augmentation=crop_flip"): "mnist-convnet-adam-relu-lr0.001-seed0-efcdb83e",
    (
        "dataset=digits",
        "augmentation=crop_flip",
        "seed=7",
    ): "digits-convnet-adam-relu-lr0.001-seed7-e3433fa6",
    (
        "dataset=image_folder",
        "dataset.source.path=pictures",
        "dataset.mean=null",
        "dataset.std=null",
    ): "image_folder-convnet-adam-relu-lr0.001-seed0-18bf0397",
    ("dataset=digits", "seed=7"): "digits-convnet-adam-relu-lr0.001-seed7-204b1579",
    ("model=convnet_deep", "optimizer=sgd"): "cifar10-convnet_deep-sgd-relu-lr0.01-seed0-6002abd1",
    ("optimizer.lr=0.0001", "dropout=none"): "cifar10-convnet-adam-relu-lr0.0001-seed0-46643195",
    ("scheduler=cosine", "protocol=report"): "cifar10-convnet-adam-relu-lr0.001-seed0-d83da494",
}


@functools.lru_cache
def made(*overrides: str) -> RunConfig:
    return compose_checked(["device=cpu", *overrides]).runs[0].config


@pytest.mark.parametrize("overrides", GOLDEN)
def test_addresses_do_not_move(overrides: tuple[str, ...]) -> None:
    """A change here orphans every run that was ever made: say so in the changelog."""
    name = address(made(*overrides)).name
    assert name == GOLDEN[overrides]


@pytest.mark.parametrize(
    "override",
    str.split(
        "output_dir=elsewhere name=other figures=none threads=2 training.print_every=5 jobs=2 "
        "training.step_history=true training.checkpoint_minutes=1 training.keep_last=false "
        "training.best_file_name=x.pt study.title=x training.cuda_graph=auto tracker=mlflow "
        "optimizer.backbone_lr=null training.frozen_epochs=0"
    ),
)
def test_what_is_no_part_of_a_result_is_no_part_of_the_address(override: str) -> None:
    assert identity(made(override)) == identity(made())
    assert address(made(override)).name == address(made()).name


@pytest.mark.parametrize(
    "override",
    str.split(
        "seed=1 optimizer.lr=0.002 training.epochs=11 training.batch_size=64 dropout.conv=0.1 "
        "split.seed=1 precision=bf16 protocol=report deterministic=true model.hidden=64 "
        "activation=tanh scheduler=cosine augmentation=none evaluation.scored_weights=last "
        "training.lookahead.every=5 training.cuda_graph=true"
    ),
)
def test_what_changes_a_result_changes_the_address(override: str) -> None:
    assert address(made(override)) != address(made())


def test_a_default_written_out_is_the_default() -> None:
    plain = to_plain(made())
    plain["training"].pop("label_smoothing")
    plain.pop("continue_from")
    assert address(parse(plain)) == address(made())


def test_the_index_of_a_gpu_is_no_part_of_a_run() -> None:
    first = dataclasses.replace(made(), device="cuda:0")
    assert identity(first) == identity(dataclasses.replace(made(), device="cuda:3"))
    assert identity(first) != identity(made())


@pytest.mark.parametrize("title", ["", "~", "null", "1e400", "0x1F", "1_0", "a: b", "ü\t"])
def test_a_config_survives_save_and_load(title: str, tmp_path: Path) -> None:
    config = made("optimizer=sgd", f"study.title='{title}'" if title else "seed=1")
    path = tmp_path / "config.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(path) == config
    assert dump(load(path)) == path.read_text(encoding="utf-8")


def test_the_users_own_values_win_over_the_protocols(tmp_path: Path) -> None:
    experiment = tmp_path / "experiment"
    experiment.mkdir()
    (experiment / "mine.yaml").write_text(
        "# @package _global_\n"
        "protocols:\n"
        "  report: {evaluation: {scored_weights: last}, training: {epochs: 3}}\n"
        "  sound: {training: {epochs: 4}}\n"
    )

    def cell(*overrides: str) -> RunConfig:
        line = ["--config-dir", str(tmp_path), "experiment=mine", "device=cpu", *overrides]
        return compose_checked(line).runs[0].config

    assert (cell().training.epochs, cell().evaluation.scored_weights) == (4, "best")
    report = cell("protocol=report")
    assert (report.training.epochs, report.evaluation.scored_weights) == (3, "last")
    mine = cell("protocol=report", "training.epochs=5")
    assert (mine.training.epochs, mine.evaluation.scored_weights) == (5, "last")


@pytest.mark.parametrize(
    ("group", "values", "words"),
    [
        ("seed", 2**32, "seed"),
        ("model", None, "model"),
        ("nope", 1, "no setting nope"),
        ("optimizer", {"_target_": 3}, "optimizer has no _target_"),
        ("figures", {"a": {"_target_": "x", "b": float("inf")}}, "figures.a.b"),
        ("figures", {"a": {1: 2}}, "figures.a="),
        ("figures", {"a": {"x": object()}}, "figures.a.x"),
        ("dataset", 3, "dataset=3 is wrong: it must be a group of settings: name"),
        ("training", {"epochs": "1"}, 'epochs="1" is wrong: it must be a whole number'),
        ("training", {"min_delta": "0.1"}, 'min_delta="0.1" is wrong: it must be a number'),
        ("training", {"min_delta": float("nan")}, "=NaN is wrong: it must be a finite"),
        ("training", {"compile": 1}, "training.compile=1 is wrong: it must be true or false"),
        ("training", {"cuda_graph": "true"}, '="true" is wrong: it must be true or false or'),
        ("training", {"class_weights": [1, "x"]}, '=[1, "x"] is wrong: it must be a list'),
        ("training", {"lookahead": {"evry": 1}}, "lookahead.evry (did you mean every?)"),
        ("training", {"lookahead": 3}, "lookahead=3 is wrong: it must be a group of settings: "),
    ],
)
def test_parsing_refuses_what_it_does_not_know_and_coerces_nothing(
    group: str, values: Any, words: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        parse({**to_plain(made()), group: values})


def test_whole_numbers_are_read_as_the_kind_that_a_setting_has() -> None:
    training = parse({**to_plain(made()), "training": {"epochs": 2.0, "min_delta": 1}}).training
    assert (repr(training.epochs), repr(training.min_delta)) == ("2", "1.0")


def test_long_and_odd_values_are_shown_on_one_line() -> None:
    assert shorten("a\nb\x00c") == r"a\nb\x00c"
    assert len(shorten("x" * 5000)) < 110
