"""training.cuda_graph where nothing can be captured; tests/emulated and test_gpu.py capture."""

from pathlib import Path

import pytest
from tiny_runs import TINY, make

from cifar_lab.errors import UsageError
from cifar_lab.training.preflight import compose_checked


def test_auto_is_the_plain_step_and_moves_no_run(tmp_path: Path) -> None:
    plain = make(tmp_path)
    assert plain.path == make(tmp_path, "training.cuda_graph=auto").path
    assert plain.path != make(tmp_path, "training.cuda_graph=true").path
    with pytest.raises(UsageError, match=r"training\.cuda_graph=true is wrong: it must be auto or"):
        compose_checked([*TINY, "training.cuda_graph=true", "training.compile=true"])
