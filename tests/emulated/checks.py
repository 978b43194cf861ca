"""What runs on the emulated device: `tests/test_device.py` starts these checks.

They need a process of their own, because torch can be given another device once per process.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch

from cifar_lab.analysis import resume_proof
from cifar_lab.analysis.resume_proof import differences
from cifar_lab.config.run_config import RunConfig
from cifar_lab.datasets import ImageArrays
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training import batches, group, scoring, splits, step
from cifar_lab.training.build import build_state
from cifar_lab.training.device import Precision
from cifar_lab.training.loop import fit
from cifar_lab.training.preflight import compose_checked
from cifar_lab.training.run import run_experiment
from cifar_lab.training.splits import make_splits
from emulated.device import COMPILED, NAME, Watch, acting

MODELS = {
    "convnet": ("model.widths=[4,8]", "model.hidden=16"),
    "convnet_plain": ("experiment=s1_dropout", "dropout.conv=0.2"),
    "convnet_deep": ("experiment=s1_deep",),
    "two_branch": ("experiment=s3_learning_rate", "optimizer.lr=0.005"),
    "mixed_kernel": ("model=mixed_kernel_small", "model.widths=[4,4,8,8,8,8]"),
    "resnet_small": ("model=resnet_small", "model.width=4", "augmentation=crop_flip"),
    "airbench": ("experiment=airbench_small", "model.widths=[8,8,8]"),
    "policy": (
        *("model.widths=[4,8]", "model.hidden=16"),
        *("augmentation=crop_flip", "augmentation.policy=trivial_augment"),
    ),
    "airbench_muon": ("experiment=airbench_muon_small", "model.widths=[8,8,8]"),
}
OPERATIONS: dict[str, int] = json.loads(
    Path(__file__).with_name("operations.json").read_text(encoding="utf-8")
)
"""Operations of the device in a training step of each model; more make a GPU wait for the host."""

FEW_WAITS = 20
"""In an epoch with validation and prediction: the order and other draws go to the device, sums and
predictions come back."""


@pytest.fixture(autouse=True)
def plenty_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "free_memory", lambda device: 1 << 40)


def arrays(count: int) -> ImageArrays:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    labels = (np.arange(count) % 10).astype(np.int64)
    return ImageArrays(images, labels, images[:96], labels[:96], tuple(map(str, range(10))))


def config_of(*words: str) -> RunConfig:
    common = ("device=cpu", "precision=fp32", "threads=1", "figures=none", "training.epochs=1")
    return compose_checked([*common, "split.validation=0.25", *words]).runs[0].config


def watch_epoch(
    monkeypatch: pytest.MonkeyPatch, batch_size: int, *words: str, device: Any = NAME
) -> tuple[Watch, int]:
    """Train, validate and predict on the device; return what was seen, and the number of steps."""
    # Reading the sums twice a second is a wait that has nothing to do with the steps.
    monkeypatch.setattr("cifar_lab.training.group.Group.is_due", lambda self: False)
    config = config_of(*words, f"training.batch_size={batch_size}")
    data = make_splits(arrays(256), config.dataset, config.split, device)
    state, made = build_state(config, data, device)
    with Watch() as watch:
        list(fit(state, made, data.validation, config.training, config.evaluation))
        scoring.predict(state.model, data.test, config)
    return watch, len(made)


@pytest.mark.parametrize("model", MODELS)
def test_no_step_waits_and_no_more_is_launched(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_steps(model, monkeypatch, *MODELS[model])


def test_a_graph_is_one_launch_and_little_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*MODELS["convnet"], "training.cuda_graph=true")
    with acting("cuda") as device:
        check_steps("convnet, graph", monkeypatch, *words, device=device)


def check_steps(
    model: str, monkeypatch: pytest.MonkeyPatch, *words: str, device: Any = NAME
) -> None:
    few, fewer = watch_epoch(monkeypatch, 64, *words, device=device)
    many, steps = watch_epoch(monkeypatch, 16, *words, device=device)
    more = many.waits - few.waits
    assert more.total() <= 2, f"the host waits in {steps} steps more often: {more}"
    assert few.waits.total() <= FEW_WAITS, few.waits
    in_sums = {line for line in many.float64 if "loop.py" in line or "state.py" in line}
    assert set(many.float64) <= in_sums, many.float64
    per_step = (many.operations.total() - few.operations.total()) / (steps - fewer)
    assert per_step <= OPERATIONS[model], f"{per_step:.1f} operations in a step of {model}"


def run_on(device: Any, folder: Path, *words: str, precision: Precision | None = None) -> RunDir:
    config = tiny_runs.config_of(f"output_dir={folder}", *words)
    if precision:  # that a CPU, for which the config is composed, does not have
        config = dataclasses.replace(config, precision=precision)
    run = RunDir.create(config)
    run_experiment(run)
    assert run.read_summary().status == "finished"
    return run


WHOLE_RUNS = {
    "figures": ("figures=embeddings", "training.epochs=1", "figures.tsne=null"),
    "averages": (
        *("augmentation=crop_flip", "augmentation.mixup=0.4", "augmentation.erasing=0.3"),
        *("training.ema=0.9", "training.lookahead.every=3", "training.clip_grad_norm=1"),
    ),
    "classes": (
        *("training.class_weights=balanced", "training.monitor=val_macro_f1"),
        *("augmentation=crop_flip", "augmentation.flips=alternating"),
        *("training.step_history=true", "training.print_every=2"),
    ),
    "muon": ("optimizer=muon",),
    "views": ("evaluation.views=mirrored",),
    "bf16": ("precision=bf16", "evaluation.views=moved"),
    "deterministic": ("deterministic=true",),
}


@pytest.mark.parametrize("words", WHOLE_RUNS.values(), ids=WHOLE_RUNS)
@pytest.mark.parametrize("role", ["cuda", "mps"])
def test_whole_runs(role: str, words: tuple[str, ...], tmp_path: Path) -> None:
    with acting(role) as device:
        run_on(device, tmp_path, *words)


def test_fp16(tmp_path: Path) -> None:
    # Not as mps: torch's GradScaler spares an Apple GPU float64 by the name of its device.
    with acting("cuda") as device:
        run_on(device, tmp_path, "training.clip_grad_norm=1", precision="fp16")


@pytest.mark.parametrize("role", ["cuda", "mps"])
def test_a_run_is_stopped_resumed_and_asked(role: str, tmp_path: Path) -> None:
    with acting(role) as device:
        config = tiny_runs.config_of(f"output_dir={tmp_path}", "dropout.conv=0.2")
        lines = resume_proof.prove(config, tmp_path / "proof", stops=3)
        assert "bit for bit" in lines[-1]
        run = run_on(device, tmp_path)
        pictures = np.zeros((3, 32, 32), dtype=np.uint8)
        assert scoring.probabilities(run, pictures).shape == (3, 10)
        assert next(scoring.load_model(run, device=device).parameters()).device.type == NAME


def test_images_that_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "free_memory", lambda device: 0)
    with acting("cuda") as device:
        run_on(device, tmp_path)


GRAPHED = (
    ("training.frozen_epochs=1", "training.ema=0.9"),
    ("training.lookahead.every=3", "augmentation.mixup=0.4", "precision=bf16"),
    ("training.clip_grad_norm=0.5", "scheduler=one_cycle", "optimizer=sgd"),
)


@pytest.mark.parametrize("more", GRAPHED, ids=lambda words: words[0])
def test_a_graph_computes_the_bits_of_the_plain_step(more: tuple[str, ...], tmp_path: Path) -> None:
    words = ("dropout.conv=0.2", *more)
    with acting("cuda") as device:
        plain = run_on(device, tmp_path, *words)
        graph = run_on(device, tmp_path, *words, "training.cuda_graph=true")
    assert [line for line in differences(plain, graph) if "config" not in line] == []


CROSSED = {
    # the update of the CPU: a GPU's fused one rounds otherwise
    "convnet": ("model.widths=[4,8]", "model.hidden=16", "optimizer.foreach=true"),
    "muon": ("model.widths=[4,8]", "model.hidden=16", "optimizer=muon", "augmentation=crop_flip"),
    "policy": (
        *("model.widths=[4,8]", "model.hidden=16", "optimizer=sgd", "augmentation=crop_flip"),
        *("augmentation.policy=trivial_augment", "augmentation.flips=alternating"),
    ),
    "mixup": ("model.widths=[4,8]", "model.hidden=16", "optimizer=sgd", "augmentation.mixup=0.4"),
    "airbench": ("experiment=airbench_small", "model.widths=[8,8,8]"),
}


@pytest.mark.parametrize("words", CROSSED.values(), ids=CROSSED)
def test_the_device_computes_the_bits_of_the_cpu(words: tuple[str, ...]) -> None:
    # Without dropout: its masks come from the device's own generator.
    config = config_of(*words, "dropout=none", "training.batch_size=64", "training.epochs=2")
    rows = []
    for device in ("cpu", NAME):
        data = make_splits(arrays(256), config.dataset, config.split, device)
        state, made = build_state(config, data, device)
        progress = fit(state, made, data.validation, config.training, config.evaluation)
        rows.append([(p.row.train_loss, p.row.val_accuracy) for p in progress if p.row])
    assert rows[0] == rows[1]


# --- faults that have to be seen ------------------------------------------------------------------


def waits_in_each_step(monkeypatch: pytest.MonkeyPatch) -> bool:
    many, steps = watch_epoch(monkeypatch, 16, *MODELS["convnet"])
    few, fewer = watch_epoch(monkeypatch, 64, *MODELS["convnet"])
    return (many.waits - few.waits).total() >= steps - fewer


def test_a_number_that_is_read_in_each_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = step.hits
    monkeypatch.setattr(step, "hits", lambda a, b: torch.tensor(float(real(a, b)), device=a.device))
    assert waits_in_each_step(monkeypatch)


def test_a_boolean_mask_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def masked(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        predicted = logits.argmax(1)
        count = predicted[predicted == labels].numel()
        return torch.zeros((), device=logits.device) + count

    monkeypatch.setattr(step, "hits", masked)
    assert waits_in_each_step(monkeypatch)


def test_a_tensor_that_is_made_from_a_number_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "full_like", lambda t, value: torch.tensor(value, device=t.device))
    assert waits_in_each_step(monkeypatch)


def test_a_generator_of_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def mask(like: torch.Tensor, p: float, generator: torch.Generator) -> torch.Tensor:
        return torch.empty_like(like).bernoulli_(1 - p, generator=torch.Generator())

    monkeypatch.setattr(group, "dropout_mask", mask)
    with pytest.raises(RuntimeError, match="generator of the emulated device"):
        watch_epoch(monkeypatch, 64, *MODELS["convnet"])


def test_images_that_stay_on_the_host_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = batches.read_images

    def on_host(*arguments: Any, **keywords: Any) -> Iterator[Any]:
        return (images.cpu() for images in real(*arguments, **keywords))

    monkeypatch.setattr(batches, "read_images", on_host)
    with pytest.raises(RuntimeError, match="the same device"):
        watch_epoch(monkeypatch, 64, *MODELS["convnet"])


def test_float64_is_refused_as_on_an_apple_gpu() -> None:
    COMPILED.forbid_float64(True)
    try:
        with pytest.raises(TypeError, match="doesn't support float64"):
            torch.zeros(3, device=NAME).double()
    finally:
        COMPILED.forbid_float64(False)
    assert math.isclose(torch.ones(3, device=NAME).double().sum().item(), 3.0)
