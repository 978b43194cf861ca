"""docs/reports.md names every row of the reports, and every command in it can be given."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from cifar_lab import compare, evaluate, summarize, train
from cifar_lab.analysis import description
from cifar_lab.runs.run_dir import find_runs
from cifar_lab.training.preflight import compose_checked

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "reports.md").read_text(encoding="utf-8")
ROWS = {"S0": 25, "S1": 28, "S2": 23, "S3": 12, "S4": 23}
QUOTED = re.findall(r"`([^`\n]+)`", PAGE)
COMMANDS = sorted({q for q in QUOTED if q.startswith("python -m cifar_lab.")})
SETTINGS = sorted({q for q in QUOTED if re.fullmatch(r"[a-z_.]+=\S+", q)})
FILES = sorted({q for q in QUOTED if re.fullmatch(r"(src|conf|tests|docs)/\S+", q)})
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
# settings that are refused alone: the rest of what they need
COMPANY = {"dataset.mean=[0.5,0.5,0.5]": ["dataset.std=[0.5,0.5,0.5]"]}


def words_of(command: str) -> tuple[str, list[str]]:
    name, *words = shlex.split(command.removeprefix("python -m cifar_lab."))
    return name, words


def test_every_row_stands_once() -> None:
    found = re.findall(r"^\| (S\d-\d\d) \|", PAGE, re.MULTILINE)
    expected = [f"{tag}-{n:02d}" for tag, count in ROWS.items() for n in range(1, count + 1)]
    assert found == expected


@pytest.mark.parametrize("file", FILES)
def test_file_is_there(file: str) -> None:
    assert (ROOT / file).is_file()


@pytest.mark.slow
def test_settings_are_known() -> None:
    for setting in SETTINGS:
        request = compose_checked(
            [setting, *COMPANY.get(setting, []), "device=cpu", "--cfg", "job"]
        )
        assert len(request.runs) == 1, setting


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if words_of(c)[0] in ("train", "describe", "benchmark")]
)
def test_command_composes(command: str) -> None:
    name, words = words_of(command)
    if "--images" in words:
        at = words.index("--images")
        assert description.choose_images(words[at + 1], 50000, 0)
        del words[at : at + 2]
    request = compose_checked([*words, "device=cpu"])
    assert request.runs, name


@pytest.mark.slow
def test_commands_on_folders_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["dataset=digits", "model.widths=[4,8]", "model.hidden=16", "training.epochs=1"]
    for seed in (0, 1):
        assert train.main([*small, "figures=none", "device=cpu", f"seed={seed}"]) == 0
    runs = iter([str(run.path) for run in find_runs(tmp_path)] * 50)
    mains = {"evaluate": evaluate.main, "summarize": summarize.main, "compare": compare.main}
    ran = 0
    for command in COMMANDS:
        name, words = words_of(command)
        if name not in mains:
            continue
        words = [next(runs) if word == "RUN_DIR" else word for word in words]
        folders = [word == "FOLDER" or word.startswith("outputs/") for word in words]
        words = ["outputs" if is_one else word for word, is_one in zip(words, folders, strict=True)]
        assert mains[name](words) == 0, (command, capsys.readouterr().err)
        ran += 1
    assert ran >= 6
    assert np.all([path.stat().st_size > 1000 for path in (tmp_path / "pictures").glob("*.png")])


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *PAGES])
def test_links_of_the_pages_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    missing = [link for link in links if "://" not in link]
    missing = [link for link in missing if not ((ROOT / page).parent / link).exists()]
    assert missing == []
