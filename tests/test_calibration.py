import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from synthetic_runs import make_run

from cifar_lab.analysis import run_metrics
from cifar_lab.figures import reliability, style
from cifar_lab.figures.reliability import Calibration, calibration
from cifar_lab.runs.metrics import Predictions
from cifar_lab.runs.run_dir import RunDir


def guo(predictions: Predictions, bins: int = 15) -> float:
    """The error as Guo et al. published it: ECELoss of github.com/gpleiss/temperature_scaling."""
    boundaries = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    logits = torch.from_numpy(predictions.logits).double()
    confidences, guesses = torch.softmax(logits, dim=1).max(1)
    accuracies = guesses.eq(torch.from_numpy(predictions.labels))
    ece = torch.zeros(1, dtype=torch.float64)
    for lower, upper in itertools.pairwise(boundaries):
        in_bin = confidences.gt(lower) * confidences.le(upper)
        if in_bin.any():
            accuracy = accuracies[in_bin].double().mean()
            ece += (confidences[in_bin].mean() - accuracy).abs() * in_bin.double().mean()
    return float(ece)


def found(predictions: Predictions, bins: int = 15) -> Calibration:
    result = calibration(predictions, bins)
    assert result is not None
    return result


def heights(axes: Axes) -> list[float]:
    return [bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)]


@pytest.mark.parametrize(("classes", "bins"), [(2, 1), (10, 10), (1000, 15)])
def test_the_error_is_that_of_its_authors_code(classes: int, bins: int) -> None:
    draw = np.random.default_rng([classes, bins])
    logits = draw.normal(0, 3, (2000, classes)).astype(np.float32)
    labels = np.where(draw.random(2000) < 0.6, logits.argmax(1), draw.integers(0, classes, 2000))
    predictions = Predictions(logits, labels, np.arange(2000))
    result = found(predictions, bins)
    assert result.error == pytest.approx(guo(predictions, bins), abs=1e-12)
    assert result.counts.sum() == 2000
    confidence = predictions.probabilities.max(axis=1).mean()
    assert result.overconfidence == pytest.approx(confidence - predictions.accuracy)


def test_outputs_of_a_model_that_ends_with_a_softmax_are_its_probabilities() -> None:
    probabilities = np.array([[0.95, 0.05], [0.65, 0.35]], dtype=np.float32)
    result = found(Predictions(probabilities, np.array([0, 1]), np.arange(2)))
    assert result.confidence.sum() == pytest.approx(0.95 + 0.65)


def test_nothing_is_said_of_no_images_and_of_a_network_that_diverged() -> None:
    empty = Predictions(np.zeros((0, 3), np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64))
    diverged = Predictions(np.full((2, 3), np.nan, np.float32), np.zeros(2, np.int64), np.arange(2))
    assert calibration(empty) is None
    assert calibration(diverged) is None


def test_a_run_states_the_error_of_its_test_predictions(tiny_finished: RunDir) -> None:
    stated = tiny_finished.read_summary().expected_calibration_error
    assert stated == pytest.approx(guo(tiny_finished.read_predictions()), abs=1e-12)
    assert run_metrics.show("expected_calibration_error", stated).endswith(" %")
    assert run_metrics.is_test("expected_calibration_error")


def test_the_diagram_shows_share_confidence_and_images_of_each_bin(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    result = found(run.read_predictions())
    upper, lower = reliability.draw(run).axes
    filled = result.counts > 0
    assert heights(upper) == pytest.approx(list(result.right[filled] / result.counts[filled]))
    (marks,) = [line for line in upper.lines if line.get_color() == style.VERMILLION]
    across = np.asarray(marks.get_xdata())
    assert across == pytest.approx(result.confidence[filled] / result.counts[filled])
    assert heights(lower) == result.counts.tolist()
    title = reliability.draw(run).get_suptitle().replace("\n", " ")
    assert f"expected calibration error {100 * result.error:.2f} %" in title
