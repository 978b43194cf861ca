"""Differences between groups of runs: recomputed by scipy and statsmodels, and simulated."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.power import TTestIndPower

from cifar_lab.analysis import statistics
from cifar_lab.analysis.contrasts import (
    CannotJudge,
    Deviation,
    Sample,
    contrast,
    pooled,
    residual,
    seeds_needed,
)
from cifar_lab.analysis.statistics import Family

Draw = np.random.Generator


def sample(values: Any, right: Any = None, folds: int | None = None) -> Sample:
    """Runs with seeds 0, 1, ..., or with folds."""
    numbers = tuple(map(float, values))
    replicates = tuple((0, i) if folds else (i, None) for i, _ in enumerate(numbers))
    return Sample(numbers, replicates, b"", right, folds)


def nets(draw: Draw, seeds: int, images: int = 400, better: float = 0.0) -> Sample:
    """Nets that share which images are hard, and differ by their seed."""
    easiness = np.random.default_rng(1).beta(2, 2, images)
    shift = draw.normal(0, 0.03, (seeds, 1))
    right = draw.uniform(size=(seeds, images)) < np.clip(easiness + better + shift, 0, 1)
    return sample(right.mean(axis=1), right)


@pytest.mark.parametrize(
    ("groups", "degrees"), [(3, 1.4), (3, 4.3), (12, 24.7), (50, 4.0), (40, 2.0), (6, 1.0)]
)
def test_the_studentized_range_is_scipys(groups: int, degrees: float) -> None:
    for q in (1.0, 3.5, 6.0):
        expected = stats.studentized_range.cdf(q, groups, degrees)
        assert statistics.studentized_range(q, groups, degrees) == pytest.approx(expected, abs=1e-7)
    expected = stats.studentized_range.ppf(0.95, groups, degrees) / math.sqrt(2)
    assert Family(groups - 1, chosen=True).critical(degrees) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("gap", [3.0, 1.0, 0.5, 0.2])
def test_the_seeds_that_are_needed_are_statsmodels(gap: float) -> None:
    expected = TTestIndPower().solve_power(effect_size=gap, alpha=0.05, power=0.8)
    assert seeds_needed(gap, Deviation(1.0, 8), None) == math.ceil(expected)


def test_no_number_of_seeds_makes_up_for_too_few_images() -> None:
    images = (0.01**2, 499.0)
    assert seeds_needed(0.02, Deviation(0.01, 8), images) is None
    needed = seeds_needed(0.03, Deviation(0.01, 8), images)
    assert needed is not None
    assert needed >= 3 * (seeds_needed(0.03, Deviation(0.01, 8), None) or 0)


def test_two_groups_without_images_are_welchs_test() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(0.7, 0.01, 4), draw.normal(0.69, 0.03, 6)
    found = contrast([sample(a)], [sample(b)], None)
    expected = stats.ttest_ind(a, b, equal_var=False)
    interval = expected.confidence_interval()
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.covers == "seeds"


def test_differences_to_a_best_that_was_chosen_are_tukeys() -> None:
    """With one deviation for all, Tukey's test; with their own, that of Games and Howell."""
    draw = np.random.default_rng(0)
    values = [draw.normal(mean, 0.01, 5) for mean in (0.7, 0.69, 0.68)]
    expected = stats.tukey_hsd(*values)
    deviation = pooled([sample(v) for v in values])
    assert deviation is not None
    for other in (1, 2):
        error = deviation.std * math.sqrt(2 / 5)
        t = (values[0].mean() - values[other].mean()) / error
        p = Family(2, chosen=True).p(t, deviation.degrees)
        assert p == pytest.approx(expected.pvalue[0, other], abs=1e-6)
        own = contrast([sample(values[0])], [sample(values[other])], None, Family(2, chosen=True))
        q = math.sqrt(2) * abs(own.value) / own.error
        assert own.p == pytest.approx(stats.studentized_range.sf(q, 3, own.degrees), abs=1e-6)
        assert own.told_apart == (own.p < 0.05)


def test_a_named_baseline_is_bonferronis() -> None:
    a, b = sample([0.7, 0.71, 0.69]), sample([0.6, 0.62, 0.64])
    single, of_four = (contrast([a], [b], None, Family(count)) for count in (1, 4))
    assert of_four.p == pytest.approx(4 * single.p)
    assert of_four.half == pytest.approx(
        stats.t.ppf(1 - 0.05 / 8, single.degrees) * single.error, rel=1e-9
    )


def test_the_images_are_a_part_of_the_variance() -> None:
    """One part a net, and one an image, without what nets of one group differ by on an image."""
    draw = np.random.default_rng(4)
    a, b = nets(draw, 3), nets(draw, 4, better=0.05)
    found = contrast([a], [b], None)
    right_a, right_b = a.right, b.right
    assert right_a is not None
    assert right_b is not None
    images = (right_a.mean(axis=0) - right_b.mean(axis=0)).var(ddof=1)
    noise = right_a.var(axis=0, ddof=1).mean() / 3 + right_b.var(axis=0, ddof=1).mean() / 4
    parts = [np.var(a.values, ddof=1) / 3, np.var(b.values, ddof=1) / 4]
    parts.append(max(images - noise, 0) / 400)
    assert found.error == pytest.approx(math.sqrt(sum(parts)))
    squares = sum(part**2 / degrees for part, degrees in zip(parts, (2, 3, 399), strict=True))
    assert found.degrees == pytest.approx(sum(parts) ** 2 / squares)
    assert found.covers == "seeds and images"


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_two_single_runs_are_mcnemars_test(only_a: int, only_b: int) -> None:
    right_a = np.array([[True] * only_a + [False] * only_b + [True] * 400])
    right_b = np.array([[False] * only_a + [True] * only_b + [True] * 400])
    a, b = (sample(right.mean(axis=1), right) for right in (right_a, right_b))
    found = contrast([a], [b], None)
    table = [[400, only_a], [only_b, 0]]
    if only_a != only_b:  # between the exact test, which is too careful, and the one without care
        exact, plain = (mcnemar(table, exact=e, correction=False).pvalue for e in (True, False))
        assert plain - 0.03 <= found.p <= exact + 0.03
    assert found.value == pytest.approx((only_a - only_b) / right_a.shape[1])
    assert found.covers == "images"


def test_folds_are_the_test_of_nadeau_and_bengio() -> None:
    draw = np.random.default_rng(3)
    a, b = draw.normal(0.8, 0.01, 5), draw.normal(0.75, 0.01, 5)
    found = contrast([sample(a, folds=5)], [sample(b, folds=5)], None)
    error = math.sqrt((1 / 5 + 1 / 4) * np.var(a - b, ddof=1))
    assert found.p == pytest.approx(2 * stats.t.sf(abs((a - b).mean()) / error, 4))
    width = stats.t.ppf(0.975, 4) * error
    assert (found.low, found.high) == pytest.approx(
        ((a - b).mean() - width, (a - b).mean() + width)
    )
    assert found.covers == "folds"


def factorial(draw: Draw) -> pd.DataFrame:
    effects = {"adam": 0.02, "sgd": 0.0, "relu": 0.01, "tanh": 0.0, "gelu": 0.005}
    seed_effects = draw.normal(0, 0.01, 4)
    rows = [
        (o, a, seed, 0.7 + effects[o] + effects[a] + seed_effects[seed] + draw.normal(0, 0.005))
        for o in ("adam", "sgd")
        for a in ("relu", "tanh", "gelu")
        for seed in range(4)
    ]
    return pd.DataFrame(rows, columns=["optimizer", "activation", "seed", "y"])


@pytest.mark.parametrize("paired", [True, False])
def test_main_effects_are_those_of_the_analysis_of_variance(paired: bool) -> None:
    frame = factorial(np.random.default_rng(5))
    formula = "y ~ C(optimizer, Sum) * C(activation, Sum)" + " + C(seed)" * paired
    model = ols(formula, frame).fit()
    cells = {
        key: sample(rows.sort_values("seed").y)
        for key, rows in frame.groupby(["optimizer", "activation"])
    }
    deviation = (residual if paired else pooled)(list(cells.values()))
    assert deviation is not None
    assert deviation.std**2 == pytest.approx(model.mse_resid)
    assert deviation.degrees == model.df_resid
    plus, minus = ([c for (o, _), c in cells.items() if o == name] for name in ("adam", "sgd"))
    found = contrast(plus, minus, deviation)
    expected = model.t_test("2 * C(optimizer, Sum)[S.adam] = 0")
    # Without images; `sample` gives none of them right answers.
    assert found.value == pytest.approx(float(np.squeeze(expected.effect)))
    assert found.p == pytest.approx(float(expected.pvalue))
    assert (found.low, found.high) == pytest.approx(tuple(np.squeeze(expected.conf_int())))


def test_values_that_do_not_vary_take_the_deviation_of_the_others() -> None:
    cut_off, other = sample([19, 19, 19]), sample([15, 17, 18])
    with pytest.raises(CannotJudge):
        contrast([cut_off], [cut_off], None)
    deviation = pooled([cut_off, other])
    assert deviation is not None
    assert deviation.degrees == 2  # 19, 19, 19 says nothing of how runs vary
    assert residual([cut_off, other, other]) == pooled([other, other])
    found = contrast([cut_off], [other], deviation)
    assert 0 < found.p < 1
    assert found.half > 0


def test_folds_that_differ_by_the_same_amount_cannot_be_judged() -> None:
    a, b = sample([0.7, 0.8, 0.9], folds=3), sample([0.6, 0.7, 0.8], folds=3)
    with pytest.raises(CannotJudge):
        contrast([a], [b], None)


def test_one_run_is_set_against_all_seeds_of_the_other() -> None:
    """One deviation, with its degrees of freedom, once; on an image it varies as others do."""
    draw = np.random.default_rng(2)
    one, many = nets(draw, 1), nets(draw, 5)
    deviation = pooled([one, many])
    assert deviation is not None
    found = contrast([sample(many.values)], [sample(one.values)], deviation)
    t = (many.mean - one.mean) / (np.std(many.values, ddof=1) * math.sqrt(1 + 1 / 5))
    assert found.value == pytest.approx(many.mean - one.mean)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(t), 4))
    found = contrast([many], [one], deviation)
    assert many.right is not None
    assert one.right is not None
    between = (many.right.mean(axis=0) - one.right.mean(axis=0)).var(ddof=1)
    noise = many.right.var(axis=0, ddof=1).mean() * (1 + 1 / 5)
    assert (found.over_images or [0])[0] == pytest.approx(max(between - noise, 0) / 400, abs=1e-12)


# --- simulated: the tolerances are three standard errors of the simulation -----------------------


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "others"), [(2, 2), (3, 3), (5, 5), (10, 10), (1, 3), (1, 5)])
def test_equal_groups_are_told_apart_in_about_one_case_of_twenty(seeds: int, others: int) -> None:
    draw = np.random.default_rng(seeds)
    wrong = 0
    for _ in range(400):
        a, b = nets(draw, seeds), nets(draw, others)
        if deviation := pooled([a, b]):  # else neither pair of seeds differs: nothing is judged
            wrong += contrast([a], [b], deviation).told_apart
    assert wrong / 400 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
def test_a_best_of_six_equal_groups_is_told_from_another_in_about_one_case_of_twenty(
    seeds: int,
) -> None:
    """Of all folders, not of all differences, although the best was chosen by the same runs."""
    draw = np.random.default_rng(seeds)
    family, wrong, folders = Family(5, chosen=True), 0, 300
    for _ in range(folders):
        groups = sorted((sample(draw.normal(0, 1, seeds)) for _ in range(6)), key=lambda s: s.mean)
        best = groups[-1]
        wrong += any(contrast([g], [best], None, family).told_apart for g in groups[:-1])
    assert wrong / folders < 0.05 + 3 * math.sqrt(0.05 * 0.95 / folders)
