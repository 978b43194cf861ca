"""The dry check takes a training step: settings that fail together are refused before a run."""

import dataclasses
from pathlib import Path

import pytest
from tiny_runs import TINY, make

from cifar_lab import evaluate, train
from cifar_lab.config.components import OptimizerConfig
from cifar_lab.errors import UsageError
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.preflight import check, compose_checked

RESULTS = Path(__file__).parents[1] / "docs" / "results"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["split.validation=1436"], "leaves 1 training image"),
        (["split.validation=1437"], "split.validation=1437 is wrong: it must be less than the"),
        (["optimizer.capturable=true"], "cannot take a training step"),
        (["scheduler=one_cycle", "scheduler.total_steps=1"], "scheduler.total_steps=1 is wrong"),
        (["device=meta"], "device"),
    ],
)
def test_a_request_that_would_fail_in_training_is_refused(
    overrides: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*TINY, f"output_dir={tmp_path / 'out'}", *overrides]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["torch.optim.LBFGS", "torch.optim.SparseAdam"])
def test_an_optimizer_that_takes_no_plain_step_is_refused(target: str) -> None:
    config = compose_checked(TINY).runs[0].config
    other = dataclasses.replace(config, optimizer=OptimizerConfig(_target_=target, lr=0.1))
    with pytest.raises(UsageError, match="cannot take a training step"):
        check(other)


def test_a_schedule_as_long_as_the_run_is_accepted(tmp_path: Path) -> None:
    steps = 2 * 9  # two epochs of 537 images in batches of 64, 25 in the last
    make(tmp_path, "scheduler=one_cycle", f"scheduler.total_steps={steps}")


def test_evaluate_refuses_a_device_that_is_none(
    tiny_finished: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(tiny_finished.path), "--device", "meta"]) == 2
    assert "device=meta is wrong" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["s0_variants", "s2_plateau", "airbench_small"])
def test_a_kept_run_answers_with_its_address(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """s0_variants continues from a folder that is not among the kept ones."""
    folder = next(path for path in (RESULTS / name).iterdir() if path.is_dir())
    assert train.main([str(folder), "plan=true"]) == 0
    assert folder.name in capsys.readouterr().out
