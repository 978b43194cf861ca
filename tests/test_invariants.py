"""What no rearrangement of the code may change: addresses, tables, old checkpoints, results."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import golden
import pytest
import torch

from cifar_lab import summarize, train
from cifar_lab.config.identity import address
from cifar_lab.config.run_config import load
from cifar_lab.runs.summary import RunSummary, other_code, reuse_note
from cifar_lab.version import RESULTS_VERSION

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
OLD = Path(__file__).resolve().parent / "data" / "old_run"
COMPARE = Path("scripts", "compare_commits")


def test_the_kept_results_are_at_the_addresses_of_their_configs() -> None:
    runs = [path.parent for path in RESULTS.glob("*/*/config.yaml")]
    assert len(runs) >= 38
    moved = {run.name: found for run in runs if (found := address_of(run)) != run.name}
    assert moved == {}


def address_of(run: Path) -> str:
    return address(load(run / "config.yaml")).name


def test_the_kept_summary_is_made_again_to_the_character(tmp_path: Path) -> None:
    """Columns that it had not yet (of the differences) may stand between those that it has."""
    folder = tmp_path / "default"
    shutil.copytree(RESULTS / "default", folder)
    (folder / "summary.csv").unlink()
    assert summarize.main([str(folder)]) == 0
    kept = rows_of(RESULTS / "default" / "summary.csv")
    again = [
        {name: text for name, text in row.items() if name in kept[0]}
        for row in rows_of(folder / "summary.csv")
    ]
    assert again == kept
    assert [*again[0]] == [*kept[0]], "in the order of the kept columns"


def test_a_run_begun_by_old_code_is_resumed_and_ends_as_it_would_have_then(tmp_path: Path) -> None:
    """Commit 4b54fb0 wrote the run, stopped after 8 of 17 steps of epoch 2, and the expected rows.

    The tolerances allow for other CPUs and torch versions: with SSE4.1 in place of AVX, the
    training loss moved by 5e-7 and the validation loss by 5e-4. Leaving out Adam's moments or step
    counts, dropout's generator, batch norm's buffers, the scheduler, the step or the running sums
    moved at least one column by more than its tolerance.
    """
    shutil.copytree(OLD, tmp_path / "old_run")
    (run,) = (path.parent for path in (tmp_path / "old_run").glob("*/last.pt"))
    before = torch.load(run / "last.pt", weights_only=True)
    assert (before["epoch"], before["step"]) == (1, 8)
    (row_before,) = rows_of(run / "metrics.csv")

    assert train.main([str(run), f"output_dir={tmp_path}", "accept_code=true"]) == 0

    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["test_accuracy"] == pytest.approx(104 / 360, abs=0.006)
    first, second = rows_of(run / "metrics.csv")
    assert first == row_before
    _, expected = rows_of(OLD / "expected_metrics.csv")
    tolerances = {
        "epoch": 0.0,
        "learning_rate": 1e-9,
        "train_loss": 5e-5,
        "train_accuracy": 1.5 / 1077,
        "val_loss": 2e-3,
        "val_accuracy": 2.5 / 360,
    }
    for column, tolerance in tolerances.items():
        wanted = pytest.approx(float(expected[column]), rel=0, abs=tolerance)
        assert float(second[column]) == wanted, column
    after = torch.load(run / "last.pt", weights_only=True)
    assert set(after) - set(before) == {"dataset", "best_checksum"}, "keys of later versions"
    assert set(before) <= set(after)
    assert layout(after["model"]) == layout(before["model"])
    assert len(after["optimizer"]["state"]) == len(before["optimizer"]["state"])
    for index, state in before["optimizer"]["state"].items():
        assert layout(after["optimizer"]["state"][index]) == layout(state)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def layout(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.slow
def test_compare_commits_finds_equal_commits_equal_and_others_not(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    command = ["git", "clone", "--quiet", str(ROOT), str(clone)]
    if subprocess.run(command, check=False).returncode != 0:
        pytest.skip("not a git checkout")
    shutil.copy(ROOT / COMPARE, clone / COMPARE)

    def compare(*words: str) -> tuple[int, str]:
        line = [sys.executable, str(COMPARE), *words]
        done = subprocess.run(line, cwd=clone, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    code, said = compare("HEAD", "HEAD", "--only", "resumed from A")
    assert code == 0, said
    assert "equal" in said
    with (clone / "src" / "cifar_lab" / "models" / "convnet.py").open("a") as handle:
        handle.write("_forward = ConvNet.forward\n")
        handle.write("ConvNet.forward = lambda self, images: 1.001 * _forward(self, images)\n")
    code, said = compare("HEAD", "--only", "sgd")
    assert code == 1, said
    assert "metrics.csv train_loss" in said
    assert "address" not in said
    assert compare("no-such-commit")[0] == 2
    trees = subprocess.run(["git", "worktree", "list"], cwd=clone, capture_output=True, text=True)
    assert len(trees.stdout.splitlines()) == 1


# --- results stay what they are, or RESULTS_VERSION is raised with them ---------------------------


def test_results_change_only_with_the_results_version() -> None:
    stored = json.loads(golden.FILE.read_text(encoding="utf-8"))
    assert stored["results_version"] == RESULTS_VERSION, "run python tests/golden.py"
    now = golden.compute()
    differences = golden.changes(stored, now)
    assert differences == [], "results changed: raise RESULTS_VERSION, then python tests/golden.py"
    assert {part: [*now[part]] for part in now if part != "results_version"} == {
        part: [*stored[part]] for part in stored if part != "results_version"
    }


# --- what decides a result besides the config -----------------------------------------------------

SCRIPT = """
import json, sys
from pathlib import Path
from cifar_lab.training.preflight import compose_checked
from cifar_lab.runs.summary import code_version

config = compose_checked([*sys.argv[2:], "device=cpu"]).runs[0].config
found = [code_version(config)]
for path in map(Path, sum(json.loads(sys.argv[1]), [])):
    text = path.read_text()
    path.write_text(text + "\\n_CHANGED = 1\\n")
    found.append(code_version(config))
    path.write_text(text)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, whose files may be edited."""
    folder = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src" / "cifar_lab", folder / "src" / "cifar_lab", ignore=ignored)
    shutil.copytree(ROOT / "conf", folder / "conf", ignore=ignored)
    return folder / "src" / "cifar_lab"


@pytest.mark.slow
def test_ones_own_modules_count_with_what_they_import(package: Path, tmp_path: Path) -> None:
    """The code version before, and after a line more in each of the files."""
    (tmp_path / "my_models").mkdir()
    (tmp_path / "my_models" / "__init__.py").write_text("")
    (tmp_path / "my_models" / "net.py").write_text(
        "from cifar_lab.models.two_branch import TwoBranch\n"
        "from my_models import parts\n"
        "import my_constants\n"
        "class Net(TwoBranch):\n"
        "    def extra_repr(self):\n"
        "        from . import late\n"
    )
    for name in ("my_models/parts.py", "my_models/late.py", "my_models/unused.py"):
        (tmp_path / name).write_text("X = 1\n")
    (tmp_path / "my_constants.py").write_text("X = 1\n")
    counting = ["my_models/net.py", "my_models/parts.py", "my_models/late.py", "my_constants.py"]
    counting = [*(str(tmp_path / n) for n in counting), str(package / "models/two_branch.py")]
    others = [str(tmp_path / "my_models/unused.py"), str(package / "models/convnet.py")]
    line = ["dataset=digits", "model=two_branch", "dropout=none"]
    line += ["trust=[my_models]", "model._target_=my_models.net.Net"]
    command = [sys.executable, "-c", SCRIPT, json.dumps([counting, others]), *line]
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stderr
    before, *after = json.loads(ran.stdout)
    assert [version != before for version in after] == [True] * 5 + [False] * 2


STARTED: dict[str, Any] = {
    "status": "finished",
    "seed": 0,
    "choices": {},
    "protocol": "sound",
    "device": "cpu",
    "precision": "fp32",
}


def summary_of(**fields: Any) -> RunSummary:
    return RunSummary(**{**STARTED, **fields})


def test_another_results_version_and_other_files_are_told_apart() -> None:
    assert other_code(summary_of(status="queued"), "1-abc") is None
    assert other_code(summary_of(results_version=1, targets_hash="abc"), "1-abc") is None
    difference = other_code(summary_of(results_version=1, targets_hash="abc"), "2-abc")
    assert difference == "results version 1, this is 2"
    difference = other_code(summary_of(results_version=1, targets_hash="abc"), "1-def")
    assert difference == "its model's or optimizer's files have the hash abc, now def"


def test_a_run_of_before_results_versions_counts_as_version_1() -> None:
    old = summary_of(code_hash="ba03026b6001")
    assert other_code(old, "1-abc") is None
    assert other_code(old, "2-abc") == "results version 1, this is 2"
    assert "counts as version 1" in (reuse_note(old) or "")


NOTE = """
import sys
from cifar_lab.runs.summary import RunSummary, commit, reuse_note

commit = sys.argv[1] or commit()
made = RunSummary("finished", 0, {}, "sound", "cpu", "fp32", results_version=1, commit=commit)
print(commit, reuse_note(made))
"""


def test_an_edited_training_loop_is_named_when_a_finished_run_is_used_again(package: Path) -> None:
    git = ["git", "-C", str(package.parents[1]), "-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)

    def note(commit: str) -> tuple[str, str]:
        command = [sys.executable, "-c", NOTE, commit]
        environment = {**os.environ, "PYTHONPATH": str(package.parent)}
        answer = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert answer.returncode == 0, answer.stderr
        made_at, _, words = answer.stdout.strip().partition(" ")
        return made_at, words

    commit, answer = note("")
    assert answer == "None"
    (package / "figures" / "curves.py").write_text("")  # decides no result
    assert note(commit)[1] == "None"
    loop = package / "training" / "loop.py"
    loop.write_text(loop.read_text() + "\n_CHANGED = 1\n")
    assert note(commit)[1] == (
        f"it was made at commit {commit}, this is {commit}+, and the code of training or datasets "
        "differs"
    )
