"""`training.monitor`: the score that decides best.pt, patience, a search and the ranking."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score
from synthetic_runs import make_run
from test_search import TINY as TINY_SEARCH
from test_search import search
from tiny_runs import StopAt, make, train

from cifar_lab.analysis import resume_proof
from cifar_lab.analysis.load_runs import FoundRun
from cifar_lab.analysis.ranking import rank
from cifar_lab.analysis.seed_groups import collect
from cifar_lab.errors import Stopped, UsageError
from cifar_lab.runs.checkpoints import load_checkpoint
from cifar_lab.runs.metrics import BY_CLASS, Predictions, scores_by_class
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.sweeps.search_report import closing_lines
from cifar_lab.sweeps.study import open_study
from cifar_lab.training.preflight import compose_checked
from cifar_lab.training.run import run_experiment

# With so large a learning rate the scores rise and fall, and their best epochs differ.
UNSTEADY = ("optimizer=sgd", "optimizer.lr=0.3", "training.epochs=12", "dropout=none")


@pytest.fixture(scope="module")
def by_f1(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return train(tmp_path_factory.mktemp("f1"), *UNSTEADY, "training.monitor=val_macro_f1")


def sklearns(found: Predictions) -> tuple[float, float]:
    return (
        float(balanced_accuracy_score(found.labels, found.predicted)),
        float(f1_score(found.labels, found.predicted, average="macro")),
    )


def column(run: RunDir, name: str) -> list[float]:
    return [getattr(row, name) for row in run.read_metrics()]


# --- the scores ------------------------------------------------------------------------------


def test_scores_by_class_are_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    labels = draw.choice(10, 2000, p=[0.5, 0.2, 0.1, *[0.2 / 7] * 7])
    predicted = np.where(draw.random(2000) < 0.6, labels, draw.integers(0, 10, 2000))
    assert scores_by_class(labels, predicted) == (
        balanced_accuracy_score(labels, predicted),
        f1_score(labels, predicted, average="macro"),
    )


def test_a_class_without_images_counts_only_where_it_is_predicted() -> None:
    labels, predicted = np.array([0, 0, 0, 1]), np.array([0, 0, 2, 1])
    balanced, macro_f1 = scores_by_class(labels, predicted)
    assert balanced == pytest.approx((2 / 3 + 1) / 2)
    assert macro_f1 == pytest.approx((0.8 + 1 + 0) / 3)


def test_the_best_epoch_is_that_of_the_monitored_score(by_f1: RunDir, tmp_path: Path) -> None:
    by_loss = train(tmp_path, *UNSTEADY, "training.monitor=val_loss")
    by_accuracy = train(tmp_path, *UNSTEADY)
    best = 1 + int(np.argmin(column(by_loss, "val_loss")))
    assert by_loss.read_summary().best_epoch == best
    assert by_loss.read_summary().best_val_loss == min(column(by_loss, "val_loss"))
    assert load_checkpoint(by_loss.best)["epoch"] == best
    best_accuracy = 1 + int(np.argmax(column(by_accuracy, "val_accuracy")))
    assert by_accuracy.read_summary().best_epoch == best_accuracy != best
    assert column(by_loss, "val_accuracy") == column(by_accuracy, "val_accuracy")
    summary = by_f1.read_summary()
    assert summary.best_epoch == 1 + int(np.argmax(column(by_f1, "val_macro_f1")))
    assert summary.best_val_macro_f1 == max(column(by_f1, "val_macro_f1"))


def test_the_columns_are_those_of_the_validation_predictions(by_f1: RunDir) -> None:
    row = by_f1.read_metrics()[(by_f1.read_summary().best_epoch or 0) - 1]
    found = by_f1.read_predictions("validation")
    assert (row.val_balanced_accuracy, row.val_macro_f1) == pytest.approx(sklearns(found))


def test_only_runs_that_monitor_a_score_by_class_have_its_columns(
    by_f1: RunDir, tmp_path: Path
) -> None:
    plain = train(tmp_path, "training.epochs=1")
    with plain.metrics_file.open() as file:
        assert file.readline() == (
            "epoch,learning_rate,train_loss,train_accuracy,val_loss,val_accuracy,seconds,"
            "images_per_second\n"
        )
    assert load_checkpoint(plain.last)["history"].shape == (1, 10)
    with by_f1.metrics_file.open() as file:
        assert file.readline().rstrip().endswith("images_per_second," + ",".join(BY_CLASS))
    assert load_checkpoint(by_f1.last)["history"].shape == (12, 12)
    assert by_f1.path.name != train(tmp_path, *UNSTEADY).path.name


# --- patience --------------------------------------------------------------------------------


@pytest.mark.parametrize("monitor", ["val_loss", "val_balanced_accuracy", "val_macro_f1"])
def test_patience_watches_the_monitored_score(monitor: str, tmp_path: Path) -> None:
    run = train(tmp_path, *UNSTEADY, f"training.monitor={monitor}", "training.patience=2")
    values = [-v if monitor == "val_loss" else v for v in column(run, monitor)]
    best = int(np.argmax(values))
    assert run.read_summary().stopped_early
    assert len(values) == best + 3, "two epochs after the best one"


# --- exact on resume -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("monitor", BY_CLASS)
def test_a_resumed_run_is_the_same(monitor: str, tmp_path: Path) -> None:
    run = make(tmp_path, f"training.monitor={monitor}", "training.patience=1", *UNSTEADY)
    assert "bit for bit" in resume_proof.prove(run.read_config(), tmp_path / "proof", stops=6)[-1]


def test_a_checkpoint_of_an_older_version_resumes(tmp_path: Path) -> None:
    """Its tables have ten columns, and its best epoch is that of the validation accuracy."""
    run = make(tmp_path, *UNSTEADY, "training.monitor=val_loss")
    with pytest.raises(Stopped):
        run_experiment(run, stop=StopAt(20))
    checkpoint = load_checkpoint(run.last)
    assert checkpoint["history"].shape[1] == 10
    rows = run.read_metrics()
    best = max(rows, key=lambda row: row.val_accuracy or 0.0)
    checkpoint["best"] = checkpoint["history"][best.epoch - 1 : best.epoch]
    run.write_best({**load_checkpoint(run.best), "epoch": best.epoch})
    torch.save(checkpoint, run.last)
    summary = run_experiment(run)
    for row in run.read_metrics()[len(rows) :]:
        if (row.val_loss or 0.0) < (best.val_loss or 0.0):
            best = row
    assert (summary.epochs, summary.best_epoch) == (12, best.epoch)


def test_a_run_goes_on_from_one_that_monitored_another_score(tmp_path: Path) -> None:
    first = train(tmp_path, "training.epochs=2")
    line = ("training.epochs=4", "training.patience=1", f"continue_from={first.path}")
    by_f1 = train(tmp_path, *line, "training.monitor=val_macro_f1")
    rows = by_f1.read_metrics()
    assert [row.val_macro_f1 is None for row in rows] == [True, True, False, False]
    best = max(rows[2:], key=lambda row: row.val_macro_f1 or 0.0)
    assert by_f1.read_summary().best_epoch == best.epoch
    back = train(tmp_path, "training.epochs=6", f"continue_from={by_f1.path}")
    assert [row.val_macro_f1 is None for row in back.read_metrics()] == [True, True] + [
        False
    ] * 2 + [True, True]


# --- search and ranking ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("monitor", "best"), [("val_loss", min), ("val_macro_f1", max)])
def test_a_search_optimizes_the_monitored_score(
    monitor: str, best: Callable[[Iterable[float]], float], tmp_path: Path
) -> None:
    options = ("training.epochs=2", f"training.monitor={monitor}", "search.trials=3")
    outcomes = search(tmp_path, *options)
    assert [o.after for o in outcomes] == ["finished"] * 3
    settings = compose_checked([*TINY_SEARCH, "-m", "search=optuna", "seed=0,1"]).options.search
    study = open_study(settings, tmp_path, monitor)
    values = {}
    for trial in study.trials:
        run = RunDir(next(iter(trial.user_attrs["runs"].values())))
        values[trial.number] = best(column(run, monitor))
        assert list(trial.intermediate_values.values()) == column(run, monitor)
        assert trial.value == values[trial.number]
    assert study.best_value == best(values.values())
    assert f"best by {monitor}: {study.best_value:.4f}" in closing_lines(settings, tmp_path)
    with pytest.raises(UsageError, match=f"begun with training.monitor={monitor}, which cannot"):
        search(tmp_path, "training.epochs=2", "search.trials=4")


def test_the_score_is_no_axis_of_a_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cifar_lab.train import main

    line = [*TINY_SEARCH, "-m", "search=optuna", f"output_dir={tmp_path}"]
    assert main([*line, "training.monitor=val_loss,val_accuracy"]) == 2
    assert "training.monitor is wrong as an axis of a search" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def ranked(runs: Sequence[RunDir], folder: Path) -> tuple[str, list[float], list[str]]:
    collection = collect(folder, [FoundRun(run) for run in runs])
    rank(collection, None)
    order = [setting.runs[0].config.optimizer["lr"] for setting in collection.ranking]
    return collection.metric, order, collection.notes


def test_settings_are_ranked_by_the_score_that_they_monitor(tmp_path: Path) -> None:
    def runs(folder: str, *monitors: str) -> list[RunDir]:
        return [
            make_run(
                tmp_path / folder,
                accuracy=accuracy,
                lr=lr,
                training={"monitor": monitor},
                summary={"best_val_loss": loss, "best_val_macro_f1": 1 - loss},
            )
            for monitor, accuracy, lr, loss in zip(
                monitors, (0.6, 0.7), (0.1, 0.2), (0.3, 0.5), strict=True
            )
        ]

    for monitor in ("val_loss", "val_macro_f1"):
        metric, order, notes = ranked(runs(monitor, monitor, monitor), tmp_path / monitor)
        assert (metric, order) == (f"best_{monitor}", [0.1, 0.2])
        assert not any("monitor" in note for note in notes)
    metric, order, notes = ranked(runs("mixed", "val_loss", "val_accuracy"), tmp_path / "mixed")
    assert (metric, order) == ("best_val_accuracy", [0.2, 0.1])
    assert any("The runs monitor different scores (val_accuracy, val_loss)" in n for n in notes)
