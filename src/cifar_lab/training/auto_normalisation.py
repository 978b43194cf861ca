"""`dataset.mean=auto` and `dataset.std=auto`: the statistics of the training split, as numbers."""

import dataclasses

from cifar_lab.config.run_config import RunConfig
from cifar_lab.datasets.pixel_statistics import pixel_statistics
from cifar_lab.errors import UsageError
from cifar_lab.training.build import load_dataset
from cifar_lab.training.splits import split_indices

_COMPUTED: dict[tuple[str, bytes], tuple[list[float], list[float]]] = {}


def with_numbers(settings: RunConfig) -> RunConfig:
    """Return the config with numbers in place of `auto`; this loads the data if there is one.

    They are computed on the training split alone, so that no held-out image decides, and rounded to
    four decimals: the same on every machine, so that the same command finds the same run. Raises
    UsageError for a channel whose pixels are all the same.
    """
    dataset = settings.dataset
    if dataset.mean != "auto" and dataset.std != "auto":
        return settings
    arrays = load_dataset(dataset)
    indices, *_ = split_indices(settings.split, arrays.train_labels, arrays.test_labels)
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
    dataset = dataclasses.replace(
        dataset,
        computed=[name for name in ("mean", "std") if getattr(dataset, name) == "auto"],
        mean=means if dataset.mean == "auto" else dataset.mean,
        std=stds if dataset.std == "auto" else dataset.std,
    )
    return dataclasses.replace(settings, dataset=dataset)
