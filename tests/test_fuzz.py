"""Random command lines of all commands: one line, a right exit code, nothing written.

What breaks a rule is in the message with its number, which alone makes it again.
"""

from pathlib import Path

import pytest
from fuzz_lines import Generator
from fuzz_runner import answer, faults, prepare

from cifar_lab.runs.run_dir import RunDir

pytestmark = pytest.mark.filterwarnings("ignore")  # as they are for a user
PARTS = [-1, *(pytest.param(part, marks=pytest.mark.slow) for part in range(8))]
"""Eight parts of --fuzz-lines, and before them a few lines of each kind in the fast tier."""


@pytest.fixture(scope="module")
def template(tiny_finished: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz").resolve() / "template"
    prepare(folder, tiny_finished)
    return folder


@pytest.mark.parametrize("part", PARTS)
def test_lines_are_answered(part: int, template: Path, pytestconfig: pytest.Config) -> None:
    generator, codes = Generator(0), set()
    total = pytestconfig.getoption("--fuzz-lines")
    few = range(24)
    for number in few if part < 0 else range(part * total // 8, (part + 1) * total // 8):
        words = generator.line(number)
        said = answer(words, template)
        codes.add(said.code)
        assert list(faults(said, words)) == [], (number, words, said)
    assert {0, 2} <= codes
