"""scripts/measure_gpu: every stage runs, is continued, and leaves its files."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "measure_gpu"
STAGES = ("tests", "throughput", "options", "precision", "recipes", "sharing", "reports")


def measure(*words: str | Path) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, SCRIPT, *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.slow
def test_a_rehearsal_runs_every_stage_and_repeats_nothing(tmp_path: Path) -> None:
    started = measure(tmp_path, "--rehearse", "--only", "recipes", "--minutes", "0")
    assert started.returncode == 4, started.stderr
    assert "recipes: to be continued" in started.stdout
    whole = measure(tmp_path, "--rehearse")
    assert whole.returncode == 0, whole.stderr
    for stage in STAGES:
        assert json.loads((tmp_path / f"{stage}.json").read_text())["steps"]
        with (tmp_path / f"{stage}.csv").open(newline="") as handle:
            rows = list(csv.DictReader(handle))
        assert rows, stage
        Image.open(tmp_path / f"{stage}.png").verify()
    assert "that the device is busy" in (tmp_path / "throughput.csv").read_text()
    recipes = (tmp_path / "recipes.csv").read_text()
    assert "airbench,finished runs,2.0" in recipes
    again = measure(tmp_path, "--rehearse")
    assert again.returncode == 0
    assert "exit code" not in again.stdout, "nothing ran a second time"


@pytest.mark.slow
def test_a_step_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR_LAB_AIRBENCH", str(tmp_path / "nowhere"))
    for _ in range(2):
        failed = measure(tmp_path, "--rehearse", "--only", "public")
        assert failed.returncode == 1
        assert "public, airbench94 failed; see " in failed.stderr
        assert json.loads((tmp_path / "public.json").read_text())["steps"] == []


@pytest.mark.slow
def test_without_a_gpu_only_a_rehearsal_is_possible(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    refused = measure(tmp_path / "out")
    assert refused.returncode == 2
    assert "--rehearse runs the stages on a CPU" in refused.stderr
    assert not (tmp_path / "out").exists()
