"""Muon against torch's own and an exact polar factor, its groups, and its runs."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TINY, train
from torch import nn

from cifar_lab.models.airbench import Airbench
from cifar_lab.optimizers.muon import Muon, orthogonalize
from cifar_lab.runs.provenance import code_version
from cifar_lab.training.build import build_model
from cifar_lab.training.preflight import compose_checked

MUON = ["optimizer=muon", "scheduler=linear"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_matrices_move_as_with_torchs_own_muon(precision: Any) -> None:
    """Torch's is for one matrix at a time, in bf16, and weighs the momentum by 1 - momentum."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((8, 24), (8, 24), (30, 6))]
    theirs = copy.deepcopy(ours)
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}
    mine = Muon(ours, ns_precision=precision, **settings)
    other = torch.optim.Muon(theirs, **settings)
    for _ in range(6):
        for one, two in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            two.grad = one.grad.clone()
        mine.step()
        other.step()  # type: ignore[no-untyped-call]
    for one, two in zip(ours, theirs, strict=True):
        assert torch.linalg.norm(one - two) < 0.02 * torch.linalg.norm(two)


def test_a_convolution_is_a_matrix_whose_rows_can_be_normalized() -> None:
    """By the rule of airbench94_muon: scaled to the norm sqrt(rows), then one step of length lr."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))
    before, gradient = weight.detach().clone(), torch.randn(4, 3, 3, 3)
    optimizer = Muon([weight], lr=0.24, momentum=0.6, ns_steps=3, normalize_weights=True)
    weight.grad = gradient
    optimizer.step()
    step = orthogonalize(gradient.reshape(1, 4, 27), 3).reshape(4, 3, 3, 3)
    expected = before * 2 / before.norm() - 0.24 * step
    assert torch.allclose(weight, expected, atol=1e-5)


@pytest.mark.parametrize("rest", ["sgd", "adamw"])
def test_the_rest_moves_as_with_torchs_optimizers(rest: Any) -> None:
    torch.manual_seed(0)
    matrix, bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))
    alone = nn.Parameter(bias.detach().clone())
    ours = Muon([matrix, bias], rest=rest, rest_lr=0.1, rest_momentum=0.8, rest_weight_decay=0.3)
    torchs: torch.optim.Optimizer = (
        torch.optim.SGD([alone], 0.1, 0.8, weight_decay=0.3, nesterov=True)
        if rest == "sgd"
        else torch.optim.AdamW([alone], 0.1, (0.8, 0.999), weight_decay=0.3)
    )
    for _ in range(4):
        matrix.grad, bias.grad = torch.randn(3, 4), torch.randn(5)
        alone.grad = bias.grad.clone()
        ours.step()
        torchs.step()
        saved = copy.deepcopy(ours.state_dict())
        ours = Muon([matrix, bias], rest=rest)
        ours.load_state_dict(saved)
    assert torch.allclose(bias, alone, atol=1e-6)


def test_first_and_last_layers_are_no_hidden_matrices() -> None:
    model = Airbench((3, 32, 32), 10, nn.GELU, widths=[4, 8, 8], first_bias_epochs=3)
    hidden, others = Muon.parameter_groups(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(hidden["params"]) == 6
    assert all(p.ndim == 4 for p in hidden["params"])
    found = {names[id(p)] for p in others["params"]}
    assert {"whiten.weight", "whiten.bias", "classifier.weight"} <= found
    assert len(found) == 9  # and the biases of the six norms
    convnet = build_model(compose_checked([*TINY, *MUON]).runs[0].config, 10)
    hidden, others = Muon.parameter_groups(convnet)
    hidden_ids = {id(p) for p in hidden["params"]}
    kept = [n for n, p in convnet.named_parameters() if id(p) in hidden_ids]
    assert kept == [f"features.conv{i}.weight" for i in (2, 3, 4)] + ["classifier.fc1.weight"]


@pytest.mark.slow
def test_a_run_with_muon_learns_and_is_continued_from_both_rates(tmp_path: Path) -> None:
    run = train(tmp_path, *MUON, "training.epochs=4", "dropout=none")
    losses = [row.train_loss for row in run.read_metrics()]
    assert losses[-1] < 0.8 * losses[0]
    groups = torch.load(run.last, weights_only=True)["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([0, 0], abs=1e-9)
    longer = train(tmp_path, *MUON, "training.epochs=5", f"continue_from={run.path}")
    groups = torch.load(longer.last, weights_only=True)["optimizer"]["param_groups"]
    assert [group["initial_lr"] for group in groups] == [0.02, 1e-3]


def test_the_code_of_the_optimizer_is_part_of_the_code_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def both() -> list[str]:
        lines = ([*TINY, "optimizer=muon"], TINY)
        return [code_version(compose_checked(line).runs[0].config) for line in lines]

    before = both()
    monkeypatch.setattr("cifar_lab.runs.provenance._CHOSEN_BY_CONFIG", ("cifar_lab.models.",))
    after = both()
    assert after[0] != before[0]
    assert after[1] == before[1]
