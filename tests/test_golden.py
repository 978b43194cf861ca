"""Results stay what they are, or RESULTS_VERSION is raised with them: see tests/golden.py."""

import json

import golden

from cifar_lab.version import RESULTS_VERSION


def test_results_change_only_with_the_results_version() -> None:
    stored = json.loads(golden.FILE.read_text(encoding="utf-8"))
    assert stored["results_version"] == RESULTS_VERSION, "run python tests/golden.py"
    now = golden.compute()
    differences = golden.changes(stored, now)
    assert differences == [], "results changed: raise RESULTS_VERSION, then python tests/golden.py"
    assert {part: [*now[part]] for part in now if part != "results_version"} == {
        part: [*stored[part]] for part in stored if part != "results_version"
    }


def test_the_golden_file_notices_a_change() -> None:
    stored = json.loads(golden.FILE.read_text(encoding="utf-8"))
    a_loss = "adam, dropout: train_loss 2"
    for part, name in (("drawn", "split 0"), ("counted", "loss"), ("trained", a_loss)):
        value = stored[part][name]
        other = f"{value}0" if part == "drawn" else value * 1.001
        changed = {**stored, part: {**stored[part], name: other}}
        assert golden.changes(stored, changed) == [name]
