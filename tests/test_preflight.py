"""The dry check takes a training step: settings that fail together are refused before a run."""

import dataclasses
from pathlib import Path

import pytest
from fixtures import Capture, Patch
from tiny_runs import TINY, make

from cifar_lab import train
from cifar_lab.config import targets
from cifar_lab.config.run_config import RunConfig
from cifar_lab.config.schema import OptimizerConfig
from cifar_lab.errors import UsageError
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training import preflight
from cifar_lab.training.preflight import check, compose_checked

RESULTS = Path(__file__).parents[1] / "docs" / "results"


@pytest.mark.parametrize("target", ["torch.optim.LBFGS", "torch.optim.SparseAdam"])
def test_an_optimizer_that_takes_no_plain_step_is_refused(target: str) -> None:
    config = compose_checked(TINY).runs[0].config
    other = dataclasses.replace(config, optimizer=OptimizerConfig(_target_=target, lr=0.1))
    with pytest.raises(UsageError, match="cannot take a training step"):
        check(other)


def test_a_schedule_as_long_as_the_run_is_accepted(tmp_path: Path) -> None:
    steps = 2 * 9  # two epochs of 537 images in batches of 64, 25 in the last
    make(tmp_path, "scheduler=one_cycle", f"scheduler.total_steps={steps}")


@pytest.mark.parametrize("name", ["s0_variants", "s2_plateau", "airbench_small"])
def test_a_kept_run_answers_with_its_address(name: str, capsys: Capture) -> None:
    """s0_variants continues from a folder that is not among the kept ones."""
    folder = next(path for path in (RESULTS / name).iterdir() if path.is_dir())
    assert train.main([str(folder), "plan=true"]) == 0
    assert folder.name in capsys.readouterr().out


LEAVES = """
import sys
from torch import nn

class Net(nn.Module):
    def __init__(self, image_shape, num_classes, where, **settings):
        super().__init__()
        if where == "built":
            sys.exit(0)

    def forward(self, images):
        sys.exit(0)
"""


@pytest.mark.parametrize("where", ["built", "used"])
def test_a_model_that_ends_the_process_is_refused(
    where: str, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    (tmp_path / "leaves.py").write_text(LEAVES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(targets, "_TRUSTED", set())
    model = ["model=two_branch", "dropout=none", "trust=[leaves]", "model._target_=leaves.Net"]
    assert train.main(["dataset=digits", "device=cpu", *model, f"+model.where={where}"]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert "model (leaves.Net" in message if where == "built" else "calls sys.exit" in message


def test_a_finished_run_answers_without_a_trial(finished: RunDir, monkeypatch: Patch) -> None:
    """It has shown that it can train; the first optimizer of a process takes seconds to import."""
    tried: list[RunConfig] = []

    def note(config: RunConfig) -> object:
        tried.append(config)
        return None

    monkeypatch.setattr(preflight, "_try_to_train", note)
    config = dataclasses.replace(finished.read_config(), output_dir=str(finished.path.parents[1]))
    assert check(config) == config
    assert tried == []
    check(config, rerun=True)
    assert len(tried) == 1
