"""What the README shows is what its commands print."""

import re
import shutil
from pathlib import Path

import pytest

from cifar_lab import summarize, train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_summary_is_that_of_the_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The sweep takes minutes: its runs are kept. `scripts/train` sees the machine's precision.
    shutil.copytree(ROOT / "docs" / "results" / "digits_sweep", tmp_path / "runs")
    monkeypatch.setenv("COLUMNS", "160")
    assert summarize.main([str(tmp_path / "runs")]) == 0
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    (shown,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    for line in filter(None, (" ".join(line.split()) for line in shown.splitlines())):
        assert any(other.startswith(line) for other in printed), line


def test_the_sweep_shown_is_that_of_the_kept_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = re.findall(r"scripts/train (-m .*?)  +#", README)
    assert train.main([*line.split(), "plan=list"]) == 0
    planned = set(re.findall(r"digits-convnet-\S+", capsys.readouterr().out))
    assert planned == {path.name for path in (ROOT / "docs/results/digits_sweep").glob("digits-*")}


def test_the_readme_is_short_and_names_every_command() -> None:
    from cifar_lab.__main__ import COMMANDS

    assert len(README.split()) < 660
    assert {name for name in COMMANDS if f"| `{name}" not in README} == set()
