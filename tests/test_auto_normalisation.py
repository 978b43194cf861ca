"""`dataset.mean=auto` and `dataset.std=auto` become numbers before a run has an address."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import TINY

from cifar_lab import evaluate, train
from cifar_lab.config.identity import address
from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import UsageError
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training import data
from cifar_lab.training.data import load_splits
from cifar_lab.training.preflight import compose_checked

AUTO = ("dataset.mean=auto", "dataset.std=auto")


def config(*overrides: str) -> RunConfig:
    return compose_checked([*TINY, *AUTO, *overrides]).runs[0].config


def test_the_numbers_are_those_of_the_training_images_alone() -> None:
    settings = config()
    train_split = load_splits(settings, "cpu").train
    pixels = train_split.images[train_split.indices].numpy() / 255
    assert settings.dataset.mean == [round(float(pixels.mean()), 4)]
    assert settings.dataset.std == [round(float(pixels.std()), 4)]
    assert config("split.seed=1").dataset.mean != settings.dataset.mean
    assert config("seed=1").dataset == settings.dataset


def test_each_channel_of_ones_own_images_has_its_numbers(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
    images[:, 1] //= 4
    save(tmp_path / "data.npz", images)
    dataset = of_file(tmp_path / "data.npz").dataset
    assert dataset.mean == pytest.approx([0.5, 0.125, 0.5], abs=0.02)
    assert dataset.std == pytest.approx([0.29, 0.07, 0.29], abs=0.02)
    images[:, 2] = 7
    save(tmp_path / "data.npz", images)
    with pytest.raises(UsageError, match=r"dataset\.std=auto: .* channel 2 of npz .* all the same"):
        of_file(tmp_path / "data.npz")


def save(path: Path, images: Any) -> None:
    np.savez(path, images=images, labels=np.arange(len(images)) % 2)


def of_file(path: Path) -> RunConfig:
    source = ["dataset=npz", f"dataset.source.path={path}", "dataset.image_shape=[3,8,8]"]
    return config(*source, "split.validation=4")


def test_the_folder_holds_numbers_and_the_same_line_finds_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*TINY, *AUTO, f"output_dir={tmp_path}", "training.epochs=1"]
    assert train.main(line) == 0
    run = RunDir(address(config(f"output_dir={tmp_path}", "training.epochs=1")))
    assert not re.search(r"(mean|std): auto", run.config_file.read_text())
    assert run.own_config().dataset == config().dataset
    capsys.readouterr()
    for again in (line, [str(run.path)], [*line, "-m"]):
        assert train.main(again) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    assert len(list(tmp_path.glob("*/*/config.yaml"))) == 1
    assert evaluate.main([str(run.path)]) == 0
    assert train.main([*line, f"continue_from={run.path}", "training.epochs=2"]) == 0


def test_a_config_that_is_only_shown_loads_no_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("data were loaded")

    monkeypatch.setattr(data, "load_dataset", load)
    assert train.main([*TINY, *AUTO, "--cfg", "job"]) == 0
    assert "mean: auto" in capsys.readouterr().out
    assert config("dataset.mean=[0.3]", "dataset.std=[0.4]").dataset.mean == [0.3]
