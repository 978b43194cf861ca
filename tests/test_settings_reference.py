"""The reference of all settings: complete, current, and right about what makes another run."""

import json
import runpy
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from cifar_lab import describe
from cifar_lab.config.compose import compose
from cifar_lab.config.identity import address
from cifar_lab.config.reference import find_settings
from cifar_lab.config.run_config import flatten, load, to_plain

ROOT = Path(__file__).resolve().parent.parent


def test_the_pages_are_current_and_in_the_sites_navigation() -> None:
    pages = runpy.run_path(str(ROOT / "scripts" / "update_settings"))["pages"]()
    written = [ROOT / "docs" / "settings.md", *(ROOT / "docs" / "settings").glob("*.md")]
    texts = {path: path.read_text(encoding="utf-8") for path in written}
    assert texts == pages, "run scripts/update_settings"
    navigation = (ROOT / "docs" / "zensical.toml").read_text(encoding="utf-8")
    assert [p for p in written if f'"{p.relative_to(ROOT / "docs")}"' not in navigation] == []


def test_every_setting_of_the_default_run_is_listed_with_a_meaning() -> None:
    listed = {row.key for row in find_settings()}
    assert [row.key for row in find_settings() if not row.meaning] == []
    free = ("choices.", "dataset.checksums.", "dataset.computed", "dataset.relative_to")
    none = ("scheduler", "tracker")  # by default there is none
    for key in flatten(to_plain(compose([]).runs[0].config)):
        if not key.endswith("_target_") and not key.startswith(free) and key not in none:
            assert key in listed


@pytest.mark.parametrize(
    ("override", "identity"),
    [
        ("optimizer.lr=0.5", True),
        ("training.epochs=3", True),
        ("dataset.source.stall_seconds=5", False),
        ("training.keep_last=false", False),
        ("figures.samples.random_count=2", False),
    ],
)
def test_identity_is_what_changes_the_folder(override: str, identity: bool) -> None:
    assert find_settings(override.partition("=")[0])[0].identity == identity
    folders = {address(compose(words).runs[0].config) for words in ([], [override])}
    assert (len(folders) == 2) == identity


def test_the_command_lists_a_group_or_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert describe.main(["--settings", "optimizer.lr"]) == 0
    printed = capsys.readouterr().out
    assert "optimizer.lr = 0.001" in printed
    assert "optimizer.betas" not in printed
    assert describe.main(["--settings", "optimizer"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("optimizer.momentum = ") == 1  # a row a key


def test_kept_runs_fit_the_schema_and_wrong_values_do_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert describe.main(["--schema"]) == 0
    validator = jsonschema.Draft202012Validator(json.loads(capsys.readouterr().out))
    for path in sorted((ROOT / "docs" / "results").rglob("config.yaml")):
        validator.validate(to_plain(load(path)))
    config: dict[str, Any] = to_plain(compose(["dataset=digits"]).runs[0].config)
    validator.validate(config)
    for wrong in ({"epochz": 3}, {"epochs": -1}, {"epochs": "many"}):
        assert not validator.is_valid({**config, "training": {**config["training"], **wrong}})
    del config["dataset"]
    assert not validator.is_valid(config)
