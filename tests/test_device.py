"""What a run sets for its process, and what that may not change."""

import dataclasses

import pytest
import torch
from tiny_runs import config_of
from torch.nn import functional

from cifar_lab.config.components import OptimizerConfig
from cifar_lab.errors import UsageError
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training import device
from cifar_lab.training.build import build_state, optimizer_settings
from cifar_lab.training.console import record_end
from cifar_lab.training.data import load_splits


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_update_chosen_on_a_cpu_gives_the_bits_of_torchs_plain_one(optimizer: str) -> None:
    config = config_of(f"optimizer={optimizer}")
    splits = load_splits(config, "cpu")
    weights = []
    for foreach in (None, False):
        chosen = dataclasses.replace(
            config, optimizer=OptimizerConfig(config.optimizer, foreach=foreach)
        )
        state, batches = build_state(chosen, splits, "cpu")
        assert state.optimizer.defaults["foreach"] is (foreach is None)
        for images, labels in batches.epoch(1):
            state.optimizer.zero_grad()
            functional.cross_entropy(state.model.eval()(images), labels).backward()  # type: ignore[no-untyped-call]
            state.optimizer.step()
        weights.append(state.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_update_that_was_chosen_stays() -> None:
    for values in ({"foreach": False, "fused": None}, {"foreach": None, "fused": True}, {"lr": 1}):
        chosen = OptimizerConfig(values)
        assert optimizer_settings(chosen, "cpu", "fp32") == chosen
    left_open = OptimizerConfig(foreach=None, fused=None)
    assert optimizer_settings(left_open, "cpu", "fp32")["foreach"] is True
    assert optimizer_settings(left_open, "cuda", "fp32") == left_open
    adam = OptimizerConfig(left_open, _target_="torch.optim.Adam")
    for kind, precision, fused in (
        *(("cuda", "fp32", True), ("cuda:1", "fp16", True), ("mps", "bf16", True)),
        ("mps", "fp16", None),  # which has no scaled update there
    ):
        assert optimizer_settings(adam, kind, precision)["fused"] is fused
    differentiable = OptimizerConfig(left_open, differentiable=True)
    assert optimizer_settings(differentiable, "cpu", "fp32") == differentiable


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        ("CUDA error: no kernel image is available for execution on the device", "no kernel image"),
        ("The NVIDIA driver on your system is too old (found version 11040).", "too old"),
        ("Found no NVIDIA driver on your system. Please check", "none was found"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_told_with_the_reason(
    problem: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError(problem)

    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    device.cuda_problem.cache_clear()
    try:
        name, reason = device.select_device("auto")
        assert (name, line in reason) == ("cpu", True)
        with pytest.raises(UsageError, match=line):
            device.select_device("cuda")
    finally:
        device.cuda_problem.cache_clear()


def test_a_run_of_another_kind_of_device_is_resumed_with_masks_drawn_anew() -> None:
    config = config_of()
    splits = load_splits(config, "cpu")
    state, _ = build_state(config, splits, "cpu")
    saved = {**state.state_dict(), "generator": torch.zeros(16, dtype=torch.uint8)}
    before = state.generator.get_state()
    state.load_state_dict(saved)
    assert not torch.equal(state.generator.get_state(), before)


def test_out_of_memory_on_mps_names_the_batch_size(stopped: RunDir) -> None:
    error = RuntimeError("MPS backend out of memory (MPS allocated: 9 GB, max allowed: 9.07 GB)")
    record_end(stopped, stopped.read_summary(), error)
    assert "try a smaller training.batch_size" in (stopped.read_summary().error or "")
