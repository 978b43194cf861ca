"""The rule of the verdicts: worked by hand, by other programs, and by simulation."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from cifar_lab.analysis.contrasts import Deviation
from cifar_lab.analysis.verdicts import EpochStudy, Verdict, joint, judge, pooled_deviation
from cifar_lab.config.reports import Claim, Margin, read_report
from cifar_lab.errors import UsageError

CLAIM = Claim("test_accuracy", "made up", 0.75, margin=Margin("made up", 0.02))


def deviation(values: list[float]) -> Deviation | None:
    return pooled_deviation([dict(enumerate(values))])


def verdict(claim: Claim, values: list[float], others: list[float] | None = None) -> Verdict:
    other_deviation = deviation(others) if others else None
    own = deviation(values) if not others or other_deviation else None
    return judge(claim, values, others or [], deviation=own, other_deviation=other_deviation)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([], "not measured yet"),
        ([0.75], "inconclusive"),  # one run has no deviation
        ([0.75, 0.75, 0.75], "inconclusive"),  # nor have equal ones
        ([0.6 - 0.4, 0.5 - 0.3, 0.7 - 0.5], "inconclusive"),  # equal but for rounding errors
        ([0.74, 0.75, 0.76], "reproduced"),  # t(0.95, 2) = 2.92: 0 ± 1.69 points
        ([0.745, 0.755, 0.765], "inconclusive"),  # 0.5 ± 1.69
        ([0.78, 0.79, 0.80], "inconclusive"),  # 4 points, but one more run is within 4.97
        ([0.80, 0.81, 0.82], "differs"),
        ([0.751, 0.752, 0.753], "reproduced"),  # far from chance, but the same by the margin
        ([0.768, 0.7681, 0.7682], "reproduced"),
        ([0.772, 0.7721, 0.7722], "differs"),
    ],
)
def test_a_figure_is_the_same_within_its_margin_or_what_no_run_gives(
    values: list[float], word: str
) -> None:
    assert verdict(CLAIM, values).word == word


def test_the_intervals_are_those_of_scipy() -> None:
    values = [0.765, 0.78, 0.79]
    said = verdict(CLAIM, values)
    off = np.mean(values) - 0.75
    mean = stats.ttest_1samp(values, 0.75)
    half = mean.confidence_interval(0.90).high - np.mean(values)
    within = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) * np.sqrt(1 + 1 / 3)
    assert said.reason.startswith(
        f"off by +{100 * off:.2f} points, 90 % interval ±{100 * half:.2f} points, "
        f"margin ±2.00 points, one more run within ±{100 * within:.2f} points, n = 3, 2 df"
    )
    sides = [
        stats.ttest_1samp(values, 0.75 + 0.02, alternative="less").pvalue,
        stats.ttest_1samp(values, 0.75 - 0.02, alternative="greater").pvalue,
    ]
    assert said.p_confirmed == pytest.approx(max(sides))
    t = off / (np.std(values, ddof=1) * np.sqrt(1 + 1 / 3))
    assert said.p_refuted == pytest.approx(2 * stats.t.sf(t, 2))


def test_rounding_widens_the_margin_and_the_number_itself() -> None:
    values = [0.772, 0.7721, 0.7722]
    rounded = dataclasses.replace(CLAIM, rounding=0.005)
    assert (verdict(CLAIM, values).word, verdict(rounded, values).word) == ("differs", "reproduced")


@pytest.mark.parametrize(
    ("values", "settles"),
    [
        ([0.745, 0.755, 0.765], "4 seeds would settle it"),
        ([0.70, 0.78, 0.86], "no number would: a single run, as the report's, scatters by more"),
        ([0.76989, 0.76999, 0.75999, 0.77999], "more than 1,000 seeds would be needed"),
    ],
)
def test_what_is_open_says_how_many_seeds_would_settle_it(
    values: list[float], settles: str
) -> None:
    said = verdict(CLAIM, values)
    assert said.word == "inconclusive"
    assert settles in said.reason
    if match := re.match(r"(\d+) seeds", settles):  # with mean and deviation as they are
        for n, word in ((int(match[1]) - 1, False), (int(match[1]), True)):
            half = stats.t.ppf(0.95, n * 2 / 3) * 0.01 / np.sqrt(n)
            assert (0.005 + half <= 0.02) == word


@pytest.mark.parametrize(
    ("claim", "values", "word"),
    [
        ({"at_least": 0.7}, [0.75, 0.76, 0.77], "holds"),
        ({"at_least": 0.7}, [0.65, 0.66, 0.67], "contradicted"),
        ({"at_most": 0.7}, [0.65, 0.66, 0.67], "holds"),
        ({"at_least": 0.7}, [0.65, 0.71, 0.80], "inconclusive"),  # 0.72 ± 0.19 says neither
        ({"at_least": 0.7}, [0.9], "inconclusive"),  # a side alone decides nothing
    ],
)
def test_a_bound_is_judged_by_the_interval_of_the_mean(
    claim: dict[str, Any], values: list[float], word: str
) -> None:
    assert verdict(dataclasses.replace(CLAIM, value=None, **claim), values).word == word


@pytest.mark.parametrize(
    ("values", "others", "word"),
    [
        ([0.8], [0.7], "inconclusive"),  # a sign alone decides nothing
        ([0.80, 0.81, 0.82], [0.70, 0.71, 0.72], "holds"),
        ([0.70, 0.71, 0.72], [0.80, 0.81, 0.82], "contradicted"),
        ([0.70, 0.75, 0.80], [0.69, 0.74, 0.79], "inconclusive"),
    ],
)
def test_a_comparison_is_judged_by_the_interval_of_the_difference(
    values: list[float], others: list[float], word: str
) -> None:
    claim = dataclasses.replace(CLAIM, value=None, above={"dropout.conv": 0.5})
    said = verdict(claim, values, others)
    assert said.word == word
    if len(values) > 1:
        welch = stats.ttest_ind(values, others, equal_var=False)
        assert min(said.p_confirmed, said.p_refuted) == pytest.approx(welch.pvalue)
        half = welch.confidence_interval().high - (np.mean(values) - np.mean(others))
        assert f"95 % interval ±{100 * half:.2f} points" in said.reason


def test_what_follows_from_others_or_did_not_happen_is_not_averaged() -> None:
    shown = dataclasses.replace(CLAIM, margin=None, not_judged="follows from precision and recall")
    assert verdict(shown, [0.1, 0.2]) == Verdict("not judged", "follows from precision and recall")
    missing = judge(CLAIM, [0.75, 0.76], deviation=Deviation(0.01, 1), missing=1)
    assert str(missing) == "inconclusive (in 1 of 3 runs it did not happen)"


def test_configurations_are_pooled_as_in_an_analysis_of_variance() -> None:
    rng = np.random.default_rng(0)
    groups = [rng.normal(mean, 0.01, n) for mean, n in ((0.7, 3), (0.8, 4), (0.9, 2))]
    found = pooled_deviation([{(i, j): v for j, v in enumerate(g)} for i, g in enumerate(groups)])
    squares = sum(((group - group.mean()) ** 2).sum() for group in groups)
    assert found is not None
    assert (found.std**2, found.degrees) == pytest.approx((squares / 6, 6))


def test_runs_that_continue_each_other_count_as_one() -> None:
    """A random effect of the seed: the degrees of freedom are Satterthwaite's."""
    rng = np.random.default_rng(1)
    seeds, lengths = 4, 6
    y = rng.normal(0, 0.006, (seeds, 1)) + rng.normal(0, 0.003, (seeds, lengths))
    found = pooled_deviation([dict(enumerate(column)) for column in y.T])
    # two-way analysis of variance: mean squares of the seeds, and of what is left
    by_seed = lengths * y.mean(axis=1).var(ddof=1)
    rest = y - y.mean(axis=0) - y.mean(axis=1, keepdims=True) + y.mean()
    left = (rest**2).sum() / ((seeds - 1) * (lengths - 1))
    total = by_seed / lengths + left * (lengths - 1) / lengths
    parts = (by_seed / lengths) ** 2 / (seeds - 1)
    parts += (left * (lengths - 1) / lengths) ** 2 / ((seeds - 1) * (lengths - 1))
    assert found is not None
    assert found.std**2 == pytest.approx(total)
    assert found.degrees == pytest.approx(total**2 / parts)


def test_a_length_fits_if_one_more_run_could_have_given_the_number() -> None:
    claim = dataclasses.replace(CLAIM, rounding=0.005)
    values = {20: [0.71, 0.72, 0.73], 22: [0.74, 0.75, 0.76], 24: [0.78, 0.79, 0.80]}
    study = EpochStudy(claim, {e: dict(enumerate(v)) for e, v in values.items()})
    # seeds deviate alike: s = 0.01 with 2 degrees of freedom, one more run within 4.97 points
    assert study.estimates[20].degrees == pytest.approx(2)
    assert study.halves[20] == pytest.approx(0.0497, abs=1e-4)
    assert (study.fitting, study.nearest) == ([20, 22, 24], 22)
    assert str(study.verdict) == (
        "not judged (fitted to the report: fits at every length tried, 20 to 24 epochs)"
    )
    far = {20: [0.5, 0.51, 0.52], 22: [0.74, 0.75, 0.76], 24: [0.9, 0.91, 0.92]}
    study = EpochStudy(claim, {e: dict(enumerate(v)) for e, v in far.items()})
    assert study.fit == "fits from 22 to 22 of 20 to 24 epochs"
    far.pop(22)
    study = EpochStudy(claim, {e: dict(enumerate(v)) for e, v in far.items()})
    assert str(study.verdict) == "differs (fits at no length tried, 20 to 24 epochs)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "gap", "expected"),
    [  # shares of reproduced and of differs, in the issue to the nearest percent for n = 3
        (3, 0, (0.58, 0.04)),
        (3, 3, (0.04, 0.61)),
        (3, 4, (0.005, 0.85)),
        (5, 0, (0.735, 0.04)),
        (5, 3, (0.055, 0.72)),
        (10, 0, (0.84, 0.04)),
        (10, 4, (0.01, 0.957)),
    ],
)
def test_the_rule_keeps_its_level_and_more_seeds_sharpen_it(
    n: int, gap: int, expected: tuple[float, float]
) -> None:
    """A margin of 2 deviations, pooled over 4 configurations; a report's run is one run."""
    rng = np.random.default_rng(n + 10 * gap)
    degrees, trials = 4 * (n - 1), 2000
    claim = dataclasses.replace(CLAIM, value=0.0, margin=Margin("made up", 2.0))
    words = []
    for _ in range(trials):
        std = float(np.sqrt(rng.chisquare(degrees) / degrees))
        mean, reported = gap + rng.normal() / np.sqrt(n), rng.normal()
        at = Deviation(std, degrees)
        words.append(judge(claim, [mean - reported] * n, deviation=at).word)
    shares = [words.count(word) / trials for word in ("reproduced", "differs")]
    assert shares == pytest.approx(expected, abs=0.03)  # three standard errors of 2,000 trials


def test_a_report_is_judged_as_a_whole() -> None:
    verdicts = [
        Verdict("reproduced", p_confirmed=0.001),
        Verdict("reproduced", p_confirmed=0.04),
        Verdict("differs", p_refuted=0.02),
        Verdict("inconclusive", p_confirmed=0.3, p_refuted=0.3),
        Verdict("not judged"),
        Verdict("not measured yet"),
    ]
    # Holm: 4 x 0.001 stays, 3 x 0.04 does not, and neither does 4 x 0.02
    assert joint(verdicts) == (
        "Of 4 figures and findings that do not follow from each other: 2 reproduced, 1 differs, "
        "1 inconclusive. Adjusted for their number (Holm), 1 of the 2 confirmed and 0 of the 1 "
        "refuted remain."
    )
    assert joint(verdicts[4:]) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{metric: epochs, source: X, id: X-1}", "X-1 needs one of value, at_least, at_most and"),
        ("{metric: epochs, source: X, value: 1, at_least: 2}", "epochs needs one of value, "),
        ("{metric: epochs, source: X, valeu: 1}", r"x.claims\[0\].valeu \(did you mean value\?\)"),
        ("{metric: epochs, source: X, value: 1}", "epochs needs a margin: its size, and the reas"),
        ("{metric: a, source: X, value: 1, margin: {size: 1}}", "margin.reason is missing"),
        ("{metric: a, source: X, value: 1, margin: {reason: r}}", "margin.size is missing"),
        (
            "{metric: a, source: X, value: 1, margin: {size: 1, reason: ' '}}",
            "reason is empty: say",
        ),
        (
            "{metric: a, source: X, value: 1, margin: {size: -1, reason: r}}",
            "size=-1.0 is wrong: it",
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
