"""Runs on a GPU that is not there: `tests/emulated` compiles one, and its checks run on it."""

import subprocess
import sys
from pathlib import Path

import pytest
from emulated import build




@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the emulated device is compiled on Linux only")
@pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
def test_the_checks_of_the_emulated_device_pass() -> None:
    build.library()
    # In a process of its own: torch can be given another device once per process.
    checks = str(TESTS / "emulated" / "checks.py")
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", checks]
    ran = subprocess.run(line, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-8000:]
    assert " passed" in ran.stdout
    assert "skipped" not in ran.stdout
