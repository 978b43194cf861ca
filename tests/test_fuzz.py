"""Random command lines and damaged run folders: one line, a right exit code, nothing written.

`python tests/fuzz_runner.py --lines N:M` repeats lines by their numbers.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fuzz_lines import DIRECTED, Generator
from fuzz_runner import REFUSED, Case, judge

PARTS = 8
RUNNER = Path(__file__).with_name("fuzz_runner.py")


def fuzzed(folder: Path, *arguments: str) -> dict[str, Any]:
    """Return the report of a process of its own: it forks, which pytest's process should not."""
    line = [sys.executable, str(RUNNER), "--folder", str(folder), *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def check(report: dict[str, Any], lines: int) -> None:
    assert report["lines"] == lines
    assert report["broken"] == []
    assert {"0", "2"} <= set(report["codes"])


def test_lines_and_damaged_folders_are_answered(tmp_path: Path) -> None:
    report = fuzzed(tmp_path, "--directed", "--lines", "0:60", "--damages", "0:10")
    check(report, len(DIRECTED) + 70)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_many_lines_are_answered(part: int, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    size = pytestconfig.getoption("--fuzz-lines") // PARTS
    first, damages = part * size, size // 4
    numbers = ["--lines", f"{first}:{first + size}"]
    numbers += ["--damages", f"{part * damages}:{(part + 1) * damages}"]
    check(fuzzed(tmp_path, *numbers), size + damages)


def test_a_line_follows_from_its_number_alone() -> None:
    one, other = Generator(0), Generator(0)
    lines = [one.line(number) for number in range(300)]
    assert [other.line(number) for number in reversed(range(300))] == lines[::-1]
    assert len({tuple(line) for line in lines}) > 250
    assert Generator(1).line(0) != lines[0]


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ({"code": None}, "hang, or the process ended"),
        ({"code": 2, "err": "Traceback (most recent call last)\ncifar_lab: x\n"}, "traceback"),
        ({"code": 2, "err": "cifar_lab: x\n", "changed": ["run"]}, "changed files"),
        ({"code": 2, "err": "a\ncifar_lab: x\n"}, "2 lines"),
        ({"code": 3, "err": f"cifar_lab: {'x' * 301}\n"}, "a long message"),
        ({"code": 2, "err": "x\n"}, "no message"),
        ({"code": 2, "err": "cifar_lab: x\n", "out": "x"}, "output before a refusal"),
        ({"code": 5}, "exit code 5"),
        ({"code": 0}, "not refused"),
    ],
)
def test_the_judge_sees_every_fault(answer: dict[str, Any], fault: str) -> None:
    said = {"out": answer.pop("out", ""), "err": answer.pop("err", "")}
    judged = judge(0, Case([], label=REFUSED), **{"cpu": 0.0, "changed": [], **answer}, said=said)
    assert fault in judged.faults
