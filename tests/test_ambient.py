"""What a program has set in torch, and its threads, change no result; nothing stays behind."""

import contextlib
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from tiny_runs import TINY

import cifar_lab
from cifar_lab.runs.run_dir import RunDir

WORDS = (*TINY, "training.epochs=1", "precision=fp32")


@contextlib.contextmanager
def changed(read: Callable[[], Any], write: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
        assert read() == value  # as the program had it
    finally:
        write(before)


def mkldnn_off() -> contextlib.AbstractContextManager[None]:
    backend = torch.backends.mkldnn
    return changed(lambda: backend.enabled, lambda on: setattr(backend, "enabled", on), False)


AMBIENT: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "default device": lambda: torch.device("meta"),
    "default dtype": lambda: changed(
        torch.get_default_dtype, torch.set_default_dtype, torch.float64
    ),
    "precision of products": lambda: changed(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "precision of products by its newer name": lambda: changed(
        lambda: torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
        lambda value: setattr(torch.backends.mkldnn.matmul, "fp32_precision", value),  # type: ignore[attr-defined]
        "bf16",
    ),
    "mkldnn": mkldnn_off,
    "logging": lambda: changed(
        lambda: logging.root.manager.disable, logging.disable, logging.CRITICAL
    ),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> cifar_lab.Run:
    return cifar_lab.run(*WORDS, f"output_dir={tmp_path_factory.mktemp('plain')}")


def logits(run: cifar_lab.Run) -> Any:
    return RunDir(run.path).read_predictions().logits


@pytest.mark.parametrize(
    "names",
    [tuple(AMBIENT), *(pytest.param((name,), marks=pytest.mark.slow) for name in AMBIENT)],
    ids=lambda names: names[0] if len(names) == 1 else "all",
)
def test_a_run_under_other_settings_of_torch_has_the_same_bits(
    names: tuple[str, ...], plain: cifar_lab.Run, tmp_path: Path
) -> None:
    pictures = np.zeros((2, 32, 32), np.uint8)
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(AMBIENT[name]())
        run = cifar_lab.run(*WORDS, f"output_dir={tmp_path}")
        probabilities = run.predict(pictures)
        (weight, *_) = run.load_model().parameters()
        assert torch.is_autocast_enabled("cpu") == ("autocast" in names)
    assert np.array_equal(logits(run), logits(plain))
    assert np.array_equal(probabilities, plain.predict(pictures))
    assert (weight.dtype, weight.device.type) == (torch.float32, "cpu")
    assert not weight.is_inference()
    assert "test accuracy of the best weights" in (run.path / "train.log").read_text()


def test_runs_of_two_threads_do_not_mix(plain: cifar_lab.Run, tmp_path: Path) -> None:
    environment, hydra = dict(os.environ), GlobalHydra.instance().hydra
    method = multiprocessing.get_start_method()  # which settles it, as any library may
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(cifar_lab.run, *WORDS, f"seed={seed}", f"output_dir={tmp_path}")
            for seed in (0, 1)
        ]
        configs = [pool.submit(cifar_lab.compose, *WORDS, f"seed={seed}") for seed in range(4)]
    assert np.array_equal(logits(runs[0].result()), logits(plain))
    assert [config.result().seed for config in configs] == [0, 1, 2, 3]
    assert dict(os.environ) == environment
    assert GlobalHydra.instance().hydra is hydra
    assert multiprocessing.get_start_method() == method
