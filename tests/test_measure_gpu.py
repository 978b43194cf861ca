"""scripts/measure_gpu: both calls run on a CPU, every figure is kept, a stage ends alone."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest



def measure(*words: str | Path) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, SCRIPT, *words]
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
