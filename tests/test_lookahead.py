"""Lookahead: slow weights, against plain arithmetic, in a run, and resumed."""

from pathlib import Path

import pytest
import torch
from tiny_runs import StopAt, every_step, make, train
from torch import nn

from cifar_lab.config.identity import address
from cifar_lab.config.run_config import LookaheadConfig
from cifar_lab.errors import Stopped, UsageError
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.averages import Lookahead
from cifar_lab.training.preflight import compose_checked
from cifar_lab.training.run import run_experiment

ON = ["training.lookahead.every=4"]  # of 18 steps: the last one is not a multiple


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(run.last, weights_only=True)["model"]
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in other)


def test_slow_weights_follow_by_the_rule_of_the_paper() -> None:
    """Twelve steps of SGD and batch norm; every fifth returns, the twelfth ends on slow weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    lookahead = Lookahead(model, 5, LookaheadConfig(decay=0.8, ramp=2.0), 12)
    slow = {k: v.double() for k, v in model.state_dict().items()}
    for step in range(1, 13):
        optimizer.zero_grad()
        (model(torch.randn(6, 3)) * torch.randn(6, 4)).sum().backward()
        optimizer.step()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        lookahead.after_step(step)
        after = model.state_dict()
        if step in (5, 10):
            kept = 0.8 * (step / 12) ** 2
            slow = {k: kept * slow[k] + (1 - kept) * v.double() for k, v in before.items()}
        expected = slow if step in (5, 10, 12) else before
        for name, tensor in after.items():
            if name.endswith("num_batches_tracked"):
                assert tensor == step
            else:
                assert torch.allclose(tensor.double(), expected[name].double(), atol=1e-6), name
    assert not torch.equal(before["0.weight"], after["0.weight"])


def test_a_run_with_lookahead_ends_on_its_slow_weights(tmp_path: Path) -> None:
    plain = train(tmp_path, "training.epochs=1")
    run = train(tmp_path, "training.epochs=1", *ON)
    assert run.path != plain.path
    checkpoint = torch.load(run.last, weights_only=True)
    assert same(checkpoint["model"], checkpoint["lookahead"])
    assert not same(weights(run), weights(plain))
    assert "lookahead" not in torch.load(plain.last, weights_only=True)


def test_with_no_share_kept_the_bits_are_those_of_a_run_without(tmp_path: Path) -> None:
    line = ["training.epochs=1", "optimizer=sgd"]
    kept_nothing = ["training.lookahead.every=1", "training.lookahead.decay=0"]
    run = train(tmp_path, *line, *kept_nothing)
    assert same(weights(run), weights(train(tmp_path, *line)))


@pytest.mark.parametrize("steps", [6, 22])
def test_slow_weights_are_resumed_exactly(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every_step(monkeypatch)
    whole = train(tmp_path / "whole", *ON)
    run = make(tmp_path / "stopped", *ON)
    with pytest.raises(Stopped):
        run_experiment(run, stop=StopAt(steps))
    checkpoint = torch.load(run.last, weights_only=True)
    assert not same(checkpoint["model"], checkpoint["lookahead"])
    run_experiment(run)
    assert same(weights(run), weights(whole))


def test_a_checkpoint_without_slow_weights_resumes_from_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every_step(monkeypatch)
    run = make(tmp_path, *ON)
    with pytest.raises(Stopped):
        run_experiment(run, stop=StopAt(6))
    checkpoint = torch.load(run.last, weights_only=True)
    del checkpoint["lookahead"]
    run.write_last(checkpoint)
    assert run_experiment(run).status == "finished"


def test_settings_of_lookahead_are_checked_and_leave_other_addresses_alone() -> None:
    def one(*words: str) -> Path:
        return address(compose_checked(["dataset=digits", "device=cpu", *words]).runs[0].config)

    assert one("training.lookahead.every=null") == one()
    assert one("training.lookahead.every=5") != one()
    for wrong in ("every=0", "decay=1", "ramp=-1", "evry=5"):
        with pytest.raises(UsageError, match="lookahead"):
            one(f"training.lookahead.{wrong}")
