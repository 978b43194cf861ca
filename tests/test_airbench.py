"""Airbench's network and recipe: whitening, fast biases and views, against plain versions."""

import copy
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TINY, train
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import functional as vision

from cifar_lab.analysis import resume_proof
from cifar_lab.config.identity import address
from cifar_lab.models.airbench import Airbench, BiasNorm
from cifar_lab.optimizers.muon import Muon, orthogonalize
from cifar_lab.runs.summary import code_version
from cifar_lab.training.build import build_model, build_state, load_splits
from cifar_lab.training.loop import fit
from cifar_lab.training.preflight import compose_checked
from cifar_lab.training.scoring import mean_logits

SMALL = ["experiment=airbench_small", "dataset=digits"]
SMALL += ["dataset.mean=[0.5]", "dataset.std=[0.5]", "model.widths=[8,16,16]", "device=cpu"]
SMALL += ["split.validation=0.1", "training.batch_size=128"]


def test_the_first_convolution_whitens_patches() -> None:
    """Against numpy's covariance of patches cut one by one."""
    generator = torch.Generator().manual_seed(0)
    mixing = 3 * torch.eye(3) + torch.randn(3, 3, generator=generator)
    images = torch.einsum("ij,njhw->nihw", mixing, torch.rand(600, 3, 16, 16, generator=generator))
    model = Airbench((3, 16, 16), 10, nn.GELU, widths=[4, 8, 8])
    model.initialize_from_images(images)
    patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    white = patches.double() @ model.whiten.weight.reshape(24, 12).double().T
    second_moments = white[:, :12].T @ white[:, :12] / len(white)
    assert torch.allclose(second_moments, torch.eye(12).double(), atol=0.01)
    assert torch.equal(model.whiten.weight[:12], -model.whiten.weight[12:])


def test_a_bias_moves_and_decays_as_with_a_rate_of_its_own() -> None:
    """Ten steps of Nesterov SGD, beside a plain batch norm whose bias has 64 times the rate."""
    torch.manual_seed(0)
    ours, plain = BiasNorm(3), nn.BatchNorm2d(3, eps=1e-12, momentum=0.4)
    plain.weight.requires_grad_(False)
    rate, decay = 0.01, 0.02
    sgd = functools.partial(torch.optim.SGD, momentum=0.85, nesterov=True)
    mine = sgd(ours.parameters(), lr=rate, weight_decay=decay)
    theirs = sgd([plain.bias], lr=64 * rate, weight_decay=decay / 64)
    for _ in range(10):
        images, weights = torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4)
        outputs = []
        for norm, optimizer in ((ours, mine), (plain, theirs)):
            optimizer.zero_grad()
            outputs.append(norm(images))
            (outputs[-1] * weights).mean().backward()
            optimizer.step()
        assert torch.allclose(outputs[0], outputs[1], atol=1e-6)
    assert plain.bias.abs().max() > 0.01
    assert torch.allclose(8 * ours.shift, plain.bias, atol=1e-6)
    assert torch.allclose(ours.eval()(images), plain.eval()(images), atol=1e-5)


def test_views_are_averaged_as_torchvision_makes_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10), nn.Tanh())
    images = torch.rand(5, 3, 8, 8)

    def moved(by: int) -> Tensor:
        padded = vision.pad(images, [1], padding_mode="reflect")
        cropped: Tensor = vision.crop(padded, 1 + by, 1 + by, 8, 8)
        return cropped

    with torch.no_grad():
        mirrored = (model(images) + model(vision.hflip(images))) / 2
        six = mirrored / 2
        for by in (-1, 1):
            six += (model(moved(by)) + model(vision.hflip(moved(by)))) / 8
        assert torch.equal(mean_logits(model, images, "one"), model(images))
        assert torch.allclose(mean_logits(model, images, "mirrored"), mirrored)
        assert torch.allclose(mean_logits(model, images, "moved"), six, atol=1e-6)


def test_a_run_shows_the_model_its_first_training_images_and_leaves_the_filters() -> None:
    (cell,) = compose_checked(SMALL).runs
    splits = load_splits(cell.config, "cpu")
    state, batches = build_state(cell.config, splits, "cpu")
    shown = Airbench((1, 32, 32), 10, nn.GELU, widths=[8, 16, 16])
    pixels = splits.train.images[splits.train.indices[:5000]] / 255
    shown.initialize_from_images((pixels - 0.5) / 0.5)
    assert isinstance(state.model, Airbench)
    assert torch.allclose(state.model.whiten.weight, shown.whiten.weight, atol=1e-3)
    before = state.model.whiten.weight.clone()
    images, labels = next(batches.epoch(1))
    functional.cross_entropy(state.model(images), labels).backward()  # type: ignore[no-untyped-call]
    state.optimizer.step()
    assert torch.equal(state.model.whiten.weight, before)


@pytest.mark.slow
def test_the_first_bias_trains_for_its_epochs_and_then_stays(tmp_path: Path) -> None:
    line = [*SMALL, "model.first_bias_epochs=2", "training.epochs=3", "split.validation=1000"]
    line += ["training.lookahead.every=null"]  # whose slow weights would still move it
    (cell,) = compose_checked([*line, "figures=none", "evaluation.views=one"]).runs
    splits = load_splits(cell.config, "cpu")
    state, batches = build_state(cell.config, splits, "cpu")
    bias = state.model.get_parameter("whiten.bias")
    seen = [bias.detach().clone()]
    for progress in fit(state, batches, None, cell.config.training):
        if progress.kind == "epoch":
            seen.append(bias.detach().clone())
    moved = [not torch.equal(*pair) for pair in itertools.pairwise(seen)]
    assert moved == [True, True, False]
    assert seen[0].abs().max() == 0
    assert "bit for bit" in resume_proof.prove(cell.config, tmp_path, stops=2)[-1]


def test_the_first_bias_is_its_scale_times_its_parameter() -> None:
    images = torch.rand(2, 3, 16, 16)
    model = Airbench(
        (3, 16, 16), 10, nn.GELU, widths=[4, 8, 8], first_bias_epochs=1, first_bias_scale=8.0
    )
    plain = model.whiten(images)
    with torch.no_grad():
        model.get_parameter("whiten.bias").fill_(0.5)
    assert torch.allclose(model.whiten(images), plain + 4)
    for wrong in ({"first_bias_epochs": 0}, {"first_bias_scale": 8.0}):
        with pytest.raises(ValueError, match="first_bias"):
            Airbench((3, 16, 16), 10, nn.GELU, widths=[4, 8, 8], **wrong)


def test_the_recipe_before_lookahead_and_first_bias_finds_its_kept_runs() -> None:
    before = ["training.lookahead.every=null", "model.first_bias_epochs=null", "device=cpu"]
    (cell,) = compose_checked(["experiment=airbench_small", *before, "seed=1"]).runs
    kept = Path(__file__).resolve().parent.parent / "docs" / "results" / "airbench_small_before"
    assert (kept / address(cell.config).name / "config.yaml").is_file()


# --- muon against torch's own and an exact polar factor, its groups, and its runs -----------------

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
    monkeypatch.setattr("cifar_lab.runs.summary._CHOSEN_BY_CONFIG", ("cifar_lab.models.",))
    after = both()
    assert after[0] != before[0]
    assert after[1] == before[1]
