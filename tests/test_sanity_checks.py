"""Each sanity check warns where a report's mistake is made, and is silent where it is not."""

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from cifar_lab.config.run_config import RunConfig
from cifar_lab.runs.metrics import EpochMetrics
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training import sanity_checks
from cifar_lab.training.batches import Batches
from cifar_lab.training.build import build_state, load_splits
from cifar_lab.training.preflight import compose_checked
from cifar_lab.training.run import run_experiment
from cifar_lab.training.splits import Splits
from cifar_lab.training.state import TrainState

SMALL = [
    *("dataset=digits", "model=convnet_plain", "model.widths=[4,8]", "model.hidden=16"),
    *("device=cpu", "figures=none", "training.epochs=1"),
]


def compose(*overrides: str) -> RunConfig:
    return compose_checked([*SMALL, *overrides]).runs[0].config


@pytest.fixture(scope="module")
def settings() -> RunConfig:
    return compose()


@pytest.fixture(scope="module")
def splits(settings: RunConfig) -> Splits:
    return load_splits(settings, "cpu")


@pytest.fixture(scope="module")
def built(settings: RunConfig, splits: Splits) -> tuple[TrainState, Batches]:
    return build_state(settings, splits, "cpu")


def said(warnings: list[str], words: str) -> bool:
    return len([warning for warning in warnings if words in warning]) == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["evaluation.crop_padding=4"], "cropped at random"),
        (["split.source=test", "split.validation=0.8"], "chosen on test images"),
        (["split.validation=0"], "no validation images"),
        (["dataset.mean=null", "dataset.std=null"], "not normalised"),
        (["split.validation=0", "evaluation.watch_test=true"], "test set is watched"),
        (["augmentation=crop_flip"], "training images of digits are mirrored"),
        (["figures=embeddings"], "360"),
        (["evaluation.watch_test=true"], ""),
        (["augmentation=crop_flip", "augmentation.horizontal_flip=false"], ""),
        ([], ""),
    ],
)
def test_checks_of_the_config(overrides: list[str], words: str) -> None:
    config = compose(*overrides)
    warnings = sanity_checks.check_config(config, load_splits(config, "cpu"))
    assert said(warnings, words) if words else warnings == []


def test_46_a_softmax_before_cross_entropy(built: tuple[TrainState, Batches]) -> None:
    images = torch.rand(5, 1, 32, 32)
    plain = built[0].model
    assert sanity_checks.check_outputs(plain, images) == []
    (warning,) = sanity_checks.check_outputs(nn.Sequential(plain, nn.Softmax(dim=1)), images)
    assert "1.4612" in warning  # S4's floor: ln(e + 9) - 1
    positive = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10), nn.ReLU())
    assert sanity_checks.check_outputs(positive, images) == []


@pytest.mark.parametrize(
    "model", ["two_branch", pytest.param("mixed_kernel_small", marks=pytest.mark.slow)]
)
def test_a_gate_that_is_zero_for_a_whole_batch(model: str, splits: Splits) -> None:
    base = ["dataset=digits", f"model={model}", "dropout=none", "device=cpu", "model.gate=relu"]
    settings = compose_checked(base).runs[0].config
    state, batches = build_state(settings, splits, "cpu")
    images = sanity_checks.first_images(splits.train, batches)
    first = state.model.gate if model == "two_branch" else state.model.blocks.block1.gate  # type: ignore[union-attr]
    linear = next(m for m in first.modules() if isinstance(m, nn.Linear))  # type: ignore[union-attr]
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.fill_(1.0)
    alive = sanity_checks.check_gates(state.model, images)
    assert not any("block 1 " in warning or "blocks 1" in warning for warning in alive)
    with torch.no_grad():
        linear.bias.fill_(-1.0)
    (warning,) = sanity_checks.check_gates(state.model, images)
    assert "block 1" in warning or "blocks 1" in warning


def test_probing_a_model_moves_no_generator(built: tuple[TrainState, Batches]) -> None:
    state, batches = built
    before = torch.get_rng_state(), state.generator.get_state()
    images = sanity_checks.first_images(batches.split, batches)
    sanity_checks.check_outputs(nn.Sequential(state.model, nn.Dropout()), images)
    sanity_checks.check_gates(state.model, images)
    assert torch.equal(before[0], torch.get_rng_state())
    assert torch.equal(before[1], state.generator.get_state())


def test_16_a_validation_split_that_tells_little() -> None:
    (warning,) = sanity_checks.check_interval(0.778, 1000)
    assert "±2.6 points" in warning
    assert sanity_checks.check_interval(0.989, 12000) == []


def epochs(*losses: float | tuple[float, float]) -> list[EpochMetrics]:
    """A history of these training losses, or pairs of training and validation loss."""
    pairs = [loss if isinstance(loss, tuple) else (loss, None) for loss in losses]
    return [
        EpochMetrics(
            epoch=number,
            learning_rate=0.05,
            train_loss=train,
            train_accuracy=0.1,
            val_loss=validation,
            val_accuracy=None if validation is None else 0.1,
            seconds=1.0,
            images_per_second=1.0,
        )
        for number, (train, validation) in enumerate(pairs, start=1)
    ]


def test_a_network_that_ends_at_chance_is_told() -> None:
    ten = torch.arange(10).repeat(100)
    ends_well = [epochs(2.4, 1.9), epochs((2.35, 2.1)), epochs(2.3, 2.28), epochs(2.4), []]
    assert [sanity_checks.check_learning(history, ten) for history in ends_well] == [[]] * 5
    (warning,) = sanity_checks.check_learning(epochs(2.036, 1.717, 1.9, 2.306, (2.306, 2.312)), ten)
    assert warning.startswith(
        "learning collapsed after epoch 3: its training loss, 2.3060, is no better than a constant "
        "answer's, 2.3026 (1.7170 in epoch 2); try a smaller optimizer.lr (it is 0.05)"
    )
    (warning,) = sanity_checks.check_learning(epochs(2.31, 2.302), ten)
    assert warning.startswith("the network has learnt nothing")
    # nine of ten images are of one class: 0.5 is worse than answering the frequencies
    skewed = torch.tensor([0] * 90 + [1] * 10)
    assert said(sanity_checks.check_learning(epochs(0.5, 0.4), skewed), "constant answer's, 0.3251")
    assert sanity_checks.check_learning(epochs(0.5, 0.3), skewed) == []
    assert sanity_checks.check_learning(epochs(0.0, 0.0), torch.zeros(5, dtype=torch.int64)) == []


def test_warnings_are_said_once_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = ["experiment=s0_optimizer_activation", "protocol=report", "training.epochs=1"]
    without = [f"dataset.{key}=null" for key in ("mean", "std", "display_names")]
    chosen = ["dropout.dense=0", "optimizer=adam", "activation=tanh", f"output_dir={tmp_path}"]
    run = RunDir.create(compose(*report, *without, *chosen))
    with caplog.at_level(logging.WARNING, logger="cifar_lab"):
        summary = run_experiment(run)
    logged = [record.getMessage() for record in caplog.records]
    for words in (
        *("cropped at random", "chosen on test images", "not normalised", "cannot be told apart"),
        "360 images, but the test split has 72",
    ):
        assert said(summary.warnings, words), words
        assert said(logged, words), words
    assert json.loads(run.summary_file.read_text())["warnings"] == summary.warnings
    assert summary.protocol == "report"
