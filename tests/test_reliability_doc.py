"""docs/reliability.md names tests for every kind and fault, and each of them exists."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TABLE = (TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for part in ("What comes from outside", "Faults")
    for line in TABLE.partition(f"## {part}")[2].partition("\n## ")[0].splitlines()
    if line.startswith("| ") and not line.startswith(("| kind |", "| fault |"))
]


def named_tests(cell: str) -> list[tuple[str, str]]:
    """The files and patterns in a cell: `file.py`, `file.py::test_begin...` and `...middle...`."""
    found, file = [], ""
    for name in re.findall(r"`([^`]+)`", cell):
        path, _, test = name.rpartition("::") if "::" in name else (name, "", "")
        if not path.endswith(".py"):
            path, test = file, name
        file = path
        found.append((file, re.escape(test).replace(r"\.\.\.", r"\w*")))
    return found


@pytest.mark.parametrize("row", ROWS, ids=[row[0][:40] for row in ROWS])
def test_each_fault_names_tests_that_exist(row: list[str]) -> None:
    assert len(row) == 4, "a | in a cell is written \\|"
    assert named_tests(row[3])
    for file, test in named_tests(row[3]):
        names = re.findall(r"^def (test_\w+)", (TESTS / file).read_text(encoding="utf-8"), re.M)
        assert any(re.fullmatch(test or r"\w+", name) for name in names), f"{file}::{test}"
