"""What a run sets for its process, and what that may not change."""

import dataclasses
import json
import logging
import os
import runpy
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import build
from fixtures import CaptureLog, Patch
from tiny_runs import TINY, config_of
from torch.nn import functional

from cifar_lab.config.schema import OptimizerConfig
from cifar_lab.errors import UsageError
from cifar_lab.optimizers import optimizer_settings
from cifar_lab.training import device, preflight, sanity_checks
from cifar_lab.training.batches import read_images
from cifar_lab.training.build import build_state, load_splits
from cifar_lab.training.device import EVIDENCE, select_precision
from cifar_lab.training.preflight import compose_checked
from cifar_lab.training.scoring import mean_logits

ROOT = Path(__file__).resolve().parent.parent


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
    ("place", "problem", "line"),
    [
        ("ones", "CUDA error: no kernel image is available for execution", "no kernel image"),
        ("init", "The NVIDIA driver on your system is too old (found version 11040).", "too old"),
        ("init", "Found no NVIDIA driver on your system. Please check", "none was found"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_told_with_the_reason(
    place: str, problem: str, line: str, monkeypatch: Patch, caplog: CaptureLog
) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise RuntimeError(problem)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda if place == "init" else torch, place, fail)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    device.cuda_problem.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="cifar_lab"):
            assert [device.select_device("auto") for _ in range(2)] == ["cpu"] * 2
        told = [record.getMessage() for record in caplog.records]
        assert [line in text for text in told] == [True] * (line != "none was found")
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


def test_the_current_device_is_that_of_the_run(monkeypatch: Patch) -> None:
    """On another one a captured graph would be empty, and replay the first gradients."""
    current: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    device.configure("cuda:1", None, False)
    assert current == ["cuda:1"]


def test_a_cluster_s_node_decides_what_auto_is_and_whether_there_is_a_gpu(
    monkeypatch: Patch,
) -> None:
    monkeypatch.setattr(device, "cuda_problem", lambda: "none was found")
    monkeypatch.setitem(sys.modules, "triton", None)  # the nodes have it
    words = [*TINY, "device=cuda", "precision=auto", "training.compile=true"]
    with pytest.raises(UsageError, match="no CUDA device"):
        compose_checked(words)
    sent = compose_checked([*words, "hydra/launcher=submitit_slurm", "-m"]).runs[0].config
    assert (sent.device, sent.precision) == ("cuda", "auto")


def test_cublas_is_told_before_its_first_call() -> None:
    line = "import cifar_lab.training, os; print(os.environ['CUBLAS_WORKSPACE_CONFIG'])"
    clean = {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"}
    told = subprocess.run(
        [sys.executable, "-c", line], env=clean, capture_output=True, text=True, check=False
    )
    assert told.stdout == ":4096:8\n", told.stderr


@pytest.mark.parametrize(
    ("kind", "layer", "words"),
    [
        ("cuda", "AdaptiveMaxPool2d", ("experiment=airbench_small", "model.widths=[8,8,8]")),
        ("mps", "MaxPool2d", TINY),
    ],
)
def test_a_layer_that_cannot_repeat_itself_is_refused_before_the_run(
    kind: str, layer: str, words: tuple[str, ...], monkeypatch: Patch
) -> None:
    monkeypatch.setattr(preflight, "select_device", lambda name: name)
    line = [*words, "dataset=digits", "split.validation=0.1", "deterministic=true"]
    line += [f"device={kind}", "precision=fp32"]
    with pytest.raises(UsageError, match=f"deterministic=true is wrong: .* nn.{layer}, .*{kind}"):
        compose_checked(line)


def test_a_gpu_that_emulates_bf16_is_named(monkeypatch: Patch) -> None:
    config = config_of("precision=bf16")
    splits = load_splits(config, "cpu")
    built = build_state(config, splits, "cpu")
    config = dataclasses.replace(config, device="cuda")
    for supported in (True, False):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s
        )
        warnings = sanity_checks.before(config, splits, *built)
        told = any("emulates bf16" in line for line in warnings)
        assert told is not supported


def test_parts_are_copied_by_the_thread_that_trains(monkeypatch: Patch) -> None:
    """A copy to MPS in another one can abort the process (pytorch/pytorch#197805)."""
    threads: list[threading.Thread] = []
    real = torch.Tensor.to

    def noted(self: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        threads.append(threading.current_thread())
        return real(self, *arguments, **keywords)

    config = config_of()
    split = dataclasses.replace(load_splits(config, "cpu").test, ahead=True)
    monkeypatch.setattr(torch.Tensor, "to", noted)
    images = list(read_images(split, split.indices, [slice(0, 8), slice(8, 16)]))
    assert torch.equal(torch.cat(images), split.images[split.indices[:16]])
    assert set(threads) == {threading.main_thread()}


@pytest.mark.parametrize(
    ("asked", "count", "names"),
    [(None, 2, ["0", "1"]), ("3,1,0", 2, ["3", "1"]), ("-1", 0, []), ("MIG-1/2", 1, ["MIG-1/2"])],
)
def test_gpus_have_the_names_that_select_them(
    asked: str | None, count: int, names: list[str], monkeypatch: Patch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if asked is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", asked)
    assert device.visible_gpus() == names


def test_compiling_on_cuda_needs_triton(monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install triton"):
        device.check_compiler("cuda:1")
    assert device.memory_format("mps:0") is torch.contiguous_format


def test_views_are_averaged_in_float32_on_a_gpu() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
    images = torch.empty(2, 3, 4, 4, device="meta", dtype=torch.bfloat16)
    model.to("meta", torch.bfloat16)
    assert mean_logits(model, images, "mirrored").dtype == torch.float32


# --- which precision `precision=auto` is, and the script that gathers the evidence for it ---------

SCRIPT = ROOT / "scripts" / "measure_precision"


def test_the_script_decides_for_what_is_as_accurate_and_faster() -> None:
    decide = runpy.run_path(str(SCRIPT))["decide"]
    good = {"seeds": 5, "difference_points": 0.1, "half_width_points": 0.5, "speed": 1.8}

    def decided(**changes: float) -> Any:
        return decide({"bf16": {"networks": {"good": good, "other": good | changes}}})

    faster = decided(difference_points=-0.3, speed=2.1)
    assert faster == {"auto": "bf16", "speed": "1.8 to 2.1 times as fast"}
    for bad in (  # the interval of the first reaches -1.1 points
        *({"difference_points": -0.6}, {"half_width_points": 1.1}, {"seeds": 4}, {"speed": 0.9}),
    ):
        assert decided(**bad) == {}
    for entry in json.loads(EVIDENCE.read_text()).values():  # the package's own
        known = {key: entry.pop(key) for key in ("auto", "speed") if key in entry}
        assert decide(entry) == known


def test_auto_follows_the_kind_of_device(monkeypatch: Patch) -> None:
    monkeypatch.delenv("CIFAR_LAB_PRECISION")
    for kind, expected in (("cpu with avx512_bf16", "bf16"), ("cpu", "fp32"), ("mps", "fp32")):
        monkeypatch.setattr(device, "device_kind", lambda device, kind=kind: kind)
        assert select_precision("auto", "cpu") == expected
        assert select_precision("fp32", "cpu") == "fp32"
    monkeypatch.setattr(device, "device_kind", lambda device: "cpu with avx512_bf16")
    assert device.explain_precision("fp32", "cpu") == ""
    assert device.explain_precision("bf16", "cpu") == (
        " (auto takes it: on a cpu with avx512_bf16 it is as accurate as fp32, "
        "and 1.4 to 1.7 times as fast)"
    )


def test_evidence_of_ones_own_is_followed(tmp_path: Path, monkeypatch: Patch) -> None:
    file = tmp_path / "evidence.json"
    monkeypatch.setenv("CIFAR_LAB_PRECISION", str(file))
    file.write_text(json.dumps({device.device_kind("cpu"): {"auto": "bf16", "speed": ""}}))
    assert compose_checked(["dataset=digits", "device=cpu"]).runs[0].config.precision == "bf16"


@pytest.mark.slow
def test_the_experiments_of_the_reports_are_fp32_on_every_machine(monkeypatch: Patch) -> None:
    monkeypatch.setattr(device, "select_precision", lambda name, device: f"auto was {name}")
    for path in (ROOT / "conf" / "experiment").glob("s[0-9]_*.yaml"):
        runs = compose_checked([f"experiment={path.stem}", "-m"]).runs
        assert {run.config.precision for run in runs} == {"fp32"}, path


# --- runs on a GPU that is not there --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the emulated device is compiled on Linux only")
@pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
def test_the_checks_of_the_emulated_device_pass() -> None:
    build.library()
    # In a process of its own: torch can be given another device once per process.
    checks = str(ROOT / "tests" / "emulated" / "checks.py")
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", checks]
    ran = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-8000:]
    assert " passed" in ran.stdout
    assert "skipped" not in ran.stdout


# --- scripts/measure_gpu --------------------------------------------------------------------------


def measure(*words: str | Path) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, ROOT / "scripts" / "measure_gpu", *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.slow
def test_a_rehearsal_of_both_calls_keeps_every_figure_in_one_archive(tmp_path: Path) -> None:
    for call in ("1", "2"):
        rehearsed = measure(call, tmp_path, "--rehearse")
        assert rehearsed.returncode == 0, rehearsed.stdout + rehearsed.stderr
        assert rehearsed.stdout.count("exit code 0") == 3
    rows = json.loads((tmp_path / "measured.json").read_text())["rows"]
    values = {(row["what"], row["quantity"]): row["value"] for row in rows}
    assert {row["stage"] for row in rows} == {
        *("digits", "gpu_tests", "speed", "profile", "precision", "cells")
    }
    assert values["deterministic", "weights equal those of the same run"] == 1
    assert values["convnet graph", "our training epoch, images/s"] > 0
    assert values["convnet", "bf16 beside fp32: seeds"] == 2
    assert any(row["expected"] for row in rows)
    with tarfile.open(tmp_path / "measured.tar.gz") as archive:
        names = archive.getnames()
    assert {"measured.json", "tests.log", "precision.log"} <= set(names)
    assert any(name.endswith("metrics.csv") for name in names)
    assert not any(name.endswith(".pt") for name in names)


@pytest.mark.slow
def test_without_a_gpu_only_a_rehearsal_is_possible(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    refused = measure("1", tmp_path / "out")
    assert refused.returncode == 2
    assert "--rehearse runs the stages on a CPU" in refused.stderr
    assert not (tmp_path / "out").exists()
