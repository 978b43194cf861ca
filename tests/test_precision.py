"""Which precision `precision=auto` is, and the script that gathers the evidence for it."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from cifar_lab.training import device as precision
from cifar_lab.training.device import EVIDENCE, select_precision
from cifar_lab.training.preflight import compose_checked

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "measure_precision"
REPORTS: list[Any] = [
    path.stem for path in sorted((SCRIPT.parents[1] / "conf" / "experiment").glob("s[0-9]_*.yaml"))
]


def slow(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow)


def network(
    difference: float = 0.1, half_width: float = 0.5, speed: float = 1.8, seeds: int = 5
) -> dict[str, float]:
    return {
        "seeds": seeds,
        "difference_points": difference,
        "half_width_points": half_width,
        "speed": speed,
    }


def decide(**networks: dict[str, float]) -> Any:
    """What the script makes of evidence for bf16."""
    return runpy.run_path(str(SCRIPT))["decide"]({"bf16": {"networks": networks}})


def test_the_script_decides_for_what_is_as_accurate_and_faster() -> None:
    decided = decide(small=network(speed=1.4), large=network(difference=-0.3, speed=2.1))
    assert decided == {"auto": "bf16", "speed": "1.4 to 2.1 times as fast"}
    for bad in (
        network(difference=-0.6),  # the interval reaches -1.1 points
        network(half_width=1.1),
        network(seeds=4),
        network(speed=0.9),
    ):
        assert decide(good=network(), bad=bad) == {}


def test_the_package_s_decisions_follow_from_its_evidence() -> None:
    for entry in json.loads(EVIDENCE.read_text()).values():
        decided = {key: entry.pop(key) for key in ("auto", "speed") if key in entry}
        assert runpy.run_path(str(SCRIPT))["decide"](entry) == decided


def test_auto_follows_the_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CIFAR_LAB_PRECISION")
    for kind, expected in (("cpu with avx512_bf16", "bf16"), ("cpu", "fp32"), ("mps", "fp32")):
        monkeypatch.setattr(precision, "device_kind", lambda device, kind=kind: kind)
        assert select_precision("auto", "cpu") == expected
        assert select_precision("fp32", "cpu") == "fp32"
    monkeypatch.setattr(precision, "device_kind", lambda device: "cpu with avx512_bf16")
    assert precision.explain_precision("fp32", "cpu") == ""
    assert precision.explain_precision("bf16", "cpu") == (
        " (auto: on a cpu with avx512_bf16 as accurate as fp32, and 1.4 to 1.7 times as fast)"
    )


def test_evidence_of_ones_own_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "evidence.json"
    monkeypatch.setenv("CIFAR_LAB_PRECISION", str(file))
    file.write_text(json.dumps({precision.device_kind("cpu"): {"auto": "bf16", "speed": ""}}))
    assert compose_checked(["dataset=digits", "device=cpu"]).runs[0].config.precision == "bf16"


@pytest.mark.parametrize("experiment", REPORTS[:1] + [slow(name) for name in REPORTS[1:]])
def test_the_experiments_of_the_reports_are_fp32_on_every_machine(
    experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "select_precision", lambda name, device: f"auto was {name}")
    assert {
        run.config.precision for run in compose_checked([f"experiment={experiment}", "-m"]).runs
    } == {"fp32"}


@pytest.mark.slow
def test_the_evidence_is_gathered_by_a_command_that_can_be_stopped_and_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(SCRIPT))
    words = [str(tmp_path), "--seeds", "2", "--only", "two_branch"]
    words += ["dataset=digits", "training.epochs=1", "threads=1"]
    script["main"](words)
    first = capsys.readouterr().out
    table = json.loads(first[first.index("{") :])
    ((_, entry),) = table.items()
    found = entry["bf16"]["networks"]["two_branch"]
    assert found["seeds"] == 2
    assert 0 <= found["accuracy"] <= 1
    assert found["speed"] > 0
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("best.pt")}
    assert len(finished) == 4
    script["main"](words)  # nothing is trained twice
    second = capsys.readouterr().out
    assert json.loads(second[second.index("{") :]) == table
    assert finished == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("best.pt")}
