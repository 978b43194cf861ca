"""The learning-rate range test of `describe --lr-range`."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import TINY, make, train

from cifar_lab import describe
from cifar_lab.analysis.lr_range import HIGHEST, LOWEST, RangeTest, advise, range_test, smooth

STEPS = 25


def test_the_smoothed_loss_does_not_lag_and_has_no_bias_at_its_ends() -> None:
    rates = np.geomspace(LOWEST, HIGHEST, 300)
    falls = 1 / (1 + np.exp(6 * np.log10(rates / 0.01)))
    half = rates[np.flatnonzero(smooth(falls) < 0.5)[0]]
    assert half == pytest.approx(0.01, rel=0.1)
    assert smooth(np.full(300, 2.3)) == pytest.approx(np.full(300, 2.3))


def test_the_suggestion_lies_where_the_loss_falls_and_well_below_where_it_rises() -> None:
    rates = np.geomspace(LOWEST, HIGHEST, 300)
    falls = 2.3 - 1.5 / (1 + np.exp(-6 * np.log10(rates / 0.01))) + (rates / 0.5) ** 2
    advice = advise(rates, falls)
    assert advice is not None
    assert 1e-3 < advice.low < advice.suggestion < advice.high / 2 < 0.1
    assert advice.fall == pytest.approx(0.6, abs=0.1)
    assert advise(rates, 2.3 + rates) is None
    hardly = RangeTest(rates, falls, falls, dataclasses.replace(advice, fall=0.02))
    assert "warning: the loss fell by 2% only" in hardly.lines()[-1]


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
    words = ["--lr-range", *TINY, "optimizer=sgd", f"output_dir={out}"]
    assert describe.main(words) == 0
    (path,) = [path for path in out.rglob("*") if path.is_file()]
    assert path == out / "describe" / "digits_lr_range.png"
    printed = capsys.readouterr().out
    assert f"figure: {path}" in printed
    assert "suggestion: optimizer.lr=" in printed
