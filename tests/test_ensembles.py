"""Several runs as one classifier."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import copy_run, make, train

import cifar_lab
from cifar_lab import evaluate, predict
from cifar_lab.analysis import ensembles
from cifar_lab.runs.run_dir import RunDir


@pytest.fixture(scope="module")
def runs(tiny_finished: RunDir, tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    other = train(tmp_path_factory.mktemp("ensemble"), "seed=1", "training.epochs=1")
    third = copy_run(tiny_finished, tmp_path_factory.mktemp("third"))
    return [tiny_finished, other, third]


def expected_accuracy(runs: list[RunDir]) -> float:
    """The same with sums of softmax in plain numpy."""
    total = 0
    for run in runs:
        with np.load(run.path / "predictions.npz") as arrays:
            powers = np.exp(arrays["logits"].astype(np.float64))
            labels = arrays["labels"]
        total = total + powers / powers.sum(axis=1, keepdims=True)
    return float((np.argmax(total, axis=1) == labels).mean())


def test_evaluate_scores_the_mean_of_probabilities(
    runs: list[RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(run.path) for run in runs]
    assert evaluate.main([*paths, "--ensemble"]) == 0
    *members, last = capsys.readouterr().out.splitlines()
    assert len(members) == 3
    accuracy = expected_accuracy(runs)
    assert f"ensemble of 3 runs: test accuracy {accuracy:.2%}" in last
    found = cifar_lab.Runs(cifar_lab.load_run(path) for path in paths)
    assert found.test_accuracy == accuracy


def test_predict_takes_several_runs(
    runs: list[RunDir], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    picture = tmp_path / "a.png"
    Image.fromarray(pixels).save(picture)
    loaded = [cifar_lab.load_run(run.path) for run in runs]
    rows = cifar_lab.Runs(loaded).predict(picture, device="cpu")
    each = [run.predict(picture, device="cpu") for run in loaded]
    assert rows == pytest.approx((each[0] + each[1] + each[2]) / 3)
    assert predict.main([*(str(run.path) for run in runs), str(picture), "--top", "2"]) == 0
    header, first, _ = capsys.readouterr().out.splitlines()
    assert header.split() == ["picture", "class", "probability"]
    assert first.endswith(f"{100 * rows[0].max():.2f} %")


def refused(main: object, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2  # type: ignore[operator]
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return str(said.err)


def test_runs_that_cannot_be_averaged_are_refused_before_anything_is_written(
    runs: list[RunDir], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, config, summary = str(runs[0].path), runs[0].read_config(), runs[0].read_summary()
    other = RunDir.create(dataclasses.replace(config, output_dir=str(tmp_path), name="others"))
    classes = [{"class": str(i), "accuracy": 0.5} for i in range(9)]
    other.write_summary(dataclasses.replace(summary, per_class_accuracy=classes))
    assert "is given twice" in refused(evaluate.main, [first, first, "--ensemble"], capsys)
    assert "two runs or more" in refused(evaluate.main, [first, "--ensemble"], capsys)
    split = make(tmp_path, "split.source=test", "split.validation=100")
    split.write_summary(summary)
    message = refused(evaluate.main, [first, str(split.path), "--ensemble"], capsys)
    assert "is tested on other images than" in message
    data = dataclasses.replace(summary, dataset=summary.dataset | {"test_labels": "0"})
    other.write_summary(data)
    message = refused(evaluate.main, [first, str(other.path), "--ensemble"], capsys)
    assert "is tested on other images than" in message
    dataset = dataclasses.replace(config.dataset, classes=[f"no {i}" for i in range(10)])
    third = RunDir.create(dataclasses.replace(config, dataset=dataset, output_dir=str(tmp_path)))
    for main, more in ((evaluate.main, "--ensemble"), (predict.main, "x.png")):
        assert "has other classes than" in refused(main, [first, str(third.path), more], capsys)
    assert "there is no picture" in refused(predict.main, [first, first], capsys)


def test_images_are_matched_by_their_index(runs: list[RunDir], tmp_path: Path) -> None:
    mixed = RunDir.create(dataclasses.replace(runs[1].read_config(), output_dir=str(tmp_path)))
    found = runs[1].read_predictions()
    order = np.random.default_rng(0).permutation(len(found))
    shuffled = dataclasses.replace(
        found, logits=found.logits[order], labels=found.labels[order], indices=found.indices[order]
    )
    mixed.write_predictions(shuffled, "test", "scored")
    a, b = ensembles.mean_predictions(runs[:2]), ensembles.mean_predictions([runs[0], mixed])
    assert np.array_equal(a.logits, b.logits)
