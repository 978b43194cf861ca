"""`training.monitor`: the score that decides best.pt, patience, a search and the ranking."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score
from synthetic_runs import make_run
from test_search import TINY as TINY_SEARCH
from test_search import search
from tiny_runs import train

from cifar_lab.analysis.grouping import collect
from cifar_lab.analysis.load_runs import FoundRun
from cifar_lab.analysis.ranking import rank
from cifar_lab.errors import UsageError
from cifar_lab.runs.files import load_checkpoint
from cifar_lab.runs.metrics import BY_CLASS, scores_by_class
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.sweeps.search import closing_lines
from cifar_lab.sweeps.study import open_study
from cifar_lab.training.preflight import compose_checked

# With so large a learning rate the scores rise and fall, and their best epochs differ.
UNSTEADY = (
    *("optimizer=sgd", "optimizer.lr=0.3", "dropout=none", "split.validation=1300"),
    *("training.epochs=8", "training.patience=3", "training.print_every=1"),
)


@pytest.fixture(scope="module")
def by_f1(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return train(tmp_path_factory.mktemp("f1"), *UNSTEADY, "training.monitor=val_macro_f1")


@pytest.fixture(scope="module")
def by_loss(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return train(tmp_path_factory.mktemp("loss"), *UNSTEADY, "training.monitor=val_loss")


def column(run: RunDir, name: str) -> list[float]:
    return [getattr(row, name) for row in run.read_metrics()]


def test_scores_by_class_are_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    labels = draw.choice(10, 2000, p=[0.5, 0.2, 0.1, *[0.2 / 7] * 7])
    predicted = np.where(draw.random(2000) < 0.6, labels, draw.integers(0, 10, 2000))
    assert scores_by_class(labels, predicted) == (
        balanced_accuracy_score(labels, predicted),
        f1_score(labels, predicted, average="macro"),
    )


def test_the_monitored_score_decides_the_best_epoch_and_patience(
    by_f1: RunDir, by_loss: RunDir
) -> None:
    for run, monitor, sign in ((by_f1, "val_macro_f1", 1), (by_loss, "val_loss", -1)):
        values = column(run, monitor)
        best = int(np.argmax(np.multiply(sign, values)))
        summary = run.read_summary()
        assert summary.best_epoch == best + 1
        assert getattr(summary, f"best_{monitor}") == values[best]
        assert load_checkpoint(run.best)["epoch"] == best + 1
        assert len(values) == min(8, best + 4), "three epochs after the best one"
        assert summary.stopped_early == (len(values) < 8)
    assert by_loss.read_summary().stopped_early
    assert int(np.argmax(column(by_loss, "val_accuracy"))) != best, "the scores are unlike"
    both = min(len(column(by_f1, "val_loss")), len(column(by_loss, "val_loss")))
    assert column(by_f1, "val_loss")[:both] == column(by_loss, "val_loss")[:both]


def test_only_runs_that_monitor_a_score_by_class_have_its_columns(
    by_f1: RunDir, by_loss: RunDir
) -> None:
    for run, more in ((by_loss, []), (by_f1, list(BY_CLASS))):
        columns = run.metrics_file.read_text().splitlines()[0].split(",")
        assert columns[8:] == more
        assert load_checkpoint(run.last)["history"].shape[1] == 10 + len(more)
    assert columns[:4] == ["epoch", "learning_rate", "train_loss", "train_accuracy"]
    assert columns[4:8] == ["val_loss", "val_accuracy", "seconds", "images_per_second"]
    row = by_f1.read_metrics()[(by_f1.read_summary().best_epoch or 0) - 1]
    found = by_f1.read_predictions("validation")
    scores = scores_by_class(found.labels, found.predicted)
    assert (row.val_balanced_accuracy, row.val_macro_f1) == pytest.approx(scores)
    assert by_f1.path.name != by_loss.path.name


def test_a_run_goes_on_from_one_that_monitored_another_score(
    tiny_finished: RunDir, tmp_path: Path
) -> None:
    line = ("training.epochs=4", "training.patience=1", f"continue_from={tiny_finished.path}")
    on = train(tmp_path, *line, "training.monitor=val_macro_f1")
    rows = on.read_metrics()
    assert [row.val_macro_f1 is None for row in rows] == [True, True, False, False]
    best = max(rows[2:], key=lambda row: row.val_macro_f1 or 0.0)
    assert on.read_summary().best_epoch == best.epoch
    line = ("training.epochs=5", "training.monitor=val_accuracy", f"continue_from={on.path}")
    back = train(tmp_path, *line).read_metrics()
    assert [row.val_macro_f1 is None for row in back] == [True, True, False, False, True]


@pytest.mark.slow
def test_a_search_optimizes_the_monitored_score(tmp_path: Path) -> None:
    options = ("training.epochs=2", "training.monitor=val_loss", "search.trials=3")
    assert [outcome.after for outcome in search(tmp_path, *options)] == ["finished"] * 3
    request = compose_checked([*TINY_SEARCH, *options, "-m", "search=optuna", "seed=0,1"])
    study = open_study(request.options.search, tmp_path, "val_loss")
    for trial in study.trials:
        losses = column(RunDir(next(iter(trial.user_attrs["runs"].values()))), "val_loss")
        assert list(trial.intermediate_values.values()) == losses
        assert trial.value == min(losses)
    assert study.best_value == min(trial.value or 0.0 for trial in study.trials)
    assert f"best by val_loss: {study.best_value:.4f}" in closing_lines(request, tmp_path)
    with pytest.raises(UsageError, match=r"begun with training\.monitor=val_loss, which cannot"):
        search(tmp_path, "training.epochs=2", "search.trials=4")


def ranked(runs: Sequence[RunDir], folder: Path) -> tuple[str, list[float], list[str]]:
    collection = collect(folder, [FoundRun(run) for run in runs])
    rank(collection, None)
    order = [setting.runs[0].config.optimizer["lr"] for setting in collection.ranking]
    return collection.metric, order, collection.notes


def test_settings_are_ranked_by_the_score_that_they_monitor(tmp_path: Path) -> None:
    def runs(folder: str, *monitors: str) -> list[RunDir]:
        made = []
        for monitor, accuracy, lr, loss in zip(
            monitors, (0.6, 0.7), (0.1, 0.2), (0.3, 0.5), strict=True
        ):
            training, place = {"monitor": monitor}, tmp_path / folder
            made += [make_run(place, accuracy=accuracy, lr=lr, training=training)]
            rows = made[-1].read_metrics()
            rows = [replace(row, val_loss=loss, val_macro_f1=1 - loss) for row in rows]
            made[-1].rewrite_metrics(rows)
        return made

    for monitor in ("val_loss", "val_macro_f1"):
        metric, order, notes = ranked(runs(monitor, monitor, monitor), tmp_path / monitor)
        assert (metric, order) == (f"best_{monitor}", [0.1, 0.2])
        assert not any("monitor" in note for note in notes)
    metric, order, notes = ranked(runs("mixed", "val_loss", "val_accuracy"), tmp_path / "mixed")
    assert (metric, order) == ("best_val_accuracy", [0.2, 0.1])
    assert any("The runs monitor different scores (val_accuracy, val_loss)" in n for n in notes)
