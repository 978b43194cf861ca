from pathlib import Path

import numpy as np
import pytest
from fixtures import Capture, Folders, Patch
from synthetic_runs import make_grid, make_run

from cifar_lab import compare
from cifar_lab.analysis import comparison, contrasts, grouping, ranking, run_metrics, statistics
from cifar_lab.analysis.load_runs import Scored
from cifar_lab.analysis.summary_tables import summary_csv
from cifar_lab.runs.metrics import Predictions
from cifar_lab.runs.run_dir import RunDir


def both(a: RunDir, b: RunDir, *more: str | Path) -> int:
    return compare.main([str(a.path), str(b.path), *map(str, more)])


def test_images_are_matched_by_their_index_not_their_place() -> None:
    draw = np.random.default_rng(0)
    labels, logits = draw.integers(0, 3, 60), draw.normal(size=(60, 3)).astype(np.float32)
    a = Scored.of(Predictions(logits, labels, np.arange(60)))
    order = draw.permutation(60)
    b = Scored.of(Predictions(logits[order], labels[order], order))
    assert a.images == b.images
    assert (a.right == b.right).all()


@pytest.mark.parametrize(
    ("metric", "values", "shown"),
    [
        ("test_accuracy", [], "–"),
        ("test_accuracy", [0.5799], "57.99 %"),
        ("test_accuracy", [0.5573, 0.6025], "55.73 and 60.25 %"),
        ("test_accuracy", [0.74, 0.75, 0.76], "75.00 ± 2.48 %"),
        ("test_accuracy", [0.8, 0.99, 1.0], "93.00 % (65.01 to 100.00)"),
        ("test_loss", [0.1, 0.2, 1.2], "0.5000 (0.0000 to 2.0110)"),
        ("test_accuracy", [0.75, 0.75, 0.75], "75.00 %"),
        ("test_accuracy", [0.1 + 0.2, 0.3, 0.3], "30.00 %"),  # equal but for rounding
        ("seconds_per_epoch", [1.0, 3.0], "2.0 s"),
    ],
)
def test_intervals_are_given_from_three_runs_on_and_stay_within_what_is_possible(
    metric: str, values: list[float], shown: str
) -> None:
    found = statistics.interval(values, run_metrics.bounds(metric))
    assert run_metrics.show_interval(metric, found) == shown


def test_a_fall_of_the_loss_is_better_and_a_gap_is_worse() -> None:
    on_test_images = ["feature_silhouette", "final_accuracy_gap", "expected_calibration_error"]
    names = ["fall_val_loss", "rise_train_accuracy", "best_val_macro_f1", *on_test_images]
    assert [name for name in names if run_metrics.higher_is_better(name)] == names[:4]
    assert [name for name in names if run_metrics.is_test(name)] == on_test_images


def test_two_runs_side_by_side(tmp_path: Path, capsys: Capture) -> None:
    a = make_run(tmp_path, optimizer="sgd", accuracy=0.6, images=1000)
    b = make_run(tmp_path, optimizer="adam", accuracy=0.7, images=1000)
    assert both(a, b) == 0
    said = capsys.readouterr().out
    assert "optimizer.lr        0.01             0.001" in said
    assert "optimizer.momentum  0.9" in said
    assert "\nseed " not in said
    for run in (a, b):
        accuracy = run.read_summary().test_accuracy or 0.0
        assert f"{100 * accuracy:.2f} %" in said
    right_a, right_b = (
        p.predicted == p.labels for p in (a.read_predictions(), b.read_predictions())
    )
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    assert f"A alone is right on {only_a} of them, B alone on {only_b}." in said
    assert "better as a network (p < 0.001)" in said
    assert "of two networks, not of other seeds" in said


def test_other_test_images_are_refused(tmp_path: Path, capsys: Capture) -> None:
    a, b = make_run(tmp_path, images=300), make_run(tmp_path, seed=1, images=200)
    assert both(a, b) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "different images" in captured.err


def test_a_run_that_is_not_finished_is_compared_as_far_as_it_is(
    tmp_path: Path, capsys: Capture
) -> None:
    assert both(make_run(tmp_path), make_run(tmp_path, seed=1, status="running")) == 0
    assert "B has no test predictions" in capsys.readouterr().out


def test_seeds_decide_what_is_called_a_difference(tmp_path: Path) -> None:
    """The better mean of settings whose seeds scatter is not called better."""
    for lr, scores in ((0.1, (0.55, 0.66, 0.62)), (0.01, (0.53, 0.65, 0.57)), (0.001, (0.2,) * 3)):
        for seed, accuracy in enumerate(scores):
            make_run(tmp_path, lr=lr, seed=seed, accuracy=accuracy, images=2000)
    collection = grouping.read_collection(tmp_path)
    ranking.rank(collection, None)
    best, close, far = collection.ranking
    assert (best.chosen, close.is_tied, far.is_tied) == (True, True, False)
    assert comparison.compare(best.runs[:1], far.runs[:1]).differences["test_accuracy"].told_apart


def test_a_single_run_is_set_against_all_seeds_of_the_other(
    tmp_path: Path, capsys: Capture
) -> None:
    """Rank 2 is not called better than rank 1 by one of its seeds."""
    make_run(tmp_path / "a", lr=0.1, accuracy=0.66)
    for seed, accuracy in enumerate((0.69, 0.62, 0.63, 0.64, 0.65)):
        make_run(tmp_path / "b", lr=0.01, seed=seed, accuracy=accuracy)
    make_run(tmp_path / "b" / "copy", lr=0.01, seed=4, accuracy=0.65)
    collection = grouping.read_collection(tmp_path)
    ranking.rank(collection, None)
    best, second = collection.ranking
    assert len(best.runs) == 1
    assert second.difference is not None
    assert second.difference.value < 0
    assert second.is_tied
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    assert "B: " in said
    assert "(6 runs, finished)" in said
    assert "left out" not in said  # the copy counts once, and is of a configuration that B has
    assert "A lacks what the other has: seed 1, seed 2, seed 3, seed 4." in said
    assert "over seeds and the 500 test images together" in said


def test_halves_of_a_sweep_are_compared_over_what_both_have(
    tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    make_grid(tmp_path, seeds=2, images=200)
    make_run(tmp_path, optimizer="adam", activation="ELU", lr=0.1, images=200)
    monkeypatch.chdir(tmp_path)
    assert compare.main(["optimizer=adam", "optimizer=sgd"]) == 0
    said = capsys.readouterr().out
    assert "Means over the 6 configurations that both have" in said
    assert "Runs of configurations that only one of them has are left out: 1." in said
    assert "worse (p < 0.001)" in said
    folder = grouping.read_collection(tmp_path)
    sides = [
        [run for group in folder.select(w) for run in group.runs]
        for w in ("activation=ReLU, lr=.01", "activation=Tanh, lr=1e-2")
    ]
    found = comparison.compare(*sides)
    assert str(found).endswith("\n".join(found.sentences))
    assert "<td>B - A</td>" in found._repr_html_()
    assert {row["metric"] for row in found.table} >= {"validation accuracy", "test accuracy"}
    # Two cells of two seeds each: the residual of cells and seeds, with 3 degrees of freedom.
    samples = [g.sample("best_val_accuracy") for pair in found.cells for g in pair]
    deviation = contrasts.residual(samples)
    assert deviation is not None
    assert (deviation.degrees, deviation.paired) == (3, True)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: Folders) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    make_grid(folder, seeds=1, images=50)
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer=adam", "optimizer=rms"], "fits no configuration"),
        (["optimizer=adam", "lr=0.01"], "A and B overlap"),
        (["optimizer=adam", "optimzer=sgd"], "did you mean optimizer?"),
        (["optimizer=", "optimizer=sgd"], "it must be KEY=VALUE"),
        (["optimizer=adam,activation=ReLU,lr=0.01", "optimizer=sgd"], "name one of them"),
    ],
)
def test_words_that_choose_nothing_or_too_much(
    grid: Path, capsys: Capture, words: list[str], message: str
) -> None:
    assert compare.main([*words, "--in", str(grid)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_runs_on_other_pictures_are_no_seeds_and_no_pair(tmp_path: Path, capsys: Capture) -> None:
    """Equal labels do not make equal images; the checksums tell."""
    runs = []
    for seed, content in ((0, "a"), (1, "a"), (2, "b")):
        checksums = {"name": "cifar10", "train_images": content, "test_images": content}
        runs.append(make_run(tmp_path, seed=seed, summary={"dataset": checksums}))
    collection = grouping.read_collection(tmp_path)
    ranking.rank(collection, None)
    sizes = {group.dataset: len(group.runs) for group in collection.groups}
    assert sizes == {"cifar10 (1)": 2, "cifar10 (2)": 1}
    table = summary_csv(collection, test=False).splitlines()
    assert [row.partition(",")[0] for row in table] == ["dataset", "cifar10 (1)", "cifar10 (2)"]
    assert all(group.difference is None for group in collection.groups)
    assert any("2 different sets" in n and f"(those of {tmp_path}" in n for n in collection.notes)
    (tmp_path / "grid.png").touch()  # FOLDER/* names it too
    assert compare.main([str(tmp_path / "grid.png"), *(str(runs[i].path) for i in (0, 2))]) == 2
    assert "made on different pictures" in capsys.readouterr().err
    # An option that reads the same pictures in another way is no copy of the first.
    scaled = {"choices": {"dataset": "scaled"}, "summary": {"dataset": {"train_images": "a"}}}
    make_run(tmp_path / "scaled", **scaled)
    collection = grouping.read_collection(tmp_path)
    assert collection.values("dataset") == ["cifar10 (1)", "cifar10 (2)", "scaled (1)"]
