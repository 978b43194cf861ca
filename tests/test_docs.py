"""The pages: the site builds, links lead somewhere, and what they quote, name and list is so."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from fixtures import Capture, Patch

from cifar_lab import compare, describe, evaluate, summarize, train
from cifar_lab.analysis import description
from cifar_lab.config.compose import compose
from cifar_lab.config.identity import address
from cifar_lab.config.reference import find_settings
from cifar_lab.config.run_config import flatten, load, to_plain
from cifar_lab.runs.run_dir import find_runs
from cifar_lab.training.preflight import compose_checked

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.skipif(find_spec("zensical") is None, reason="the extra docs is not installed")
def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "build_docs"), str(tmp_path / "site")]
    build = subprocess.run(command, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stderr
    assert "No issues found" in build.stdout + build.stderr
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert "Run.load_model" in api


# --- what the README shows is what its commands print ---------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_summary_is_that_of_the_sweep(
    tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    # The sweep takes minutes: its runs are kept. `scripts/train` sees the machine's precision.
    shutil.copytree(ROOT / "docs" / "results" / "digits_sweep", tmp_path / "runs")
    monkeypatch.setenv("COLUMNS", "160")
    assert summarize.main([str(tmp_path / "runs")]) == 0
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    (shown,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    for line in filter(None, (" ".join(line.split()) for line in shown.splitlines())):
        assert any(other.startswith(line) for other in printed), line


def test_the_sweep_shown_is_that_of_the_kept_runs(capsys: Capture) -> None:
    (line,) = re.findall(r"scripts/train (-m .*?)  +#", README)
    assert train.main([*line.split(), "plan=list"]) == 0
    planned = set(re.findall(r"digits-convnet-\S+", capsys.readouterr().out))
    assert planned == {path.name for path in (ROOT / "docs/results/digits_sweep").glob("digits-*")}


def test_the_readme_is_short_and_names_every_command() -> None:
    from cifar_lab.__main__ import COMMANDS

    assert len(README.split()) < 660
    assert {name for name in COMMANDS if f"| `{name}" not in README} == set()


# --- the notebook in examples/ runs as it is ------------------------------------------------------

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path: Path) -> None:
    _, _, nbclient, nbformat = map(
        pytest.importorskip, ("pandas", "ipykernel", "nbclient", "nbformat")
    )
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()
    sys.modules.pop("ipykernel", None)  # it was imported here too, and turns this process's bars on
    assert len(list(tmp_path.glob("outputs/runs/*/summary.json"))) == 7
    outputs = [cell.get("outputs", []) for cell in notebook.cells]
    shown = [{k: v for o in cell for k, v in o.get("data", {}).items()} for cell in outputs]
    assert [number for number in (5, 6, 11, 15) if "image/png" not in shown[number]] == []
    assert "Ranking" in "".join(output.get("text", "") for output in outputs[8])
    assert "adam" in shown[10]["text/html"]
    assert shown[16]["text/plain"].splitlines()[0].split()[0] == "7"


def test_the_repository_has_one_address() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["urls"]["Repository"] in NOTEBOOK.read_text(encoding="utf-8")


# --- docs/reliability.md names tests for every kind and fault, and each of them exists ------------

RELIABILITY = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
FAULT_ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for part in ("What comes from outside", "Faults")
    for line in RELIABILITY.partition(f"## {part}")[2].partition("\n## ")[0].splitlines()
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


@pytest.mark.parametrize("row", FAULT_ROWS, ids=[row[0][:40] for row in FAULT_ROWS])
def test_each_fault_names_tests_that_exist(row: list[str]) -> None:
    assert len(row) == 4, "a | in a cell is written \\|"
    assert named_tests(row[3])
    for file, test in named_tests(row[3]):
        content = (ROOT / "tests" / file).read_text(encoding="utf-8")
        names = re.findall(r"^def (test_\w+)", content, re.M)
        assert any(re.fullmatch(test or r"\w+", name) for name in names), f"{file}::{test}"


# --- the reference of all settings ----------------------------------------------------------------


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
        ("dataset.source.stall_seconds=5", False),
        ("training.keep_last=false", False),
    ],
)
def test_identity_is_what_changes_the_folder(override: str, identity: bool) -> None:
    assert find_settings(override.partition("=")[0])[0].identity == identity
    folders = {address(compose(words).runs[0].config) for words in ([], [override])}
    assert (len(folders) == 2) == identity


def test_the_command_lists_a_group_or_a_key(capsys: Capture) -> None:
    assert describe.main(["--settings", "optimizer.lr"]) == 0
    printed = capsys.readouterr().out
    assert "optimizer.lr = 0.001" in printed
    assert "optimizer.betas" not in printed
    assert describe.main(["--settings", "optimizer"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("optimizer.momentum = ") == 1  # a row a key


def test_kept_runs_fit_the_schema_and_wrong_values_do_not(capsys: Capture) -> None:
    assert describe.main(["--schema"]) == 0
    validator = jsonschema.Draft202012Validator(json.loads(capsys.readouterr().out))
    for folder in (ROOT / "docs" / "results").iterdir():  # a run of each experiment
        for path in sorted(folder.rglob("config.yaml"))[:1]:
            validator.validate(to_plain(load(path)))
    config: dict[str, Any] = to_plain(compose(["dataset=digits"]).runs[0].config)
    validator.validate(config)
    for wrong in ({"epochz": 3}, {"epochs": -1}, {"epochs": "many"}):
        assert not validator.is_valid({**config, "training": {**config["training"], **wrong}})
    del config["dataset"]
    assert not validator.is_valid(config)


# --- docs/reports.md names every row of the reports, and every command in it can be given ---------

REPORTS = (ROOT / "docs" / "reports.md").read_text(encoding="utf-8")
ROWS_OF_REPORTS = {"S0": 25, "S1": 28, "S2": 23, "S3": 12, "S4": 23}
QUOTED = re.findall(r"`([^`\n]+)`", REPORTS)
COMMANDS = sorted({q for q in QUOTED if q.startswith("python -m cifar_lab.")})
SETTINGS = sorted({q for q in QUOTED if re.fullmatch(r"[a-z_.]+=\S+", q)})
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
# settings that are refused alone: the rest of what they need
COMPANY = {"dataset.mean=[0.5,0.5,0.5]": ["dataset.std=[0.5,0.5,0.5]"]}


def words_of(command: str) -> tuple[str, list[str]]:
    name, *words = shlex.split(command.removeprefix("python -m cifar_lab."))
    return name, words


def test_every_row_stands_once() -> None:
    found = re.findall(r"^\| (S\d-\d\d) \|", REPORTS, re.MULTILINE)
    expected = [
        f"{tag}-{n:02d}" for tag, count in ROWS_OF_REPORTS.items() for n in range(1, count + 1)
    ]
    assert found == expected


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
def test_commands_on_folders_run(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
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
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8"))
    places = [(ROOT / page).parent / link for link in links if "://" not in link]
    assert [place for place in places if not place.exists()] == []
