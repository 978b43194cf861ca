"""Class weights, gradient clipping and averaged weights, beside plain ones."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from tiny_runs import StopIn, config_of, make, train, weights
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cifar_lab.config.run_config import LookaheadConfig
from cifar_lab.config.schema import OptimizerConfig
from cifar_lab.errors import Damaged, Stopped
from cifar_lab.optimizers import build_optimizer
from cifar_lab.optimizers.averages import Lookahead, WeightAverage
from cifar_lab.runs.files import load_checkpoint
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.build import build_state, load_splits, make_model
from cifar_lab.training.loop import fit
from cifar_lab.training.run import run_experiment
from cifar_lab.training.scoring import load_weights
from cifar_lab.training.splits import Split, Splits
from cifar_lab.training.step import Criterion, class_weights


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_splits(config_of(), "cpu")


def split_of(labels: list[int]) -> Split:
    """A split of all but the first image, which has a class of its own."""
    images = torch.zeros(len(labels) + 1, 1, 4, 4, dtype=torch.uint8)
    return Split("train", images, torch.tensor([5, *labels]), torch.arange(1, len(labels) + 1))


def plain_loss(logits: Tensor, shares: Tensor, weights: list[float], smoothing: float) -> float:
    """Image by image and class by class, in Python's floats."""
    total = divisor = 0.0
    classes = len(weights)
    for row, parts in zip(logits.tolist(), shares.tolist(), strict=True):
        normaliser = math.log(sum(math.exp(x) for x in row))
        for x, part, weight in zip(row, parts, weights, strict=True):
            target = part * (1 - smoothing) + smoothing / classes
            total += weight * target * (normaliser - x)
            divisor += weight * part
    return total / divisor


@pytest.mark.parametrize(("weights", "smoothing"), [(None, 0.0), ([0.5, 2.0, 1.0, 7.0], 0.1)])
def test_the_loss_is_the_weighted_mean_of_images_also_of_mixed_ones(
    weights: list[float] | None, smoothing: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 4, generator=generator)
    labels = torch.tensor([0, 1, 2, 3, 3, 1])
    one_hot = functional.one_hot(labels, 4).float()
    mixed = 0.3 * one_hot + 0.7 * one_hot.roll(1, 0)
    given = None if weights is None else torch.tensor(weights)
    criterion = Criterion(smoothing, given)
    plain = weights or [1.0] * 4
    for shares in (one_hot, mixed):
        expected = plain_loss(logits, shares, plain, smoothing)
        assert criterion(logits, shares).item() == pytest.approx(expected, rel=1e-5)
    expected = plain_loss(logits, one_hot, plain, smoothing)
    assert criterion(logits, labels).item() == pytest.approx(expected, rel=1e-5)


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    labels = [0] * 7 + [1] * 2 + [3]
    weights = class_weights("balanced", split_of(labels), 6)
    assert weights is not None
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    assert weights[[0, 1, 3]].tolist() == pytest.approx(expected.tolist())
    assert weights[[2, 4, 5]].tolist() == [0, 0, 0], "5 is a class of another split"


PLAIN = ("optimizer=sgd", "optimizer.momentum=0.9", "dropout=none", "augmentation=none")


def test_weights_of_classes_and_clipping_are_those_of_a_plain_loop() -> None:
    weights = [1.0, 2.0, 3.0, 0.5, 1.0, 1.0, 4.0, 1.0, 1.0, 0.1]
    limit = 4.7
    settings = config_of(
        *PLAIN,
        # later than after four steps, the order in which sums are taken grows into the digits
        *("training.epochs=1", "split.validation=1181"),
        f"training.class_weights={weights}",
        f"training.clip_grad_norm={limit}",
    )
    splits = load_splits(settings, "cpu")
    state, batches = build_state(settings, splits, "cpu")
    plain, _ = build_state(settings, splits, "cpu")
    rows = [p.row for p in fit(state, batches, splits.validation, settings.training) if p.row]

    net, optimizer = plain.model, plain.optimizer
    norms, losses, images_seen = [], 0.0, 0
    net.train()
    for images, labels in batches.epoch(1):
        each = functional.cross_entropy(net(images), labels, reduction="none")
        image_weights = torch.tensor([weights[label] for label in labels.tolist()])
        loss = (each * image_weights).sum() / image_weights.sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in gradients)))
        if norms[-1] > limit:
            for gradient in gradients:
                gradient *= limit / norms[-1]
        optimizer.step()
        losses += loss.item() * len(labels)
        images_seen += len(labels)
    assert rows[0].train_loss == pytest.approx(losses / images_seen, rel=1e-5)
    assert min(norms) < limit < max(norms), "some steps are clipped, others are not"
    for ours, theirs in zip(state.model.parameters(), net.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))


def test_the_average_is_torchs_once_it_has_warmed_up() -> None:
    """And before that, the one of an explicit loop with decay (1 + n) / (10 + n)."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ours, warm = WeightAverage(model, 0.5), WeightAverage(model, 0.5)
    update = get_ema_multi_avg_fn(0.5)  # type: ignore[no-untyped-call]
    theirs = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    theirs.update_parameters(model)  # torch's first update copies
    plain = {n: t.double() for n, t in model.state_dict().items()}
    decays = []
    for step in range(12):
        optimizer.zero_grad()
        model(torch.randn(4, 1, 4, 4)).square().sum().backward()
        optimizer.step()
        warm.after_step(1001 + step)
        theirs.update_parameters(model)
        ours.after_step(step + 1)
        decays.append(min(0.5, (1 + step) / (10 + step)))
        for name, tensor in model.state_dict().items():
            plain[name] = decays[-1] * plain[name] + (1 - decays[-1]) * tensor.double()
    assert decays[0] == 0.1
    assert decays[-1] == 0.5
    found, expected = warm.weights(model), theirs.module.state_dict()
    averaged = ours.weights(model)
    assert list(found) == list(model.state_dict())
    for name, tensor in found.items():
        if name.endswith("num_batches_tracked"):
            assert tensor == 12
            continue
        assert torch.allclose(tensor, expected[name], rtol=1e-5, atol=1e-6), name
        assert torch.allclose(averaged[name].double(), plain[name], rtol=1e-5, atol=1e-6), name
    model.eval()
    theirs.eval()
    images = torch.randn(3, 1, 4, 4)
    assert torch.allclose(warm(model, images), theirs(images), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(images), theirs(images), rtol=1e-4)


def test_a_run_validates_and_keeps_the_averaged_weights(splits: Splits, tmp_path: Path) -> None:
    run = train(tmp_path, "training.ema=0.9", "evaluation.scored_weights=averaged")
    settings, summary = run.read_config(), run.read_summary()
    last, best = load_checkpoint(run.last), load_checkpoint(run.best)
    state, _ = build_state(settings, splits, "cpu")
    state.load_state_dict(last)
    for name, tensor in state.scored_weights().items():
        assert torch.equal(tensor, last["averaged"][name])
    assert any(not torch.equal(t, last["averaged"][n]) for n, t in last["model"].items())
    if summary.best_epoch == settings.training.epochs:
        assert all(torch.equal(t, last["averaged"][n]) for n, t in best["model"].items())
    # the validation score of the last epoch, by a model of its own that holds the average
    model = make_model(settings, 10, "cpu").eval()
    load_weights(run, "averaged", model)
    assert splits.validation is not None
    predictions = run.read_predictions("validation")
    assert predictions.accuracy == run.read_metrics()[-1].val_accuracy
    assert summary.scored_weights == "averaged"
    assert summary.test_accuracy == summary.test_accuracy_averaged
    assert summary.test_accuracy_averaged == run.read_predictions("test", "averaged").accuracy
    assert summary.test_accuracy_last == run.read_predictions("test", "last").accuracy
    with pytest.raises(Damaged, match=r"weights of the run's model: .* size mismatch for"):
        load_weights(run, "best", make_model(config_of("model.widths=[2,2]"), 10, "cpu"))


# --- lookahead ------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("name", ["Adam", "Adagrad", "RMSprop", "SGD"])
def test_a_step_without_the_compilers_breaks_is_torchs_step(name: str) -> None:
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    models[1].load_state_dict(models[0].state_dict())
    config = OptimizerConfig({"_target_": f"torch.optim.{name}", "lr": 0.01})
    plain = getattr(torch.optim, name)(models[1].parameters(), lr=0.01)
    optimizers = [build_optimizer(config, models[0]), plain]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(torch.ones(5, 3)).square().sum().backward()
            optimizer.step()
    assert str(models[0].state_dict()) == str(models[1].state_dict())
