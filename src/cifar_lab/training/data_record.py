"""Which data a run was trained on, and whether they are still the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cifar_lab.config.data_config import DatasetConfig
from cifar_lab.datasets import ARRAYS
from cifar_lab.errors import Unavailable
from cifar_lab.runs.summary import RunSummary
from cifar_lab.training.build import load_dataset, source_digest


def data_record(dataset: DatasetConfig) -> dict[str, str]:
    """Return what a run records of its data: their name and the sha256 of each array.

    For data from a file or folder of the user, `files` is a digest of names, sizes and times.
    """
    files = source_digest(dataset)
    record = {"name": dataset.name, **load_dataset(dataset).checksums}
    return record if files is None else {**record, "files": files}


def recorded_data(checkpoint: Mapping[str, Any], summary: RunSummary) -> Mapping[str, str]:
    """Return the record in a checkpoint, or in the summary if an earlier version wrote it."""
    record = checkpoint.get("dataset")
    return record if isinstance(record, dict) else summary.dataset


def check_same_data(dataset: DatasetConfig, then: Mapping[str, str], run: Path) -> None:
    """Raise Unavailable if the data are not those that `run` recorded in `then`.

    A record of earlier versions may lack checksums; what it lacks is not compared.
    """
    now = data_record(dataset)
    for array in ARRAYS:
        if array in then and then[array] != now[array]:
            raise Unavailable(
                f"the data of dataset={dataset.name} have changed since {run} "
                f"({array}: sha256 {str(then[array])[:8]} then, {now[array][:8]} now); "
                "restore them, or train it again with rerun=true"
            )


def check_finished(dataset: DatasetConfig, then: Mapping[str, str], run: Path) -> None:
    """Do the same for a finished run, which may be used without its data.

    The data are read only if they are the user's own files and these have changed.
    """
    files = source_digest(dataset)
    if files is not None and files != then.get("files"):
        check_same_data(dataset, then, run)
