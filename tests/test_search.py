import contextlib
import dataclasses
import functools
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState
from synthetic_runs import make_run
from tiny_runs import assert_same_result, descendants

from cifar_lab.config.launch import Dimension, Request
from cifar_lab.errors import Damaged, UsageError
from cifar_lab.runs.run_dir import RunDir, find_runs
from cifar_lab.sweeps.cell import Cell
from cifar_lab.sweeps.outcome import Outcome
from cifar_lab.sweeps.search import closing_lines, make_launcher, run_search
from cifar_lab.sweeps.study import Trial, counted, open_study, open_trials, suggest
from cifar_lab.training.loop import Stop
from cifar_lab.training.preflight import compose_checked

TINY = ("dataset=digits", "figures=none", "model.widths=[2,4]", "model.hidden=8")
SPACE = ("optimizer.lr=tag(log,interval(1e-4,1e-1))", "optimizer=sgd,adam")


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """The journals of these tests need not survive a power cut."""
    monkeypatch.setattr("os.fsync", lambda _: None)


def search(folder: Path, *overrides: str, space: Sequence[str] = SPACE) -> list[Outcome]:
    request = compose_checked(
        [*TINY, "-m", "search=optuna", f"output_dir={folder}", *space, *overrides, "jobs=1"]
    )
    with Stop().installed() as stop:
        where = make_launcher({}, request.options)
        return run_search(request, folder, where, stop=stop)


@functools.cache
def request_of_a_search() -> Request:
    return compose_checked([*TINY, "-m", "search=optuna", *SPACE])


def study_of(folder: Path, seeds: int = 1) -> optuna.Study:
    options = dataclasses.replace(request_of_a_search().options.search, seeds=seeds)
    study: optuna.Study = open_study(options, folder, "val_accuracy")
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
        run = RunDir(trial.user_attrs["runs"]["0"])
        assert run.read_summary().best_val_accuracy == trial.value
        assert run.read_config().optimizer["lr"] == trial.params["optimizer.lr"]
        assert run.read_config().choices["optimizer"] == trial.params["optimizer"]
        assert "search" not in run.read_config().choices
    best = max(trials, key=lambda t: t.value or 0.0)
    lines = closing_lines(request_of_a_search(), tmp_path)
    assert best.user_attrs["runs"]["0"] in lines


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
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_search_over_seeds_killed_at_any_moment_goes_on_exactly(tmp_path: Path) -> None:
    options = ("search.seeds=3", "search.trials=3", "training.epochs=1")
    line = [sys.executable, "-m", "cifar_lab.train", *TINY, "-m", "search=optuna", *SPACE]
    line += [*options, "jobs=1"]
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    printed = subprocess.run(
        [*line, f"output_dir={calm}"], check=True, capture_output=True, text=True
    ).stdout
    chance = random.Random()
    for finished in sorted(chance.randrange(9) for _ in range(2)):
        process = subprocess.Popen([*line, f"output_dir={killed}"])
        while process.poll() is None and finished_runs(killed) < finished:
            time.sleep(0.1)
        time.sleep(chance.uniform(0, 1))
        cells = descendants(process.pid) if chance.random() < 0.5 else []
        for pid in [process.pid, *cells]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        print("killed after", finished, "runs")
    again = subprocess.run(
        [*line, f"output_dir={killed}"], check=True, capture_output=True, text=True
    ).stdout
    tables = [text[text.index("\ntrial ") :] for text in (printed, again)]
    assert tables[0] == tables[1].replace(str(killed), str(calm))
    studies = [study_of(folder / "runs" / ".search", seeds=3) for folder in (calm, killed)]
    told = [
        [(t.number, t.params, t.state, t.value, t.intermediate_values) for t in study.trials]
        for study in studies
    ]
    assert told[0] == told[1]
    names = sorted(run.path.name for run in find_runs(calm))
    assert names == sorted(run.path.name for run in find_runs(killed))
    for name in names:
        assert_same_result(RunDir(calm / "runs" / name), RunDir(killed / "runs" / name))
    for trial in studies[0].trials:
        runs = [RunDir(name) for name in trial.user_attrs["runs"].values()]
        assert [run.read_config().seed for run in runs if run.summary_file.exists()] == [0, 1, 2][
            : len(trial.intermediate_values)
        ]
        values = [run.read_summary().best_val_accuracy for run in runs if run.summary_file.exists()]
        assert trial.value == pytest.approx(statistics.fmean(v for v in values if v is not None))
    (fresh,) = (line for line in printed.splitlines() if line.startswith("  python -m"))
    assert fresh.endswith("seed=3,4,5,6,7")
    assert len(compose_checked(shlex.split(fresh)[3:]).runs) == 5


@pytest.mark.parametrize(
    ("accuracies", "state", "means"),
    [
        ((0.90, 0.50, 0.60), TrialState.PRUNED, [0.90, 0.70]),
        ((0.90, 0.80, 0.40), TrialState.COMPLETE, [0.90, 0.85, 0.70]),
        ((0.90, None), TrialState.FAIL, [0.90]),
    ],
)
def test_a_trial_is_pruned_by_the_running_mean_of_its_seeds_and_fails_with_one(
    tmp_path: Path, accuracies: Sequence[float | None], state: TrialState, means: list[float]
) -> None:
    study = study_of(tmp_path)
    for _ in range(5):
        study.add_trial(
            optuna.trial.create_trial(value=0.75, intermediate_values=dict.fromkeys((1, 2), 0.75))
        )
    ends = ["failed" if accuracy is None else "finished" for accuracy in accuracies]
    runs = [
        make_run(tmp_path, seed=seed, status=ends[seed], summary={"best_val_accuracy": accuracy})
        for seed, accuracy in enumerate(accuracies)
    ]
    cells = [Cell(run, run.read_config(), {}, "") for run in runs]
    trial = Trial(study, study.ask(), cells, ())
    seen = 0
    while trial.goes_on:
        assert trial.cell == cells[seen]
        trial.ended(Outcome(trial.cell, "new", ends[seen]))
        seen += 1
    told = study.trials[-1]
    assert told.state == state
    assert list(told.intermediate_values.values()) == pytest.approx(means)
    assert told.value == (None if state == TrialState.FAIL else pytest.approx(means[-1]))
    assert told.user_attrs["runs"] == {str(i): str(run.path) for i, run in enumerate(runs)}


def test_values_do_not_depend_on_when_a_search_was_continued(tmp_path: Path) -> None:
    request = request_of_a_search()
    space, options = request.space, request.options.search
    tried: dict[Path, list[dict[str, str]]] = {}
    for folder, is_reopened in ((tmp_path / "calm", False), (tmp_path / "killed", True)):
        study = study_of(folder)
        for number in range(14):  # of which the first ten are random
            trial = study.ask()
            if is_reopened:  # killed before the second value was drawn
                suggest(study, trial, space[:1], options)
                study = study_of(folder)
                (trial,) = open_trials(study)
            tried.setdefault(folder, []).append(suggest(study, trial, space, options))
            study.tell(trial, number / 20)
    one, other = tried.values()
    assert one == other
    assert len({values["optimizer.lr"] for values in one}) == 14


@pytest.mark.parametrize(
    ("words", "space", "message"),
    [
        (["search.seeds=3"], SPACE, r"begun with search.seeds=1, which cannot become 3"),
        ([], ["optimizer=sgd,adam,adamw"], "begun with other values of optimizer"),
    ],
)
def test_means_of_other_seeds_and_other_choices_need_another_study(
    words: list[str], space: Sequence[str], message: str, tmp_path: Path
) -> None:
    study = study_of(tmp_path)
    study.tell(study.ask({"optimizer": CategoricalDistribution(["sgd", "adam"])}), 0.5)
    with pytest.raises(UsageError, match=f"{message}: choose another"):
        search(tmp_path, *words, space=space)
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.slow
def test_a_setting_that_is_drawn_again_uses_up_no_trial(tmp_path: Path) -> None:
    options = ("training.epochs=1", "search.trials=9", "search.sampler=random")
    space = ("optimizer=sgd,adam", "activation=relu,tanh")
    outcomes = search(tmp_path, *options, space=space)
    assert [o.after for o in outcomes] == ["finished"] * 4
    study = study_of(tmp_path)
    assert len(counted(study)) == 4
    assert len({o.cell.run.path for o in outcomes}) == 4
    assert "4 trials (4 complete)" in closing_lines(request_of_a_search(), tmp_path)
    repeated = next(t for t in study.trials if "repeats" in t.user_attrs)
    assert repeated.value == study.trials[repeated.user_attrs["repeats"]].value


def finished_runs(folder: Path) -> int:
    return sum(run.status == "finished" for run in find_runs(folder)) if folder.is_dir() else 0


def test_a_journal_that_was_cut_short_is_repaired(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    space: dict[str, BaseDistribution] = {"optimizer": CategoricalDistribution(["sgd", "adam"])}
    for _ in range(3):
        study.tell(study.ask(space), 0.5)
    (journal,) = tmp_path.glob("*.journal")
    journal.write_bytes(journal.read_bytes()[:-9])
    again = study_of(tmp_path)
    assert [t.state.name for t in again.trials] == ["COMPLETE", "COMPLETE", "RUNNING"]
    again.tell(again.ask(space), 0.5)
    assert len(study_of(tmp_path).trials) == 4


def test_a_journal_that_is_damaged_or_a_link_is_not_written(tmp_path: Path) -> None:
    """In a stranger's folder a link could lead to any file of the user."""
    journal, gold = tmp_path / "search.journal", tmp_path / "gold"
    journal.write_bytes(b"\x00\xff\xfe\n")
    with pytest.raises(Damaged, match=r"search.journal is damaged: .* choose another"):
        study_of(tmp_path)
    journal.unlink()
    gold.write_text("gold")
    journal.symlink_to(gold)
    with pytest.raises(Damaged, match=r"search.journal is not a file of its own"):
        study_of(tmp_path)
    assert gold.read_text() == "gold"


def test_hydras_grammar_becomes_a_space() -> None:
    space = (
        "optimizer.lr=tag(log,interval(1e-5,1e-1))",
        "optimizer=choice(sgd,adam)",
        "training.epochs=range(2,9,2)",
        "model.hidden=int(interval(8,64))",
    )
    request = compose_checked([*TINY, "-m", "search=optuna", *space])
    assert list(request.space) == [
        Dimension("optimizer.lr", low=1e-5, high=1e-1, log=True),
        Dimension("optimizer", choices=("sgd", "adam")),
        Dimension("training.epochs", low=2, high=8, step=2, whole=True),
        Dimension("model.hidden", low=8, high=64, step=1, whole=True),
    ]
    assert request.fixed == TINY
