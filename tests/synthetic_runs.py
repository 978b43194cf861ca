"""Run folders as training leaves them, without the training: for tests of what reads folders."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from sklearn.metrics import classification_report

from cifar_lab.config import run_config
from cifar_lab.runs.metrics import EpochMetrics, Predictions
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.summary import RunSummary, queued

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
OPTIMIZERS = {
    "sgd": {"_target_": "torch.optim.SGD", "lr": 0.01, "momentum": 0.9},
    "adam": {"_target_": "torch.optim.Adam", "lr": 1e-3},
}


def dataset_config(**settings: Any) -> dict[str, Any]:
    """Return the config of CIFAR-10, with other settings."""
    source = {"_target_": "cifar_lab.datasets.cifar10.load"}
    known = {"name": "cifar10", "source": source, "image_shape": [3, 32, 32], "classes": CLASSES}
    return known | settings


def plain_config(
    folder: Path,
    *,
    optimizer: str = "adam",
    activation: str = "relu",
    lr: float | None = None,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    target_config = OPTIMIZERS[optimizer] | ({} if lr is None else {"lr": lr})
    return {
        "dataset": dataset_config(),
        "model": {"_target_": "cifar_lab.models.convnet.ConvNet"},
        "optimizer": target_config,
        "activation": {"_target_": f"torch.nn.{activation}"},
        "training": {"epochs": 5},
        "seed": seed,
        "choices": {"model": "convnet", "optimizer": optimizer, "activation": activation},
        "output_dir": str(folder),
    } | settings


def history(epochs: int, height: float, seed: int = 0, *, validated: bool = True) -> Any:
    noise = np.random.default_rng(seed).normal(0, 0.003, epochs)
    rows = []
    for i in range(epochs):
        progress = 1 - math.exp(-3 * (i + 1) / max(epochs, 1))
        accuracy = 0.1 + (height - 0.1) * progress + float(noise[i])
        rows.append(
            EpochMetrics(
                epoch=i + 1,
                learning_rate=1e-3,
                train_loss=2.3 * (1 - 1.1 * height * progress),
                train_accuracy=accuracy + 0.02,
                val_loss=2.3 * (1 - height * progress) if validated else None,
                val_accuracy=accuracy if validated else None,
                seconds=2.0 + i,
                images_per_second=1000.0,
            )
        )
    return rows


def predictions(images: int, accuracy: float, seed: int, *, first: int = 0) -> Predictions:
    """Return predictions of which a share is right: on hard images a net is wrong, on easy right.

    What is hard is the same for all seeds, so that nets agree as they do in life.
    """
    hardness = np.random.default_rng(7).uniform(0, 1, images)
    draw = np.random.default_rng([seed, 11])
    labels = np.random.default_rng(8).integers(0, 10, images)
    right = hardness + draw.normal(0, 0.05, images) < accuracy
    guess = np.where(right, labels, (labels + 1 + draw.integers(0, 3, images)) % 10)
    logits = draw.normal(0, 0.5, (images, 10))
    logits[np.arange(images), guess] += 4 + draw.uniform(0, 2, images)
    return Predictions(
        logits.astype(np.float32), labels, np.arange(first, first + images, dtype=np.int64)
    )


def make_run(folder: Path, **options: Any) -> RunDir:
    """Return a run folder whose scores are near `accuracy`; see `_write_run` for the options."""
    with mock.patch("os.fsync"):  # a test's folder need not survive a power cut
        return _write_run(folder, **options)


def _write_run(
    folder: Path,
    *,
    accuracy: float = 0.7,
    status: str = "finished",
    images: int = 500,
    validated: bool = True,
    samples: bool = False,
    summary: dict[str, Any] | None = None,
    **settings: Any,
) -> RunDir:
    run = RunDir.create(run_config.parse(plain_config(folder, **settings)))
    seed = run.read_config().seed
    epochs = run.read_config().training.epochs
    known: dict[str, Any] = {"status": status}
    if status in ("finished", "running", "interrupted", "failed"):
        rows = history(epochs if status == "finished" else 2, accuracy, seed, validated=validated)
        run.rewrite_metrics(rows)
        known |= {"epochs": len(rows), "threads": 1, "device": "cpu"}
    if status == "failed":
        known["error"] = "RuntimeError: the loss is not finite in epoch 3"
    if status == "finished":
        key = abs(hash_of(run)) % 2**31
        test = predictions(images, accuracy - 0.01, key, first=10_000)
        run.write_predictions(test, "test", "scored")
        run.write_predictions(test, "test", "last")
        of_classes: Any = {"labels": range(len(CLASSES)), "target_names": CLASSES}
        of_classes |= {"zero_division": 0.0, "output_dict": True}
        report = classification_report(test.labels, test.predicted, **of_classes)
        run.report_json.write_text(json.dumps(report))
        known |= {
            "per_class_accuracy": {name: report[name]["recall"] for name in CLASSES},
            "test_accuracy": test.accuracy,
            "test_accuracy_last": test.accuracy,
            "test_loss": test.loss,
            "test_size": images,
            "scored_weights": "best" if validated else "last",
            "parameters": 1000,
            "seconds": 20.0,
        }
        if validated:
            found = predictions(images, accuracy, key + 1)
            run.write_predictions(found, "validation", "scored")
            best = max(rows, key=lambda row: row.val_accuracy)
            known |= {"best_epoch": best.epoch, "best_val_loss": best.val_loss}
            scored = [min(row.val_accuracy, found.accuracy) for row in rows]
            scored[best.epoch - 1] = found.accuracy
            rows = [replace(row, val_accuracy=v) for row, v in zip(rows, scored, strict=True)]
            run.rewrite_metrics(rows)
            known["best_val_accuracy"] = found.accuracy
        if samples:
            write_samples(run, test)
    base = {
        name: getattr(queued(run.read_config()), name) for name in RunSummary.__dataclass_fields__
    }
    run.write_summary(RunSummary(**(base | known | (summary or {}))))
    return run


def write_samples(run: RunDir, test: Predictions, count: int = 8) -> None:
    wrong = np.flatnonzero(test.predicted != test.labels)[:count]
    chosen = np.concatenate([np.arange(count), wrong])
    shades = np.random.default_rng(1).integers(0, 256, (len(chosen), 3, 4, 4), dtype=np.uint8)
    run.write_arrays(
        run.samples_file,
        images=shades.repeat(8, axis=2).repeat(8, axis=3),
        labels=test.labels[chosen],
        logits=test.logits[chosen],
        indices=test.indices[chosen],
        kind=np.array(["random"] * count + ["worst"] * len(wrong)),
    )


def hash_of(run: RunDir) -> int:
    """Return a number that belongs to the folder's address and no run of Python changes."""
    return int(run.path.name.rsplit("-", 1)[-1], 16)


def make_grid(folder: Path, seeds: int = 3, **settings: Any) -> list[RunDir]:
    """Return the runs of 2 optimizers x 2 activations x 3 learning rates x seeds."""
    runs = []
    optimizers, activations = (("sgd", 0.60), ("adam", 0.65)), (("ReLU", 0.05), ("Tanh", 0.0))
    rates = ((1e-4, -0.1), (1e-3, 0.0), (1e-2, 0.02))
    cells = itertools.product(optimizers, activations, rates, range(seeds))
    for (optimizer, base), (activation, gain), (lr, more), seed in cells:
        accuracy = base + gain + more + 0.004 * (seed - 1)
        chosen = {"optimizer": optimizer, "activation": activation, "lr": lr, "seed": seed}
        runs.append(make_run(folder, accuracy=accuracy, **chosen, **settings))
    return runs
