"""The page of a run's mistakes, and the labels that several runs contradict."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from fixtures import Capture
from PIL import Image
from synthetic_runs import dataset_config, make_run
from tiny_runs import copy_run

from cifar_lab import evaluate
from cifar_lab.analysis.ensembles import confident_mistakes, error_page, label_errors
from cifar_lab.runs.metrics import Predictions
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.build import load_splits


@pytest.fixture
def runs(tiny_finished: RunDir, tmp_path: Path) -> list[RunDir]:
    return [copy_run(tiny_finished, tmp_path / f"outputs{number}") for number in range(2)]


def noisy_runs(count: int, *, seed: int = 0) -> tuple[list[Predictions], set[int]]:
    """Runs that know the classes of 400 images, 12 of which have a wrong label; their indices."""
    draw = np.random.default_rng(seed)
    classes = draw.integers(0, 5, 400)
    indices = draw.permutation(1000)[:400]
    wrong = draw.choice(400, 12, replace=False)
    labels = classes.copy()
    labels[wrong] = (classes[wrong] + draw.integers(1, 5, 12)) % 5
    found = []
    for _ in range(count):
        logits = draw.normal(0, 0.3, (400, 5))
        logits[np.arange(400), classes] += draw.uniform(4.5, 5.5, 400)
        order = draw.permutation(400)  # a run keeps the images in an order of its own
        arrays = logits.astype(np.float32)[order], labels[order], indices[order]
        found.append(Predictions(*arrays))
    return found, {int(index) for index in indices[wrong]}


def test_wrong_labels_are_found_and_come_first() -> None:
    predictions, planted = noisy_runs(3)
    suspects = label_errors(predictions)
    found = {one.index for one in suspects}
    assert found <= planted
    assert len(found) >= 10
    margins = [one.p_guess - one.p_label for one in suspects]
    assert margins == sorted(margins, reverse=True)
    assert all(one.runs in (2, 3) and one.guess != one.label for one in suspects)


def test_mistakes_are_ordered_by_confidence() -> None:
    (predictions,), _ = noisy_runs(1)
    found = confident_mistakes(predictions, 5)
    wrong = predictions.predicted != predictions.labels
    sure = predictions.probabilities.max(axis=1)
    assert [one.p_guess for one in found] == pytest.approx(sorted(sure[wrong])[::-1][:5])
    for one in found:
        (place,) = np.flatnonzero(predictions.indices == one.index)
        assert (one.label, one.guess) == (predictions.labels[place], predictions.predicted[place])
        assert one.p_label == pytest.approx(predictions.probabilities[place, one.label])


def pictures(page: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in found]


def test_evaluate_writes_the_mistakes_of_a_run_as_a_page(
    runs: list[RunDir], capsys: Capture
) -> None:
    assert evaluate.main([str(runs[0].path), "--errors", "3"]) == 0
    path = runs[0].path / "errors.html"
    assert f"mistakes: {path}" in capsys.readouterr().out
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|<script", page)
    found = confident_mistakes(runs[0].read_predictions(), 3)
    images = load_splits(runs[0].read_config(), "cpu").official_test.images
    for shown, mistake in zip(pictures(page), found, strict=True):
        assert np.array_equal(shown, images[mistake.index][0].numpy())
        assert f"test image {mistake.index:,}<" in page
    assert "Likely label errors" not in page


def test_several_runs_have_one_page_with_likely_label_errors(
    runs: list[RunDir], capsys: Capture
) -> None:
    paths = [str(run.path) for run in runs]
    assert evaluate.main([*paths, "--errors", "2"]) == 0
    path = runs[0].path.parents[2] / "errors.html"  # in the folder that holds both
    assert f"mistakes: {path}" in capsys.readouterr().out
    page = path.read_text(encoding="utf-8")
    assert "Not looked for: the runs are right on" in page  # they are hardly better than chance
    titles = re.findall("<h2>(.+?)</h2>", page)
    assert titles[0] == "Likely label errors"
    assert titles[1:] == [f"Most confident mistakes of {run.path.name}" for run in runs]


def test_names_of_classes_are_text_and_never_markup(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", *"bcdefghij"]
    run = make_run(tmp_path, dataset=dataset_config(classes=names))
    page = error_page([run], lambda _: np.zeros((3, 32, 32), np.uint8), 400)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
