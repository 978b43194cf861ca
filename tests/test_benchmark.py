import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cifar_lab import benchmark
from cifar_lab.analysis.description import multiply_adds
from cifar_lab.errors import Unavailable
from cifar_lab.throughput import our_loops, report, timing
from cifar_lab.training.build import build_model
from cifar_lab.training.preflight import compose_checked

TINY = ["dataset=digits", "model.widths=[4,8]", "model.hidden=16", "training.batch_size=16"]


def loop(name: str, step: Callable[[], int], start_seconds: float = 0.0) -> timing.Loop:
    steps = iter(step, None)
    turn = functools.partial(timing.rate, steps, synchronise=lambda: None)
    return timing.Loop(name, name, name, turn, start_seconds)


def counter(steps: list[str], name: str) -> timing.Loop:
    def step() -> int:
        steps.append(name)
        return 10

    return loop(name, step)


def pausing(name: str, seconds: float, start_seconds: float = 0.0) -> timing.Loop:
    def step() -> int:
        time.sleep(seconds)
        return 1

    return loop(name, step, start_seconds)


def test_loops_take_turns_and_ratios_are_taken_round_by_round() -> None:
    steps: list[str] = []
    speeds = timing.measure([counter(steps, "a"), counter(steps, "b")], seconds=0.5)
    turns = [name for name, before in zip(steps, ["", *steps], strict=False) if name != before]
    assert turns[:6] == ["a", "b", "a", "b", "a", "b"]
    assert len(speeds[0].rates) == len(speeds[1].rates) == len(turns) // 2 - 1  # less the warm-up
    speeds[0].rates, speeds[1].rates = [10.0, 30.0, 20.0], [5.0, 10.0, 20.0]
    ratio = timing.ratio(speeds, "a", "b")
    assert ratio is not None
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 1.5, 2.5)
    assert timing.ratio(speeds, "a", "missing") is None


def test_a_loop_that_does_not_work_here_is_a_row_with_its_reason() -> None:
    def fails() -> int:
        raise RuntimeError("no compiler\nlong story")

    broken, works = timing.measure([loop("compile", fails), counter([], "a")], seconds=0.1)
    assert broken.problem == "RuntimeError: no compiler"
    assert broken.images_per_second is None
    assert works.images_per_second is not None


def test_what_does_not_fit_into_the_time_is_left_out() -> None:
    shown: list[str] = []
    loops = [pausing("fast", 0.01), pausing("slow", 0.6), pausing("also fast", 0.01)]
    started = time.perf_counter()
    speeds = timing.measure(loops, seconds=2.0, show=shown.append)
    assert time.perf_counter() - started < 3.0
    assert [speed.left_out for speed in speeds] == [False, True, False]
    assert [len(speed.rates) >= 3 for speed in speeds] == [True, False, True]
    assert {"fast", "slow", "also fast"} == set(shown)


def test_a_loop_that_starts_slowly_is_not_started_without_time_for_it() -> None:
    shown: list[str] = []
    loops = [pausing("first", 0.01), pausing("slow start", 0.01, start_seconds=5.0)]
    assert timing.measure(loops, seconds=0.5, show=shown.append)[1].left_out
    assert "slow start" not in shown
    measured = timing.measure(loops, seconds=0.5, required=["slow start"])
    assert len(measured[1].rates) >= 3


def test_a_benchmark_ends_near_its_time_and_says_what_was_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert benchmark.main([*TINY, "--seconds", "0.5", "threads=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("measuring convnet on digits with ")
    assert lines[-1].startswith("left out, for lack of time (0.5 s): ")
    assert "; plain data alone, 2 workers" in lines[-1]


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_json_and_a_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = "bound,epoch,data,plain_0,plain_data_0,matmul"
    files = ["--json", f"{tmp_path}/speed.json", "--figure", f"{tmp_path}/speed.png"]
    assert benchmark.main([*TINY, "--seconds", "1", "--only", only, *files]) == 0
    printed = capsys.readouterr().out
    assert "our data alone / plain data alone, 0 workers" in printed
    written = json.loads((tmp_path / "speed.json").read_text())
    assert [s["name"] for s in written["speeds"]] == only.split(",")
    assert all(s["images_per_second"] > 0 and len(s["rates"]) >= 3 for s in written["speeds"])
    assert {(r["name"], r["over"]) for r in written["ratios"]} == {
        ("epoch", "bound"),
        ("epoch", "plain_0"),
        ("data", "plain_data_0"),
    }
    assert written["run"]["images"] == "real"
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_multiply_adds_are_those_of_forward_and_backward() -> None:
    config = compose_checked([*TINY, "model.widths=[4]"]).runs[0].config
    first, second = 9 * 1 * 4 * 32 * 32, 9 * 4 * 4 * 32 * 32
    dense = 4 * 16 * 16 * 16 + 16 * 10
    # backward: for weights and for inputs, but the images need no gradient
    assert multiply_adds(config, 10, backward=True) == 2 * first + 3 * (second + dense)


def test_images_that_are_out_of_reach_are_replaced_and_the_report_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def out_of_reach(*_: object) -> None:
        raise Unavailable("digits cannot be had")

    monkeypatch.setattr(our_loops, "load_splits", out_of_reach)
    config = compose_checked(TINY).runs[0].config
    measured = report.benchmark(config, seconds=0.2, only=["data"])
    assert measured.run["images"] == "synthetic (digits cannot be had)"
    assert measured.speeds[0].images_per_second


@pytest.mark.slow
@pytest.mark.real_data
def test_our_epoch_is_near_the_bound_and_faster_than_a_plain_loop() -> None:
    """Ratios only, and the best of three tries, because other programs share the machine."""
    config = compose_checked(["threads=1"]).runs[0].config
    only = ["bound", "epoch", "data", "plain_0", "plain_data_0"]
    best: dict[tuple[str, str], float] = {}
    for _ in range(3):
        for ratio in report.benchmark(config, seconds=30, only=only).ratios:
            pair = (ratio.name, ratio.over)
            best[pair] = max(best.get(pair, 0.0), ratio.median)
        if best["epoch", "bound"] >= 1 / 1.10 and best["epoch", "plain_0"] >= 1.5:
            break
    assert best["epoch", "bound"] >= 1 / 1.10, best
    assert best["epoch", "plain_0"] >= 1.5, best
    assert best["data", "plain_data_0"] >= 8, best


@pytest.mark.slow
def test_the_profile_counts_the_operations_of_a_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "benchmark.json"
    words = [*TINY, "--seconds", "0.1", "--only", "epoch", "--profile", "--json", str(file)]
    assert benchmark.main(words) == 0
    output = capfd.readouterr()
    assert "operation of the training epoch" in output.out
    assert output.err == ""  # the profiler's own messages are silenced
    profile = json.loads(file.read_text())["profile"]
    operations = {row["name"]: row for row in profile["operations"]}
    model = build_model(compose_checked(TINY).runs[0].config, 10)
    kinds = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)
    norms = sum(isinstance(layer, kinds) for layer in model.modules())
    assert operations["aten::native_batch_norm_backward"]["calls"] == pytest.approx(norms, rel=0.05)
    assert 0 < profile["busy"] <= 1.0
    assert sum(row["share"] for row in operations.values()) == pytest.approx(profile["busy"])
    times = [row["milliseconds"] for row in profile["operations"]]
    assert times == sorted(times, reverse=True)
