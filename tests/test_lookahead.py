"""Lookahead: slow weights, against plain arithmetic, in a run, and resumed."""

from pathlib import Path

import pytest
import torch
from tiny_runs import StopIn, make, train, weights
from torch import nn

from cifar_lab.config.run_config import LookaheadConfig
from cifar_lab.errors import Stopped
from cifar_lab.optimizers.averages import Lookahead
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.run import run_experiment

ON = ["training.lookahead.every=4"]  # of 18 steps: the last one is not a multiple


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


def test_with_no_share_kept_the_bits_are_those_of_a_run_without(
    tmp_path: Path, tiny_finished: RunDir
) -> None:
    run = train(tmp_path, "training.lookahead.every=1", "training.lookahead.decay=0")
    assert same(weights(run), weights(tiny_finished))


def test_a_run_ends_on_its_slow_weights_and_begins_them_anew_where_they_are_lost(
    tmp_path: Path, tiny_finished: RunDir
) -> None:
    """That they are resumed exactly is shown in test_resume.py."""
    run = make(tmp_path, *ON, "training.print_every=1")
    with pytest.raises(Stopped):
        run_experiment(run, stop=StopIn("train", 1, 6))
    checkpoint = torch.load(run.last, weights_only=True)
    assert not same(checkpoint["model"], checkpoint["lookahead"])
    del checkpoint["lookahead"]
    run.write_last(checkpoint)
    assert run_experiment(run).status == "finished"
    assert run.path.name != tiny_finished.path.name
    checkpoint = torch.load(run.last, weights_only=True)
    assert same(checkpoint["model"], checkpoint["lookahead"])
    assert not same(weights(run), weights(tiny_finished))
    assert "lookahead" not in torch.load(tiny_finished.last, weights_only=True)
