"""What decides a result besides the config: RESULTS_VERSION and the files of the targets."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cifar_lab.runs.provenance import other_code, reuse_note
from cifar_lab.runs.summary import RunSummary

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import json, sys
from pathlib import Path
from cifar_lab.training.preflight import compose_checked
from cifar_lab.runs.provenance import code_version

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
from cifar_lab.runs import provenance
from cifar_lab.runs.summary import RunSummary

commit = sys.argv[1] or provenance.commit()
made = RunSummary("finished", 0, {}, "sound", "cpu", "fp32", results_version=1, commit=commit)
print(commit, provenance.reuse_note(made))
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
