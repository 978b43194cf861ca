"""The loop: what it must change and must not, beside a plain loop written anew here."""

import dataclasses
import math
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from tiny_runs import TINY, config_of, every_step
from torch import Tensor, nn
from torch.nn import functional

from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import UsageError
from cifar_lab.runs.metrics import EpochMetrics
from cifar_lab.training import loop
from cifar_lab.training.build import build_state, load_splits, normalisation
from cifar_lab.training.device import derive_seed
from cifar_lab.training.group import KeyedDropout, dropout_mask, key_dropout
from cifar_lab.training.loop import Progress, fit
from cifar_lab.training.splits import Splits
from cifar_lab.training.state import Schedule, TrainState, history_rows, history_tensor


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return config_of()


@pytest.fixture(scope="module")
def splits(config: RunConfig) -> Splits:
    return load_splits(config, "cpu")


def run(config: RunConfig, splits: Splits, **settings: Any) -> tuple[TrainState, list[Progress]]:
    state, batches = build_state(config, splits, "cpu")
    chosen = dataclasses.replace(config.training, **settings)
    return state, list(fit(state, batches, splits.validation, chosen))


def weights(state: TrainState) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in state.model.state_dict().items()}


def test_a_step_changes_every_tensor_and_validation_none(
    config: RunConfig, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    every_step(monkeypatch)
    state, batches = build_state(config, splits, "cpu")
    before = weights(state)
    chosen = dataclasses.replace(config.training, epochs=1)
    for progress in fit(state, batches, splits.validation, chosen):
        unchanged = [n for n, t in weights(state).items() if torch.equal(t, before[n])]
        if progress.kind == "train":
            assert unchanged == []
            assert (state.epoch, state.step) == (0, progress.step)
            before = weights(state)
        else:
            assert unchanged == list(before)


def test_a_plain_slow_loop_gives_the_same_losses() -> None:
    """Written without our data, loop or metrics; no dropout and no augmentation."""
    settings = config_of("dropout=none", "augmentation=none", "training.label_smoothing=0.1")
    splits = load_splits(settings, "cpu")
    state, batches = build_state(settings, splits, "cpu")
    model, _ = build_state(settings, splits, "cpu")
    net = model.model
    rate = settings.optimizer["lr"]
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    mean, std = normalisation(settings).mean, normalisation(settings).std
    assert mean is not None
    assert std is not None
    assert splits.validation is not None

    def image(index: int) -> Tensor:
        return (splits.train.images[index].float() / 255 - mean[0]) / std[0]

    rows, first_losses = [], []
    for epoch in (1, 2):
        generator = torch.Generator().manual_seed(derive_seed(settings.seed, "data", epoch))
        order = splits.train.indices[torch.randperm(len(splits.train), generator=generator)]
        net.train()
        total = 0.0
        for chunk in torch.split(order, 64):
            images = torch.stack([image(int(i)) for i in chunk])
            labels = splits.train.labels[chunk]
            loss = functional.cross_entropy(net(images), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item() * len(chunk)
            first_losses.append(loss.item())
        net.eval()
        right = 0
        val = 0.0
        with torch.no_grad():
            for chunk in torch.split(splits.validation.indices, 100):
                logits = net(torch.stack([image(int(i)) for i in chunk]))
                labels = splits.validation.labels[chunk]
                right += int((logits.argmax(1) == labels).sum())
                val += functional.cross_entropy(logits, labels, reduction="sum").item()
        rows.append((total / len(order), val / 900, right / 900))
    noted = dataclasses.replace(settings.training, step_history=True)
    progress = list(fit(state, batches, splits.validation, noted))
    steps = [step.loss for part in progress for step in part.step_rows]
    assert steps[0] == pytest.approx(first_losses[0], rel=1e-6)
    assert steps[:5] == pytest.approx(first_losses[:5], rel=3e-4)
    # later, the other order in which convolutions add up grows into the digits
    for row, (train_loss, val_loss, val_accuracy) in zip(state.history, rows, strict=True):
        assert row.train_loss == pytest.approx(train_loss, rel=1e-3)
        assert row.val_loss == pytest.approx(val_loss, rel=5e-3)
        assert row.val_accuracy == pytest.approx(val_accuracy, abs=0.02)


@pytest.mark.parametrize(
    ("p", "layout"), [(0.1, torch.contiguous_format), (0.5, torch.channels_last)]
)
def test_a_mask_drops_its_share_and_scales_the_rest(p: float, layout: torch.memory_format) -> None:
    like = torch.empty(50, 8, 16, 17).to(memory_format=layout)
    mask = dropout_mask(like, p, torch.Generator().manual_seed(0))
    assert mask.shape == like.shape
    assert mask.stride() == like.stride()
    assert {round(v, 5) for v in set(mask.flatten().tolist())} == {0.0, round(1 / (1 - p), 5)}
    dropped = (mask == 0).double()
    deviation = math.sqrt(p * (1 - p) / mask.numel())
    assert abs(float(dropped.mean()) - p) < 4 * deviation + 2**-17
    for dim in range(4):  # no image, channel or row is treated apart
        others = [d for d in range(4) if d != dim]
        shares = dropped.mean(others)
        assert float((shares - p).abs().max()) < 5 * deviation * math.sqrt(like.shape[dim])
    neighbours = dropped.flatten()[1:] * dropped.flatten()[:-1]
    assert abs(float(neighbours.mean()) - p * p) < 5 * deviation
    images = torch.randn(5, 4, 3, 3, requires_grad=True)
    out = KeyedDropout(p, torch.Generator().manual_seed(1))(images)
    out.sum().backward()
    expected = dropout_mask(images, p, torch.Generator().manual_seed(1))
    assert images.grad is not None
    assert torch.equal(images.grad, expected)
    assert torch.equal(out, images * expected)


def test_dropout_at_its_edges() -> None:
    images, generator = torch.randn(4, 3), torch.Generator()
    assert KeyedDropout(0.0, generator)(images) is images
    assert KeyedDropout(0.5, generator).eval()(images) is images
    tiny = dropout_mask(torch.empty(1000), 1e-7, generator)
    assert float(tiny.min()) == pytest.approx(1)
    odd = torch.empty(6, 4).t()[::2]  # neither layout is dense
    for like in (torch.empty(0, 3), *map(torch.empty, (1, 2, 3, 5, 7)), odd):
        assert dropout_mask(like, 0.5, generator).shape == like.shape


def test_keyed_dropout_keeps_names_and_needs_no_global_generator() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.2)))
    names = list(model.state_dict())
    modules = [name for name, _ in model.named_modules()]
    model[1].eval()
    key_dropout(model, torch.Generator().manual_seed(0))
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_modules()] == modules
    assert isinstance(model[1], KeyedDropout)
    assert (model[1].p, model[1].training) == (0.5, False)
    model.train()
    before = torch.get_rng_state()
    model(torch.randn(4, 3, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)


def row(epoch: int, accuracy: float, loss: float = 1.0) -> EpochMetrics:
    return EpochMetrics(epoch, 0.1, 1.0, 0.5, loss, accuracy, 1.0, 1.0)


def test_a_plateau_reduces_after_the_epoch_that_did_not_improve() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=0.5, patience=1
    )
    schedule = Schedule(plateau, "epoch", "val_accuracy")
    rates = []
    for epoch, accuracy in enumerate([0.1, 0.2, 0.2, 0.2, 0.2, 0.3], start=1):
        schedule.after_epoch(row(epoch, accuracy))
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.1, 0.1, 0.1, 0.05, 0.05, 0.05]


@pytest.mark.parametrize(
    ("settings", "scores", "last"),
    [
        ({"patience": 2}, [0.1, 0.2, 0.2, 0.1, 0.5], 4),
        ({"patience": 1}, [0.1, 0.2, 0.3], 3),
        ({"patience": 1, "min_delta": 0.15}, [0.1, 0.2, 0.9], 2),
        ({"patience": None}, [0.3, 0.2, 0.1], 3),
    ],
)
def test_patience(
    settings: dict[str, Any], scores: list[float], last: int, config: RunConfig, splits: Splits
) -> None:
    state, _ = build_state(config, splits, "cpu")
    chosen = dataclasses.replace(config.training, **settings)
    for epoch, accuracy in enumerate(scores, start=1):
        improved = loop._close_epoch(state, row(epoch, accuracy), chosen)
        assert improved == (accuracy > max([0.0, *scores[: epoch - 1]]))
        if state.stopped_early:
            break
    assert state.epoch == last


def test_a_history_survives_its_tensor() -> None:
    rows = [row(1, 0.1), dataclasses.replace(row(2, 0.3), val_loss=None, val_accuracy=None)]
    assert history_rows(history_tensor(rows)) == rows
    assert history_rows(history_tensor([])) == []
    by_class = [rows[0], dataclasses.replace(rows[1], val_balanced_accuracy=0.5, val_macro_f1=0.4)]
    assert history_rows(history_tensor(by_class)) == by_class
    assert history_tensor(rows).shape[1] == 10, "the table of a run that monitors no such score"


COMPILED = """
import sys
from torch._dynamo.utils import counters
from cifar_lab.training.build import build_state
from cifar_lab.training.build import load_splits
from cifar_lab.training.preflight import compose_checked
from cifar_lab.training.loop import fit

losses = []
for chosen in ("false", "true"):
    words = [*sys.argv[1:], "dropout=none", f"training.compile={chosen}"]
    config = compose_checked(words).runs[0].config
    splits = load_splits(config, "cpu")
    state, batches = build_state(config, splits, "cpu")
    names = list(state.model.state_dict())
    rows = [p.row for p in fit(state, batches, splits.validation, config.training) if p.row]
    losses += [row.train_loss for row in rows]
    assert list(state.model.state_dict()) == names
assert not counters["graph_break"], counters["graph_break"]
print(counters["stats"]["unique_graphs"], *losses)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_trains_as_the_plain_one() -> None:
    def words_of(*command: str) -> list[str]:
        answer = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, answer.stderr
        return answer.stdout.split()

    graphs, *losses = map(float, words_of("-c", COMPILED, *TINY))
    assert graphs == 4, "whole and last batches, in training and in evaluation"
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-3)
    resumed = words_of("-m", "cifar_lab.prove_resume", *TINY, "training.compile=true", "--stops=2")
    assert "bit for bit" in " ".join(resumed)


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UsageError, match=r"no C\+\+ compiler on the PATH"):
        config_of("training.compile=true")
