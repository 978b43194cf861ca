"""What a dataset consists of: counts, class balance, pixel statistics, splits, steps."""

import numpy as np

from cifar_lab.config.run_config import RunConfig
from cifar_lab.datasets import ImageArrays
from cifar_lab.datasets.pixel_statistics import pixel_statistics
from cifar_lab.runs.text import align
from cifar_lab.training.build import normalisation
from cifar_lab.training.splits import Splits


def dataset_text(config: RunConfig, arrays: ImageArrays, splits: Splits) -> str:
    """Return counts, class balance, pixel statistics, splits and steps per epoch."""
    train, test = len(arrays.train_labels), len(arrays.test_labels)
    shape = "x".join(map(str, arrays.train_images.shape[1:]))
    lines = [
        f"dataset {config.dataset.name}: {train:,} training and {test:,} test images "
        f"({train + test:,} in total), {shape}, {len(splits.class_names)} classes",
        "",
        *_balance(arrays, splits),
        "",
        *_statistics(config, arrays),
        "",
        splits.checked,
        _steps(config, splits),
    ]
    return "\n".join(lines)


def _balance(arrays: ImageArrays, splits: Splits) -> list[str]:
    count = len(splits.class_names)
    columns = [np.bincount(arrays.train_labels, minlength=count)]
    columns.append(np.bincount(arrays.test_labels, minlength=count))
    rows = [["class", "train", "share", "test", "share"]]
    for label, name in enumerate(splits.class_names):
        row = [name]
        for column in columns:
            row += [f"{int(column[label]):,}", f"{column[label] / max(column.sum(), 1):.2%}"]
        rows.append(row)
    return align(rows, right=range(1, 5))


def _statistics(config: RunConfig, arrays: ImageArrays) -> list[str]:
    means, stds = pixel_statistics(arrays.train_images)
    configured = normalisation(config)
    mean, std = configured.mean, configured.std
    rows = [["channel", "computed mean", "configured", "computed std", "configured"]]
    for channel, (m, s) in enumerate(zip(means, stds, strict=True)):
        cells = [mean[channel] if mean else None, std[channel] if std else None]
        texts = ["none" if cell is None else f"{cell:g}" for cell in cells]
        rows.append([str(channel), f"{m:.8f}", texts[0], f"{s:.8f}", texts[1]])
    return align(rows, right=range(5))


def _steps(config: RunConfig, splits: Splits) -> str:
    size, evaluated = config.training.batch_size, config.evaluation.batch_size
    parts = [f"{-(-len(splits.train) // size):,} to train (batches of {size:,})"]
    if splits.validation is not None:
        parts.append(f"{-(-len(splits.validation) // evaluated):,} to validate")
    parts.append(f"{-(-len(splits.test) // evaluated):,} to test (batches of {evaluated:,})")
    return "steps of an epoch: " + ", ".join(parts)
