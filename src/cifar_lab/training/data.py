"""The data of a run: loaded once, known by their checksums, normalised by their own statistics."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cifar_lab.config.data_config import DatasetConfig
from cifar_lab.config.run_config import RunConfig, to_plain
from cifar_lab.datasets import ARRAYS, ImageArrays, pixel_statistics
from cifar_lab.datasets.store import data_root, files_digest
from cifar_lab.errors import Unavailable, UsageError
from cifar_lab.training.splits import Splits, divide, load_arrays, make_splits
from cifar_lab.training.step import check_class_weights

_LOADED: dict[str, ImageArrays] = {}
_COMPUTED: dict[tuple[str, bytes], tuple[list[float], list[float]]] = {}


def load_dataset(dataset: DatasetConfig) -> ImageArrays:
    """Return a dataset's arrays; the last dataset is kept for the run that follows its check."""
    key = json.dumps([to_plain(dataset), source_digest(dataset)], sort_keys=True)
    if key not in _LOADED:
        _LOADED.clear()
        _LOADED[key] = load_arrays(dataset, data_root())
    return _LOADED[key]


def source_digest(dataset: DatasetConfig) -> str | None:
    """Return a digest of the state of the user's files that the data come from, if any are there.

    It changes with names, sizes and times, and so without reading the files.
    """
    path = dataset.located_source.get("path")
    return files_digest(Path(path).expanduser()) if isinstance(path, str) else None


def check_data(config: RunConfig) -> None:
    """Load a run's dataset and divide it, before anything is written.

    Raises UsageError if the data are wrong, Unavailable if they cannot be fetched now.
    """
    arrays = load_dataset(config.dataset)
    divide(arrays, config.split)
    check_class_weights(config.training.class_weights, len(arrays.class_names))


def load_splits(config: RunConfig, device: str) -> Splits:
    """Load a run's dataset onto a device and divide it."""
    return make_splits(load_dataset(config.dataset), config.dataset, config.split, device)


# --- dataset.mean=auto and dataset.std=auto -------------------------------------------------------


def with_numbers(config: RunConfig) -> RunConfig:
    """Return the config with numbers in place of `auto`; this loads the data if there is one.

    They are computed on the training split alone, so that no held-out image decides, and rounded to
    four decimals: the same on every machine, so that the same command finds the same run. Raises
    UsageError for a channel whose pixels are all the same.
    """
    dataset = config.dataset
    if dataset.mean != "auto" and dataset.std != "auto":
        return config
    arrays = load_dataset(dataset)
    (indices, _, _), _, _ = divide(arrays, config.split)
    key = (arrays.checksums["train_images"], indices.tobytes())
    if key not in _COMPUTED:  # a sweep asks for every cell
        means, stds = pixel_statistics(arrays.train_images, indices)
        _COMPUTED[key] = ([round(m, 4) for m in means], [round(s, 4) for s in stds])
    means, stds = _COMPUTED[key]
    if dataset.std == "auto" and 0 in stds:
        raise UsageError(
            f"dataset.std=auto: the training pixels of channel {stds.index(0)} of {dataset.name} "
            "are all the same; set 'dataset.std=[...]'"
        )
    numbers: dict[Any, Any] = {"mean": means, "std": stds}
    computed = {name: n for name, n in numbers.items() if getattr(dataset, name) == "auto"}
    dataset = dataclasses.replace(dataset, computed=list(computed), **computed)
    return dataclasses.replace(config, dataset=dataset)


# --- whether they are still the same --------------------------------------------------------------


def data_record(dataset: DatasetConfig) -> dict[str, str]:
    """Return what a run records of its data: their name and the sha256 of each array.

    For data from a file or folder of the user, `files` is a digest of names, sizes and times.
    """
    files, arrays = source_digest(dataset), load_dataset(dataset)
    record = {"name": dataset.name, **arrays.checksums}
    return record if files is None else {**record, "files": files}


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
