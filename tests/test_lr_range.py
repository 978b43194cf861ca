"""The learning-rate range test of `describe --lr-range`."""

from pathlib import Path

import numpy as np
import pytest
from tiny_runs import TINY, make, train

from cifar_lab import describe
from cifar_lab.analysis.lr_range import HIGHEST, LOWEST, range_test, smooth, suggest

STEPS = 25


def test_the_loss_is_smoothed_as_fastai_does_it() -> None:
    losses = np.random.default_rng(0).normal(2, 1, 40)
    expected, average = [], 0.0
    for count, loss in enumerate(losses, start=1):
        average = 0.98 * average + 0.02 * loss
        expected.append(average / (1 - 0.98**count))
    assert smooth(losses) == pytest.approx(expected)


def test_the_suggestion_is_where_the_loss_falls_most_steeply() -> None:
    rates = np.geomspace(LOWEST, HIGHEST, 400)
    falls = 1 / (1 + np.exp(3 * np.log10(rates / 0.01)))
    assert suggest(rates, falls) == pytest.approx(0.01, rel=0.05)
    assert suggest(rates, 1 - falls) is None
    assert suggest(rates[:4], falls[:4]) is None
    cliff_at_the_start = falls + 5 * (np.arange(400) < 20)
    assert suggest(rates, cliff_at_the_start) == pytest.approx(0.01, rel=0.05)


def test_the_steps_are_those_of_the_run_with_another_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR_LAB_DATA", str(tmp_path / "data"))
    options = ("optimizer=sgd", "training.step_history=true", "augmentation=crop_flip")
    run = train(tmp_path, *options, "training.epochs=1")
    found = range_test(run.read_config(), STEPS)
    assert found.losses[0] == pytest.approx(run.read_steps()[0].loss, rel=1e-6)
    assert found.rates[0] == LOWEST
    assert np.diff(np.log(found.rates)) == pytest.approx(np.log(HIGHEST / LOWEST) / (STEPS - 1))
    scheduled = make(
        tmp_path, *options, "scheduler=one_cycle", "scheduler.max_lr=0.1"
    ).read_config()
    assert range_test(scheduled, STEPS).losses == pytest.approx(found.losses)


@pytest.mark.slow
def test_describe_writes_the_figure_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CIFAR_LAB_DATA", str(tmp_path / "data"))
    out = tmp_path / "out"
    words = ["--lr-range", "--lr-steps", "50", *TINY, "optimizer=sgd", f"output_dir={out}"]
    assert describe.main(words) == 0
    (path,) = [path for path in out.rglob("*") if path.is_file()]
    assert path == out / "describe" / "digits_lr_range.png"
    printed = capsys.readouterr().out
    assert f"figure: {path}" in printed
    assert "suggestion: optimizer.lr=" in printed or "no suggestion" in printed
