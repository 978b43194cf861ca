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
