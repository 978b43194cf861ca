"""Short names for the types of pytest's fixtures, so that a signature stays on its line."""

import pytest

Capture = pytest.CaptureFixture[str]
CaptureLog = pytest.LogCaptureFixture
Folders = pytest.TempPathFactory
Patch = pytest.MonkeyPatch
