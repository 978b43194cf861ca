"""Cross-validation: the folds of a split, and settings whose runs are folds."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.model_selection import StratifiedKFold
from synthetic_runs import make_run
from tiny_runs import TINY

from cifar_lab.analysis import ranking, summary_tables, texts
from cifar_lab.analysis.grouping import read_collection
from cifar_lab.analysis.seed_groups import RunCollection
from cifar_lab.config.data_config import SplitConfig
from cifar_lab.config.identity import address
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.preflight import compose_checked
from cifar_lab.training.splits import split_indices

FOLDS = [line for line in TINY if not line.startswith("split.validation")]


def validated(labels: np.ndarray, folds: int, **settings: Any) -> list[np.ndarray]:
    """Return the validation images of each fold, after checking that all others train."""
    parts = []
    for fold in range(folds):
        split = SplitConfig(folds=folds, fold=fold, validation=1 / folds, **settings)
        training, validation, test = split_indices(split, labels, np.arange(7))
        assert np.array_equal(np.union1d(training, validation), np.arange(len(labels)))
        assert len(training) + len(validation) == len(labels)
        assert np.array_equal(test, np.arange(7))
        assert split.held_out(len(labels)) == len(validation)
        parts.append(validation)
    return parts


@pytest.mark.parametrize(("folds", "size"), [(2, 503), (5, 1000), (10, 503)])
def test_folds_are_balanced_as_those_of_scikit_learn(folds: int, size: int) -> None:
    shares = [0.35, 0.3, 0.2, 0.1, 0.05]
    labels = np.random.default_rng(size).choice(5, size=size, p=shares)
    parts = validated(labels, folds)
    assert sorted(np.concatenate(parts).tolist()) == list(range(size))
    counts = np.array([np.bincount(labels[part], minlength=5) for part in parts])
    splitter = StratifiedKFold(folds, shuffle=True, random_state=0)
    theirs = np.array(
        [np.bincount(labels[part], minlength=5) for _, part in splitter.split(labels, labels)]
    )
    for index in range(5):  # how many folds have how many images of a class
        assert Counter(counts[:, index]) == Counter(theirs[:, index])
    assert sorted(counts.sum(axis=1)) == sorted(theirs.sum(axis=1))


def test_a_fold_sets_the_share_and_shows_in_the_folders_name() -> None:
    (run,) = compose_checked([*FOLDS, "split.folds=3", "split.fold=1"]).runs
    assert run.config.split.validation == 1 / 3
    assert "-seed0-fold1-" in address(run.config).name
    (same,) = compose_checked(
        [*FOLDS, "split.folds=3", "split.fold=1", f"split.validation={1 / 3}"]
    ).runs
    assert address(same.config) == address(run.config)


def test_means_that_are_computed_do_not_tell_folds_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR_LAB_DATA", str(tmp_path / "data"))
    words = [*FOLDS, "split.folds=3", "dataset.mean=auto", f"output_dir={tmp_path}"]
    request = compose_checked([*words, "split.fold=0,1,2", "split.seed=2", "-m"])
    configs = [run.config for run in request.runs]
    assert len({str(config.dataset.mean) for config in configs}) == 3
    assert {tuple(config.dataset.computed) for config in configs} == {("mean",)}
    runs = [RunDir.create(config) for config in configs]
    (setting,) = read_collection(tmp_path).groups
    assert len(setting.runs) == 3
    (other,) = compose_checked([str(runs[0].path), "split.fold=1"]).runs
    assert other.config == configs[1]
    (asked,) = compose_checked([str(runs[0].path), "dataset.mean=[0.5]"]).runs
    assert asked.config.dataset.computed == []


def collection_of(folder: Path) -> RunCollection:
    collection = read_collection(folder)
    ranking.rank(collection, None)
    return collection


def make_folds(folder: Path, lr: float, accuracy: float, *, folds: int = 5, seed: int = 0) -> None:
    for fold in range(folds):
        split = {"folds": 5, "fold": fold, "validation": 0.2}
        shift = 0.01 * (fold - 2) + 0.002 * seed
        make_run(folder, lr=lr, seed=seed, accuracy=accuracy + shift, split=split)


def test_folds_of_a_setting_are_one_row_with_the_corrected_interval(tmp_path: Path) -> None:
    make_folds(tmp_path, 0.01, 0.7)
    collection = collection_of(tmp_path)
    (setting,) = collection.groups
    assert collection.axes == []
    found = setting.interval("best_val_accuracy")
    assert found is not None
    values = [run.summary.best_val_accuracy or 0.0 for run in setting.runs]
    assert found.n == 5
    assert found.mean == pytest.approx(np.mean(values))
    assert found.std == pytest.approx(np.std(values, ddof=1))
    half = stats.t.ppf(0.975, 4) * math.sqrt((1 / 5 + 1 / 4) * np.var(values, ddof=1))
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half))
    assert "mean of 5 folds and its 95 % interval" in texts.best_text(collection, setting)
    header, row = summary_tables.summary_csv(collection, test=False).splitlines()
    cells = dict(zip(header.split(","), row.split(","), strict=True))
    assert (cells["n"], cells["seeds"], cells["folds"]) == ("5", "0", "0 1 2 3 4")
    assert collection.notes == []


def test_folds_that_are_missing_and_seeds_among_them_are_noted(tmp_path: Path) -> None:
    make_folds(tmp_path, 0.01, 0.7)
    make_folds(tmp_path, 0.01, 0.7, seed=1)
    make_folds(tmp_path, 0.1, 0.6, folds=3)
    collection = collection_of(tmp_path)
    short, mixed = sorted(collection.groups, key=lambda setting: len(setting.runs))
    assert "its means are over 3 of 5 folds" in "\n".join(collection.notes)
    found = mixed.interval("best_val_accuracy")
    assert found is not None
    assert found.low is not None
    by_fold = [
        [r.summary.best_val_accuracy or 0 for r in mixed.runs if r.config.split.fold == fold]
        for fold in range(5)
    ]
    means = [sum(values) / len(values) for values in by_fold]
    half = stats.t.ppf(0.975, 4) * math.sqrt((1 / 5 + 1 / 4) * np.var(means, ddof=1))
    assert found.n == 10
    assert found.mean - found.low == pytest.approx(half)
    assert found.std == pytest.approx(np.std(means, ddof=1))
    assert "mean of 10 runs over 5 folds" in texts.best_text(collection, mixed)
    assert len(short.finished_folds) == 3
    (needed,) = texts.seeds_lines(collection, 1.0)  # folds do not tell how seeds vary
    assert "is not known: that takes runs that differ in their seed alone" in needed
