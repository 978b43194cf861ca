"""The code hash covers every file that can change a result, and only these."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

HASHES = """
import json, sys
from pathlib import Path
from cifar_lab.training.preflight import compose_checked
from cifar_lab.config.targets import trust
from cifar_lab.runs.provenance import code_hash

package, options, edits = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
config = compose_checked([*options, "device=cpu"]).runs[0].config
found = {"": code_hash(config)}
for name, (old, new) in edits.items():
    path = package / name
    text = path.read_text()
    assert old in text, name
    path.write_text(text.replace(old, new, 1) if old else text + new)
    found[name] = code_hash(config)
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


def hashes(
    package: Path, edits: dict[str, tuple[str, str]], *options: str, cwd: Path | None = None
) -> dict[str, str]:
    """Return the hash as it is (under ""), and after each edit alone: (text, what replaces it).

    An empty text appends.
    """
    command = [sys.executable, "-c", HASHES, str(package), json.dumps(options), json.dumps(edits)]
    answer = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        cwd=cwd or package,
        env={**os.environ, "PYTHONPATH": str(package.parent)},
    )
    found: dict[str, str] = json.loads(answer.stdout)
    return found


CHANGE = ("", "\n_CHANGED = 1\n")


def test_every_file_that_can_change_a_result_changes_the_hash(package: Path) -> None:
    files = [*package.glob("training/*.py"), *package.glob("datasets/*.py")]
    names = [str(file.relative_to(package)) for file in files]
    assert {"datasets/held_out.py", "training/loop.py", "training/scoring.py"} <= {*names}
    names += ["runs/metrics.py", "models/convnet.py"]
    found = hashes(package, dict.fromkeys(names, CHANGE), "dataset=digits")
    assert [name for name in names if found[name] == found[""]] == []


def test_what_changes_no_result_leaves_the_hash(package: Path) -> None:
    docstring = '    """Return the docstring of another day."""\n    '
    edits = {
        "figures/curves.py": CHANGE,
        "analysis/statistics.py": CHANGE,
        "config/compose.py": CHANGE,
        "cli.py": CHANGE,
        "models/two_branch.py": CHANGE,  # another model than the run's
        "training/loop.py": ("", "\n# a comment\n"),
        "models/convnet.py": ('"""', '"""Another docstring. '),
        "runs/metrics.py": ("", '\n"""Text that nothing reads."""\n'),
        "training/device.py": ("    import torch\n", docstring + "import torch\n"),
    }
    found = hashes(package, edits, "dataset=digits")
    assert [name for name in edits if found[name] != found[""]] == []


def test_ones_own_modules_count_with_what_they_import(package: Path, tmp_path: Path) -> None:
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
    own = ["my_models/net.py", "my_models/parts.py", "my_models/late.py", "my_constants.py"]
    names = [str(tmp_path / name) for name in (*own, "my_models/unused.py")]
    edits = dict.fromkeys([*names, "models/two_branch.py", "models/convnet.py"], CHANGE)
    line = ["dataset=digits", "model=two_branch", "dropout=none"]
    line += ["trust=[my_models]", "model._target_=my_models.net.Net"]
    found = hashes(package, edits, *line, cwd=tmp_path)
    changed = [name for name in edits if found[name] != found[""]]
    assert changed == [*names[: len(own)], "models/two_branch.py"]
