"""The rule of the verdicts, on values worked out by hand."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from synthetic_runs import plain_config

from cifar_lab.analysis import run_metrics
from cifar_lab.analysis.statistics import difference_of_means
from cifar_lab.analysis.verdicts import judge, judge_by_epochs, prediction_half_width
from cifar_lab.config.reports import Claim, read_report
from cifar_lab.config.run_config import RunConfig, parse
from cifar_lab.errors import UsageError

CLAIM = Claim("test_accuracy", "made up", 0.75, tolerance=0.02)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    plain = plain_config(tmp_path, split={"validation": 1000, "method": "tail"})
    plain["dataset"]["train_size"] = 5000
    return parse(plain)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([], "not measured yet"),
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
    verdict = judge(CLAIM, config, [0.75, 0.75, 0.75], hinges_on="epochs")
    assert verdict.word == "cannot be judged"
    assert "epochs" in str(verdict)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [  # s = 0.01 in each, 6 degrees of freedom: t = 2.447, one more run within 2.83 points
        (
            {20: [0.71, 0.72, 0.73], 22: [0.73, 0.74, 0.75], 24: [0.77, 0.78, 0.79]},
            "reproduced at some epochs (22 of 20 to 24, n = 3)",
        ),
        (
            {20: [0.73, 0.74, 0.75], 22: [0.75, 0.76, 0.77], 24: [0.77, 0.78, 0.79]},
            "reproduced at some epochs (20 to 22 of 20 to 24, n = 3)",
        ),
        (
            {20: [0.74, 0.75, 0.76], 22: [0.77, 0.78, 0.79], 24: [0.74, 0.75, 0.76]},
            "reproduced at some epochs (20, 24 of 20 to 24, n = 3)",
        ),
        (
            {20: [0.70, 0.701, 0.702], 22: [0.76, 0.761, 0.762]},
            "differs at all epochs (20 to 22: least at 22, off by +1.10 points, n = 3)",
        ),
    ],
)
def test_where_the_report_gives_no_epochs_each_number_is_judged(
    values: dict[int, list[float]], verdict: str
) -> None:
    assert str(judge_by_epochs(CLAIM, values)) == verdict


def test_without_a_tolerance_one_seed_says_nothing(config: RunConfig) -> None:
    claim = dataclasses.replace(CLAIM, tolerance=None)
    assert judge(claim, config, [0.75]).word == "cannot be judged"


@pytest.mark.parametrize(
    ("claim", "values", "word"),
    [
        ({"at_least": 0.7}, [0.705], "consistent"),
        ({"at_least": 0.7}, [0.69], "consistent"),  # within the tolerance
        ({"at_least": 0.7}, [0.67], "differs so far"),
        ({"at_most": 0.7}, [0.73], "differs so far"),
        ({"at_least": 0.7}, [0.75, 0.76, 0.77], "reproduced"),
        ({"at_least": 0.7}, [0.65, 0.66, 0.67], "differs"),
        ({"at_most": 0.7}, [0.65, 0.66, 0.67], "reproduced"),
        ({"at_least": 0.7}, [0.65, 0.71, 0.80], "consistent"),  # 0.72 ± 0.19 says neither
    ],
)
def test_a_bound_is_judged_by_the_interval_of_the_mean(
    config: RunConfig, claim: dict[str, Any], values: list[float], word: str
) -> None:
    bound = dataclasses.replace(CLAIM, value=None, **claim)
    assert judge(bound, config, values).word == word


@pytest.mark.parametrize(
    ("values", "others", "word"),
    [
        ([0.8], [], "not measured yet"),
        ([0.8], [0.7], "consistent"),
        ([0.7], [0.8], "differs so far"),
        ([0.80, 0.81, 0.82], [0.70, 0.71, 0.72], "reproduced"),
        ([0.70, 0.71, 0.72], [0.80, 0.81, 0.82], "differs"),
        ([0.70, 0.75, 0.80], [0.69, 0.74, 0.79], "consistent"),
    ],
)
def test_a_comparison_is_judged_by_the_interval_of_the_difference(
    config: RunConfig, values: list[float], others: list[float], word: str
) -> None:
    claim = dataclasses.replace(CLAIM, value=None, above={"dropout.conv": 0.5})
    assert judge(claim, config, values, others).word == word


def test_the_difference_of_two_means_is_welchs() -> None:
    a, b = [0.80, 0.83, 0.81, 0.86], [0.70, 0.78, 0.71]
    difference, half = difference_of_means(a, b)
    found = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert half is not None
    assert (difference - half, difference + half) == pytest.approx((found.low, found.high))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{metric: epochs, source: X, id: X-1}", "X-1 needs one of value, at_least, at_most and"),
        ("{metric: epochs, source: X, value: 1, at_least: 2}", "epochs needs one of value, "),
        ("{metric: epochs, source: X, valeu: 1}", r"x.claims\[0\].valeu \(did you mean value\?\)"),
        (
            "{metric: epochs, source: X, value: 1, tolerance: 0}",
            "tolerance=0.0 is wrong: it must be",
        ),
        ("{metric: epochs", "cannot be read: while parsing"),
    ],
)
def test_a_wrong_claim_is_refused_with_its_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "report").mkdir()
    file = tmp_path / "report" / "X.yaml"
    file.write_text(f"experiments: {{x: {{claims: [{text}]}}}}", encoding="utf-8")
    with pytest.raises(UsageError, match=message) as caught:
        read_report("X", tmp_path)
    assert "X.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "value", "shown"),
    [
        ("test_accuracy", -0.0184, "-1.84 points"),
        ("best_val_loss", 0.01234, "+0.0123"),
        ("best_epoch", -5.0, "-5"),
        ("seconds_per_epoch", 3.0, "+3.0 s"),
        ("test_accuracy", -1e-9, "0.00 points"),
        ("test_accuracy", None, "–"),
    ],
)
def test_differences_are_told_in_the_metrics_unit(
    metric: str, value: float | None, shown: str
) -> None:
    assert run_metrics.show_difference(metric, value) == shown
