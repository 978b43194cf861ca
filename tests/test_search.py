import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from cifar_lab.door import Dimension, compose
from cifar_lab.errors import RequestError
from cifar_lab.execute import Stop
from cifar_lab.planning import SweepCell, sweep_cells
from cifar_lab.run_dir import RunDir
from cifar_lab.search import _study, closing_lines, run_search
from cifar_lab.sweep import Outcome
from cifar_lab.train import main

TINY = ("dataset=digits", "figures=none", "model.widths=[2,4]", "model.hidden=8")
SPACE = ("optimizer.lr=tag(log,interval(1e-4,1e-1))", "optimizer=sgd,adam")


@pytest.fixture(scope="module", autouse=True)
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFAR_LAB_DATA", str(tmp_path_factory.mktemp("data")))
        yield


def search(folder: Path, *overrides: str, space: Sequence[str] = SPACE) -> list[Outcome]:
    request = compose(
        [*TINY, "-m", "search=optuna", f"output_dir={folder}", *space, *overrides, "jobs=1"]
    )

    def cell_of(lines: Sequence[str]) -> SweepCell:
        return sweep_cells([compose([*request.fixed, *lines]).cells[0].config])[0]

    with Stop().installed() as stop:
        return run_search(request.space, cell_of, request.options.search, folder, stop=stop, jobs=1)


def study_of(folder: Path) -> optuna.Study:
    study: optuna.Study = _study(
        compose([*TINY, "-m", "search=optuna", *SPACE]).options.search, folder
    )
    return study


@pytest.mark.slow
def test_a_trial_is_a_run_folder_and_a_larger_number_goes_on(tmp_path: Path) -> None:
    options = ("training.epochs=1", "search.sampler=random")
    first = search(tmp_path, *options, "search.trials=2")
    assert [o.after for o in first] == ["finished"] * 2
    assert not search(tmp_path, *options, "search.trials=2")
    more = search(tmp_path, *options, "search.trials=3")
    assert len(more) == 1
    trials = study_of(tmp_path).trials
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 3
    assert len({t.params["optimizer.lr"] for t in trials}) == 3
    for trial in trials:
        run = RunDir(trial.user_attrs["folder"])
        assert run.read_summary().best_val_accuracy == trial.value
        assert run.config.optimizer["lr"] == trial.params["optimizer.lr"]
        assert run.config.choices["optimizer"] == trial.params["optimizer"]
        assert "search" not in run.config.choices
    best = max(trials, key=lambda t: t.value or 0.0)
    lines = closing_lines(compose([*TINY, "-m", "search=optuna", *SPACE]).options.search, tmp_path)
    assert best.user_attrs["folder"] in lines


@pytest.mark.slow
def test_a_trial_behind_the_others_is_pruned_and_saved(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    for _ in range(5):
        study.add_trial(
            optuna.trial.create_trial(
                params={"optimizer.lr": 1e-3, "optimizer": "adam"},
                distributions={
                    "optimizer.lr": FloatDistribution(1e-4, 1e-1, log=True),
                    "optimizer": CategoricalDistribution(["sgd", "adam"]),
                },
                intermediate_values=dict.fromkeys(range(1, 500), 0.999),
                value=0.999,
            )
        )
    (outcome,) = search(tmp_path, "training.epochs=500", "search.trials=6")
    assert (outcome.after, outcome.code) == ("pruned", 0)
    assert study_of(tmp_path).trials[-1].state == TrialState.PRUNED
    assert outcome.cell.run.status == "interrupted"
    assert 2 <= outcome.cell.epochs_done() < 500


@pytest.mark.slow
def test_a_trial_that_was_stopped_goes_on_in_the_next_search(tmp_path: Path) -> None:
    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("runs/*/last.pt")) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    options = ("training.epochs=12", "search.trials=1")
    (stopped,) = search(tmp_path, *options)
    assert stopped.after == "interrupted"
    assert study_of(tmp_path).trials[0].state == TrialState.RUNNING
    (outcome,) = search(tmp_path, *options)
    assert outcome.cell.run.path == stopped.cell.run.path
    assert (outcome.before, outcome.after) == ("interrupted", "finished")
    (trial,) = study_of(tmp_path).trials
    assert trial.state == TrialState.COMPLETE
    assert len(trial.intermediate_values) == 12


@pytest.mark.slow
def test_a_trial_that_fails_is_told_so(tmp_path: Path) -> None:
    diverging = ("optimizer.lr=interval(1e30,2e30)",)
    options = ("search.trials=1", "training.epochs=1", "optimizer=sgd")
    (outcome,) = search(tmp_path, *options, space=diverging)
    assert (outcome.after, outcome.code) == ("failed", 1)
    assert study_of(tmp_path).trials[0].state == TrialState.FAIL


def test_a_search_of_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "search=optuna"]) == 2
    assert "search=optuna has nothing to choose: add -m" in capsys.readouterr().err


def test_hydras_grammar_becomes_a_space() -> None:
    space = (
        "optimizer.lr=tag(log,interval(1e-5,1e-1))",
        "optimizer=choice(sgd,adam)",
        "training.epochs=range(2,9,2)",
        "model.hidden=int(interval(8,64))",
        "dropout.dense=interval(0,0.5)",
    )
    request = compose([*TINY, "-m", "search=optuna", *space])
    assert list(request.space) == [
        Dimension("optimizer.lr", low=1e-5, high=1e-1, log=True),
        Dimension("optimizer", choices=("sgd", "adam")),
        Dimension("training.epochs", low=2, high=8, step=2, whole=True),
        Dimension("model.hidden", low=8, high=64, step=1, whole=True),
        Dimension("dropout.dense", low=0, high=0.5),
    ]
    assert request.fixed == TINY


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["-m", "optimizer.lr=interval(0,1)"], "add search=optuna"),
        (["-m", "search=optuna", "model.hidden=interval(8,64)"], "must be a whole number"),
        (["-m", "search=optuna", "optimizer.lr=interval(2,1)"], "goes upwards"),
        (["-m", "search=optuna", "optimizer=sgd,adamm"], "did you mean adam"),
        (["-m", "search=optuna", "optimizer.lr=glob(*)"], "a search takes lists"),
        (["search=optunaa"], "did you mean optuna"),
    ],
)
def test_a_wrong_search_is_refused_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        compose([*TINY, *overrides])
    assert "\n" not in str(refused.value)
