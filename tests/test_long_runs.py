"""A thousand epochs: memory, open files and the time of an epoch stay as they were."""

import gc
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import train

from cifar_lab.runs.run_dir import RunDir

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc"),
]


def resident() -> int:
    """Return the bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def handles() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def train_a_thousand(folder: Path) -> tuple[Path, dict[int, tuple[int, int]]]:
    """Train in this process, which nothing else has used; return the run and what it held."""
    seen: dict[int, tuple[int, int]] = {}
    append = RunDir.append_metrics

    def watched(self: RunDir, row: Any) -> None:
        append(self, row)
        if row.epoch in (200, 1000):
            gc.collect()
            seen[row.epoch] = (resident(), handles())

    patch = pytest.MonkeyPatch()
    patch.setattr(RunDir, "append_metrics", watched)
    patch.setattr("cifar_lab.training.sanity_checks.after", lambda *arguments: [])
    few = ("dataset.limit=100", "split.validation=50", "training.batch_size=50")
    run = train(folder, *few, "model.widths=[2,2]", "model.hidden=4", "training.epochs=1000")
    return run.path, seen


def test_a_thousand_epochs(tmp_path: Path) -> None:
    # A process of its own: one that has run other tests has a heap that still fills again.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        path, seen = pool.submit(train_a_thousand, tmp_path).result()
    run = RunDir(path)
    (memory_before, open_before), (memory_after, open_after) = seen[200], seen[1000]
    assert memory_after - memory_before < 5_000_000
    assert open_after == open_before
    seconds = np.array([row.seconds for row in run.read_metrics()])
    assert len(seconds) == 1000
    assert np.median(seconds[-200:]) < 2 * np.median(seconds[100:300])
    assert run.metrics_file.stat().st_size < 200_000
    assert run.log_file.stat().st_size < 500_000
    assert len(list(run.path.iterdir())) < 25
