"""The rule of the verdicts, on values worked out by hand."""

import dataclasses
import math

import pytest

from cifar_lab.config import ClaimConfig, RunConfig, parse
from cifar_lab.verdicts import judge, prediction_half_width

CLAIM = ClaimConfig("test_accuracy", 0.75, "made up", tolerance=0.02)


@pytest.fixture
def config() -> RunConfig:
    return parse(
        {
            "dataset": {
                "name": "made_up",
                "source": {"_target_": "cifar_lab.datasets.digits.load"},
                "image_shape": [1, 8, 8],
                "train_size": 5000,
            },
            "model": {"_target_": "torch.nn.Linear"},
            "optimizer": {"_target_": "torch.optim.SGD"},
            "split": {"validation": 1000, "method": "tail"},
        }
    )


def test_no_value_is_not_measured_yet(config: RunConfig) -> None:
    assert judge(CLAIM, config, []).word == "not measured yet"


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([0.765], "consistent"),
        ([0.77], "consistent"),  # the tolerance itself still counts
        ([0.7701], "differs so far"),
        ([0.70, 0.72], "differs so far"),
        ([0.74, 0.75, 0.76], "reproduced"),
        ([0.78, 0.781, 0.782], "differs"),
    ],
)
def test_few_seeds_go_by_the_tolerance_and_three_by_their_spread(
    config: RunConfig, values: list[float], word: str
) -> None:
    assert judge(CLAIM, config, values).word == word


def test_the_prediction_interval_is_that_of_one_more_run(config: RunConfig) -> None:
    # s = 0.01, n = 3, t(0.975, 2) = 4.302653
    half = prediction_half_width(CLAIM, config, [0.74, 0.75, 0.76])
    assert half == pytest.approx(4.302653 * 0.01 * math.sqrt(1 + 1 / 3), rel=1e-6)


def test_a_validation_set_drawn_at_random_adds_the_binomial_variance(config: RunConfig) -> None:
    claim = dataclasses.replace(CLAIM, metric="best_val_accuracy")
    values = [0.74, 0.75, 0.76]
    fixed = prediction_half_width(claim, config, values)
    drawn = dataclasses.replace(config, split=dataclasses.replace(config.split, method="random"))
    wider = prediction_half_width(claim, drawn, values)
    variance = (wider / 4.302653) ** 2 - (fixed / 4.302653) ** 2
    assert variance == pytest.approx(0.75 * 0.25 / 1000, rel=1e-4)
    test_images = prediction_half_width(CLAIM, drawn, values)
    assert test_images == fixed


def test_what_hinges_on_a_guess_cannot_be_judged(config: RunConfig) -> None:
    study = dataclasses.replace(config.study, hinges_on="epochs")
    verdict = judge(CLAIM, dataclasses.replace(config, study=study), [0.75, 0.75, 0.75])
    assert verdict.word == "cannot be judged"
    assert "epochs" in str(verdict)


def test_without_a_tolerance_one_seed_says_nothing(config: RunConfig) -> None:
    claim = dataclasses.replace(CLAIM, tolerance=None)
    assert judge(claim, config, [0.75]).word == "cannot be judged"
