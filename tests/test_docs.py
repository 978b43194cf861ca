"""The documentation site builds without a warning or a broken link."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

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
