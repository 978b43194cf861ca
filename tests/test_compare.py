import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from synthetic_runs import dataset_config, make_run, predictions

from cifar_lab import compare
from cifar_lab.analysis import ranking, run_metrics, seed_groups, statistics
from cifar_lab.runs.metrics import Predictions
from cifar_lab.runs.run_dir import RunDir


def both(a: RunDir, b: RunDir, *more: str | Path) -> int:
    return compare.main([str(a.path), str(b.path), *map(str, more)])


def rights(rate: float, seeds: int, images: int, draw: Any) -> Any:
    """Right answers of nets that share which images are hard, and differ by their seed."""
    easiness = draw.beta(2, 2, images)
    shift = draw.normal(0, 0.03, (seeds, 1))
    return draw.uniform(size=(seeds, images)) < np.clip(easiness + rate - 0.5 + shift, 0, 1)


# --- the tests themselves -------------------------------------------------------------------------


@settings(deadline=None)  # the first call imports scipy
@given(st.integers(0, 12), st.integers(0, 12))
def test_mcnemar_is_the_mid_p_of_all_coin_tosses(only_a: int, only_b: int) -> None:
    right_a = np.array([True] * only_a + [False] * only_b + [True] * 5)
    right_b = np.array([False] * only_a + [True] * only_b + [True] * 5)
    found = statistics.mcnemar(right_a, right_b)
    total, fewer = only_a + only_b, min(only_a, only_b)
    counts = [math.comb(total, k) / 2**total for k in range(total + 1)]
    expected = 1.0 if only_a == only_b else 2 * sum(counts[:fewer]) + counts[fewer]
    assert found.p == pytest.approx(expected)
    assert (found.only_a, found.only_b) == (only_a, only_b)
    assert found.difference == pytest.approx((only_a - only_b) / len(right_a))
    assert found.low <= found.difference <= found.high


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_equal_settings_are_called_different_in_about_one_case_of_twenty(seeds: int) -> None:
    draw = np.random.default_rng(seeds)
    p_values = []
    for _ in range(600):
        both_sides = rights(0.5, 2 * seeds, 400, draw)
        p_values.append(statistics.seeds_test(both_sides[:seeds], both_sides[seeds:]).p)
    assert np.mean(np.array(p_values) < 0.05) < 0.075


def test_a_true_difference_is_found_and_its_interval_holds_it() -> None:
    draw = np.random.default_rng(0)
    found = held = 0
    for _ in range(100):
        easiness = draw.beta(2, 2, 1000)
        sides = [
            draw.uniform(size=(3, 1000)) < np.clip(easiness + more, 0, 1) for more in (0.1, 0.0)
        ]
        truth = float((np.clip(easiness + 0.1, 0, 1) - easiness).mean())
        test = statistics.seeds_test(*sides)
        found += test.p < 0.05
        held += test.low <= truth <= test.high
    assert found > 90
    assert held > 90


def test_nets_that_agree_everywhere_do_not_differ() -> None:
    same = np.ones((3, 50), dtype=bool)
    assert statistics.seeds_test(same, same).p == 1
    assert statistics.seeds_test(same, ~same).p == 0


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_is_the_step_down_procedure(p_values: list[float]) -> None:
    adjusted = statistics.holm(p_values)
    for level in (0.01, 0.05, 0.2):
        rejected = [False] * len(p_values)
        order = sorted(range(len(p_values)), key=lambda i: p_values[i])
        for place, i in enumerate(order):
            if (len(p_values) - place) * p_values[i] >= level:
                break
            rejected[i] = True
        assert [p < level for p in adjusted] == rejected


def test_images_are_matched_by_their_index_not_their_place() -> None:
    draw = np.random.default_rng(0)
    labels, logits = draw.integers(0, 3, 60), draw.normal(size=(60, 3)).astype(np.float32)
    a = Predictions(logits, labels, np.arange(60))
    order = draw.permutation(60)
    b = Predictions(logits[order], labels[order], order)
    assert statistics.compare([a], [b]).p == 1


def test_an_interval_does_not_depend_on_the_order() -> None:
    values = [0.1, 0.7, 0.3, 1e-9]
    assert len({statistics.interval(list(p)) for p in itertools.permutations(values)}) == 1


@pytest.mark.parametrize(
    ("metric", "values", "shown"),
    [
        ("test_accuracy", [], "–"),
        ("test_accuracy", [0.5799], "57.99 %"),
        ("test_accuracy", [0.5573, 0.6025], "55.73 and 60.25 %"),
        ("test_accuracy", [0.74, 0.75, 0.76], "75.00 ± 2.48 %"),
        ("test_accuracy", [0.8, 0.99, 1.0], "93.00 % (65.01 to 100.00)"),
        ("test_accuracy", [0.0, 0.1, 0.02], "4.00 % (0.00 to 17.14)"),
        ("test_loss", [0.5, 0.75], "0.5000 and 0.7500"),
        ("test_loss", [0.1, 0.2, 1.2], "0.5000 (0.0000 to 2.0110)"),
        ("best_epoch", [3, 4], "3.5"),
        ("seconds_per_epoch", [1.0, 3.0], "2.0 s"),
    ],
)
def test_intervals_are_given_from_three_runs_on_and_stay_within_what_is_possible(
    metric: str, values: list[float], shown: str
) -> None:
    found = statistics.interval(values, run_metrics.bounds(metric))
    assert run_metrics.show_interval(metric, found) == shown


# --- folds ----------------------------------------------------------------------------------------


def test_the_test_over_folds_is_nadeau_and_bengios() -> None:
    """Their equation, computed with scipy's t distribution from the differences of the folds."""
    draw = np.random.default_rng(3)
    sides = [
        {bytes([fold]): draw.uniform(size=(runs, 200)) < rate for fold in range(5)}
        for runs, rate in ((1, 0.8), (2, 0.75))
    ]
    found = statistics.folds_test(sides[0], sides[1], training_images=800)
    differences = [
        100 * (sides[0][fold].mean() - sides[1][fold].mean(axis=1).mean()) for fold in sides[0]
    ]
    error = math.sqrt((1 / 5 + 200 / 800) * np.var(differences, ddof=1))
    t = np.mean(differences) / error
    assert found.p == pytest.approx(2 * stats.t.sf(abs(t), 4))
    assert 100 * found.difference == pytest.approx(np.mean(differences))
    width = stats.t.ppf(0.975, 4) * error
    assert (100 * found.low, 100 * found.high) == pytest.approx(
        (np.mean(differences) - width, np.mean(differences) + width)
    )
    assert (found.images, found.seeds) == (1000, (5, 10))


def folds_of_two_learners(draw: Any, images: int = 60, folds: int = 5) -> list[dict[bytes, Any]]:
    """Right answers of two learners that are equally good: each sees one of two equal features."""
    labels = draw.integers(0, 2, images)
    features = labels[:, None] + draw.normal(0, 2, (images, 2))
    sides: list[dict[bytes, Any]] = [{}, {}]
    parts = np.array_split(draw.permutation(images), folds)
    for number, held_out in enumerate(parts):
        training = np.setdiff1d(np.arange(images), held_out)
        for side, feature in zip(sides, features.T, strict=True):
            ones = labels[training] == 1
            middle = (feature[training][ones].mean() + feature[training][~ones].mean()) / 2
            right = (feature[held_out] > middle) == (labels[held_out] == 1)
            side[bytes([number])] = right[None]
    return sides


def test_equal_learners_differ_over_folds_in_about_one_case_of_twenty() -> None:
    draw = np.random.default_rng(0)
    p_values = []
    for _ in range(600):
        a, b = folds_of_two_learners(draw)
        p_values.append(statistics.folds_test(a, b, 48).p)
    assert np.mean(np.array(p_values) < 0.05) < 0.06


def test_settings_that_share_folds_are_compared_by_folds(tmp_path: Path) -> None:
    """Runs of one setting that were scored on different images are its folds."""
    dataset = dataset_config(train_size=2500)
    for lr, accuracy in ((0.1, 0.8), (0.01, 0.6)):
        for fold in range(5):
            run = make_run(tmp_path, lr=lr, seed=fold, dataset=dataset, split={"validation": 500})
            found = predictions(500, accuracy, 10 * fold + int(10 * lr), first=500 * fold)
            run.write_predictions(found, "validation", "scored")
    collection = seed_groups.read_collection(tmp_path)
    ranking.rank(collection, None)
    test = next(one.against_best for one in collection.groups if not one.chosen)
    assert test is not None
    assert test.method == "corrected resampled t over 5 folds"
    assert (test.images, test.seeds) == (2500, (5, 5))
    assert test.p < 0.05
    assert test.difference == pytest.approx(0.2, abs=0.05)


# --- the command ----------------------------------------------------------------------------------


def test_two_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = make_run(tmp_path, optimizer="sgd", accuracy=0.6, images=1000)
    b = make_run(tmp_path, optimizer="adam", accuracy=0.7, images=1000)
    assert both(a, b) == 0
    said = capsys.readouterr().out
    rows = {
        cells[1]: cells[2:4]
        for line in said.splitlines()
        if len(cells := [cell.strip() for cell in line.split("|")]) > 4
    }
    assert rows["optimizer"] == ["sgd", "adam"]
    assert rows["optimizer.lr"] == ["0.01", "0.001"]
    assert rows["optimizer.momentum"] == ["0.9", "–"]
    assert "seed" not in rows
    for run, cell in zip((a, b), rows["test_accuracy"], strict=True):
        accuracy = run.read_summary().test_accuracy or 0.0
        ends = stats.binomtest(round(1000 * accuracy), 1000).proportion_ci(method="wilson")
        low, high = 100 * ends.low, 100 * ends.high
        assert cell == f"{100 * accuracy:.2f} % ({low:.2f} to {high:.2f})"
    right_a, right_b = (
        p.predicted == p.labels for p in (a.read_predictions(), b.read_predictions())
    )
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    assert f"right where B is wrong on {only_a} of 1,000 images, B where A on {only_b}:" in said
    assert "these two networks differ" in said


def test_a_difference_of_the_seed_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (make_run(tmp_path, seed=seed) for seed in (0, 1))
    assert both(a, b) == 0
    said = capsys.readouterr().out
    assert "no significant difference" in said
    assert "less than the interval's" in said
    assert "seed alone" in said


def test_other_test_images_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_run(tmp_path, images=300), make_run(tmp_path, seed=1, images=200)
    assert both(a, b) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "different images" in captured.err


def test_unfinished_missing_and_damaged_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = make_run(tmp_path), make_run(tmp_path, seed=1, status="running")
    assert both(a, b) == 0
    assert "B has no test predictions" in capsys.readouterr().out
    assert both(a, RunDir(tmp_path / "nowhere")) == 2
    b.summary_file.write_text(json.dumps({"status": []}))
    assert both(a, b) == 1
    a.predictions_file("test", "scored").write_bytes(b"PK")
    assert both(a, make_run(tmp_path, seed=2)) == 1


def test_seeds_decide_what_is_called_a_difference(tmp_path: Path) -> None:
    """The better mean of settings whose seeds scatter is not called better."""
    for lr, scores in ((0.1, (0.55, 0.66, 0.62)), (0.01, (0.53, 0.65, 0.57)), (0.001, (0.2,) * 3)):
        for seed, accuracy in enumerate(scores):
            make_run(tmp_path, lr=lr, seed=seed, accuracy=accuracy, images=2000)
    collection = seed_groups.read_collection(tmp_path)
    ranking.rank(collection, None)
    best, close, far = collection.ranking
    assert (best.chosen, close.tied_with_best, far.tied_with_best) == (True, True, False)
    one_seed = statistics.compare(
        best.predictions("validation", "scored")[:1],
        close.predictions("validation", "scored")[:1],
    )
    assert one_seed.p < 0.05  # what one seed alone would have claimed
