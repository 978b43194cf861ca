"""Which precision `precision=auto` is, and the script that gathers the evidence for it."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from cifar_lab import train
from cifar_lab.training import device as precision
from cifar_lab.training.device import EVIDENCE, accurate_and_faster, select_precision
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


def evidence(**networks: dict[str, float]) -> dict[str, Any]:
    return {"cpu with amx_bf16": {"bf16": {"networks": networks}}}


def test_a_precision_that_is_as_accurate_and_faster_is_taken_where_it_was_measured() -> None:
    found = evidence(small=network(speed=1.4), large=network(difference=-0.3, speed=2.1))
    taken = accurate_and_faster("cpu with amx_bf16", found)
    assert taken is not None
    assert (taken.precision, taken.slowest, taken.fastest) == ("bf16", 1.4, 2.1)
    assert accurate_and_faster("cpu", found) is None


@pytest.mark.parametrize(
    "bad",
    [
        network(difference=-0.6),  # the interval reaches -1.1 points
        network(half_width=1.1),
        network(seeds=4),
        network(speed=0.9),
    ],
    ids=["less accurate", "uncertain", "too few seeds", "slower"],
)
def test_one_network_without_evidence_is_enough_to_stay_with_fp32(bad: dict[str, float]) -> None:
    assert accurate_and_faster("cpu with amx_bf16", evidence(good=network(), bad=bad)) is None


def test_auto_follows_the_kind_of_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CIFAR_LAB_PRECISION")
    table = json.loads(EVIDENCE.read_text())
    for kind in ("cpu", *table):
        monkeypatch.setattr(precision, "device_kind", lambda device, kind=kind: kind)
        found = accurate_and_faster(kind, table)
        assert select_precision("auto", "cpu") == ("fp32" if found is None else found.precision)
        assert select_precision("fp32", "cpu") == "fp32"
    monkeypatch.setattr(precision, "device_kind", lambda device: "cpu")
    assert select_precision("auto", "cpu") == "fp32"  # a CPU that computes bf16 by emulation


def test_evidence_of_ones_own_is_followed_and_a_wrong_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = precision.device_kind("cpu")
    file = tmp_path / "evidence.json"
    monkeypatch.setenv("CIFAR_LAB_PRECISION", str(file))
    file.write_text(json.dumps({kind: {"bf16": {"networks": {"small": network()}}}}))
    words = ["dataset=digits", f"output_dir={tmp_path / 'runs'}", "device=cpu"]
    (run,) = compose_checked(words).runs
    assert run.config.precision == "bf16"
    assert f"(auto: on a {kind} as accurate as fp32, and 1.8 to 1.8 times as fast)" in (
        precision.explain_precision("bf16", "cpu")
    )
    wrong: tuple[dict[str, Any], ...] = (
        {kind: 3},
        {kind: {"bf16": {}}},
        {kind: {"fp8": {"networks": {"small": network()}}}},
    )
    for content in (*map(json.dumps, wrong), "{"):
        file.write_text(content)
        assert train.main(words) == 2
        assert f"CIFAR_LAB_PRECISION={file} is no table of" in capsys.readouterr().err
    file.unlink()
    assert train.main(words) == 2
    assert "No such file" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


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
