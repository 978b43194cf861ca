"""The reference of all settings: complete, current, and right about what makes another run."""

from pathlib import Path

import pytest

from cifar_lab import describe
from cifar_lab.config.compose import compose
from cifar_lab.config.identity import address
from cifar_lab.config.reference import find_sections, settings_page
from cifar_lab.config.run_config import flatten, to_plain

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == settings_page(), "run scripts/update_settings"


def test_every_setting_of_the_default_run_is_listed_with_a_meaning() -> None:
    listed = {s.key: s for section in find_sections() for s in section.settings}
    assert [key for key, setting in listed.items() if not setting.meaning] == []
    free = ("choices.", "dataset.checksums.", "dataset.computed", "dataset.relative_to")
    none = ("scheduler", "tracker")  # by default there is none
    for key in flatten(to_plain(compose([]).runs[0].config)):
        if not key.endswith("_target_") and not key.startswith(free) and key not in none:
            assert key in listed


@pytest.mark.parametrize(
    ("override", "identity"),
    [
        ("seed=1", True),
        ("optimizer.lr=0.5", True),
        ("training.epochs=3", True),
        ("dataset.source.stall_seconds=5", False),
        ("training.keep_last=false", False),
        ("figures.samples.random_count=2", False),
        ("threads=1", False),
    ],
)
def test_identity_is_what_changes_the_folder(override: str, identity: bool) -> None:
    (section, *_) = find_sections(override.partition("=")[0])
    assert section.settings[0].identity == identity
    folders = {address(compose(words).runs[0].config) for words in ([], [override])}
    assert (len(folders) == 2) == identity


def test_the_command_lists_a_group_or_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert describe.main(["--settings", "training"]) == 0
    printed = capsys.readouterr().out
    assert "training.epochs = 10" in printed
    assert "a whole number, at least 0; part of the run's identity" in printed
    assert "optimizer.lr" not in printed
    assert describe.main(["--settings", "optimizer.lr"]) == 0
    printed = capsys.readouterr().out
    assert "optimizer.lr = 0.001" in printed
    assert "optimizer.betas" not in printed
    assert describe.main(["--settings", "optimizer"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("optimizer.momentum = ") == 1  # a row a key, options apart
    assert "optimizer=adam (default)" in printed
    assert "optimizer.lr=0.01, optimizer.momentum=0.9" in printed
