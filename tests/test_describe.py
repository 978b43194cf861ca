"""What describe says is what is: counts, statistics, layers, shapes, costs."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import Capture, Patch
from tiny_runs import make, train
from torch import nn

from cifar_lab import describe
from cifar_lab.analysis import description
from cifar_lab.analysis.description import range_test
from cifar_lab.datasets import pixel_statistics
from cifar_lab.figures.lr_range import HIGHEST, LOWEST, RangeTest, advise
from cifar_lab.models.layers import size_formula
from cifar_lab.training.preflight import compose_checked


def test_parameters_and_multiply_adds_are_the_reports() -> None:
    """As counted by hand for S0; tests/test_models.py has those of the other models."""
    config = compose_checked(["model=convnet", "dataset=cifar10", "device=cpu"]).runs[0].config
    text = description.model_text(config, 10)
    assert "parameters: 2,169,770 " in text
    assert text.endswith("per image: 26,579,968")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(5, 1, 0, 1), (3, 2, 1, 1), (4, 1, "same", 1), (5, 1, "same", 2), (3, 2, "valid", 2)],
)
def test_size_formula_is_what_torch_does_and_written_as_in_s3(
    kernel: int, stride: int, padding: int | str, dilation: int
) -> None:
    conv = nn.Conv2d(1, 1, kernel, stride=stride, padding=padding, dilation=dilation)
    size = conv(torch.zeros(1, 1, 32, 32)).shape[-1]
    formula = size_formula(conv, (1, 1, 32, 32))
    left, _, right = formula.rpartition(" = ")
    assert eval(left.replace("/", "//")) == int(right) == size
    if padding == 0:
        assert formula == "((32-5+2*0)/1)+1 = 28"


def test_command_prints_and_draws(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "new" / "images.png"
    arguments = ["dataset=digits", "model=two_branch", "dropout=none", "device=cpu"]
    assert describe.main([*arguments, "--figure", str(path), "--images", "5,0,7,1"]) == 0
    out = capsys.readouterr().out
    assert "1,437 training and 360 test images (1,797 in total), 1x32x32, 10 classes" in out
    assert "((32-5+2*0)/1)+1 = 28" in out
    assert "0.30523537" in out  # computed, beside
    assert "0.3052 " in out  # what is configured
    assert "splits verified disjoint: train 1,293, validation 144, test 360" in out
    assert "steps of an epoch: 11 (batches of 128)" in out
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.real_data
def test_cifar10s_statistics_are_s1s() -> None:
    from cifar_lab.datasets.store import data_root
    from cifar_lab.training.splits import load_arrays

    settings = compose_checked(["dataset=cifar10", "device=cpu"]).runs[0].config
    means, stds = pixel_statistics(load_arrays(settings.dataset, data_root()).train_images)
    assert means == pytest.approx([0.49139967861519607, 0.48215840839460783, 0.44653091444546567])
    assert stds == pytest.approx([0.2470322324632819, 0.24348512800005573, 0.26158784172796434])


STEPS = 25


def test_the_suggestion_lies_where_the_loss_falls_and_well_below_where_it_rises() -> None:
    rates = np.geomspace(LOWEST, HIGHEST, 300)
    falls = 2.3 - 1.5 / (1 + np.exp(-6 * np.log10(rates / 0.01))) + (rates / 0.5) ** 2
    advice = advise(rates, falls)
    assert advice is not None
    assert 1e-3 < advice.low < advice.suggestion < advice.high / 3 < 0.1
    assert advice.fall == pytest.approx(0.6, abs=0.1)
    assert advise(rates, 2.3 + rates) is None
    noise = np.random.default_rng(0).normal(scale=0.02, size=300)
    assert advise(rates, 2.3 + noise) is None  # S1's deeper network: 1.5e-06 was suggested
    hardly = RangeTest(rates, falls, falls, dataclasses.replace(advice, fall=0.02))
    assert "warning: the loss fell by 2% only" in hardly.lines()[-1]


def test_the_steps_are_those_of_the_run_with_another_rate(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("CIFAR_LAB_DATA", str(tmp_path / "data"))
    options = ("optimizer=sgd", "training.step_history=true", "augmentation=crop_flip")
    run = train(tmp_path, *options, "training.epochs=1")
    found = range_test(run.read_config(), STEPS)
    assert found.losses[0] == pytest.approx(run.read_steps()[0].loss, rel=1e-6)
    assert found.rates == pytest.approx(np.geomspace(LOWEST, HIGHEST, STEPS))
    schedule = ("scheduler=one_cycle", "scheduler.max_lr=0.1")
    scheduled = make(tmp_path, *options, *schedule).read_config()
    assert range_test(scheduled, STEPS).losses == pytest.approx(found.losses)
