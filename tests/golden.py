"""What decides results, in small: computed here, and compared with tests/golden_results.json.

After a change that is meant to change results, raise RESULTS_VERSION and write the file again:
`python tests/golden.py`. It refuses if nothing has changed, so that the version is not raised
without need and everybody's finished runs stay valid.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cifar_lab
from cifar_lab.config.data_config import AugmentationConfig, SplitConfig
from cifar_lab.datasets.pictures import Preparation, read_picture
from cifar_lab.figures.reliability import calibration
from cifar_lab.runs.metrics import Predictions, scores_by_class
from cifar_lab.training import augment, batches
from cifar_lab.training.group import dropout_mask
from cifar_lab.training.splits import Split, split_indices
from cifar_lab.version import RESULTS_VERSION

FILE = Path(__file__).with_name("golden_results.json")
TOLERANCE = 1e-4
"""For losses and logits: their last bits differ between kinds of CPU and versions of torch."""

TINY = (
    *("dataset=digits", "model.widths=[4,8]", "model.hidden=16", "training.batch_size=32"),
    *("training.epochs=2", "figures=none", "device=cpu", "precision=fp32", "threads=1"),
)
RUNS = {
    "adam, dropout": (
        *("optimizer=adam", "dropout=standard", "augmentation=crop_flip", "split.validation=1000"),
    ),
    "sgd, mixed images, averages": (
        *("optimizer=sgd", "dropout=none", "split.validation=1000", "scheduler=one_cycle"),
        *("augmentation=mixup", "augmentation.cutmix=1.0", "augmentation.erasing=0.5"),
        *("training.ema=0.9", "training.lookahead.every=3", "training.label_smoothing=0.1"),
        "evaluation.views=moved",
    ),
    "muon, classes weighed": (
        *("optimizer=muon", "training.class_weights=balanced", "training.clip_grad_norm=1.0"),
        *("training.monitor=val_macro_f1", "augmentation=cutout"),
        *("augmentation.flips=alternating", "split.folds=3", "split.fold=1"),
    ),
}


def digest(*arrays: Any) -> str:
    """Return 16 hex digits of the types, shapes and contents of arrays or tensors."""
    total = hashlib.sha256()
    for array in arrays:
        plain = array.numpy() if isinstance(array, Tensor) else np.asarray(array)
        total.update(f"{plain.dtype} {plain.shape}\n".encode() + np.ascontiguousarray(plain).data)
    return total.hexdigest()[:16]


def drawn() -> dict[str, str]:
    """Return what is drawn and counted: the same on every machine, bit for bit."""
    labels = np.random.RandomState(0).randint(0, 7, 500)
    methods = ("stratified", "random", "tail", "numpy")
    splits = [SplitConfig(validation=0.17, method=m, seed=3) for m in methods]  # type: ignore[arg-type]
    splits += [SplitConfig(method="stratified", seed=1, folds=3, fold=2)]
    splits += [SplitConfig(validation=50, source="test")]
    result = {
        f"split {n}": digest(*split_indices(s, labels, labels[:200])) for n, s in enumerate(splits)
    }
    images = torch.arange(40 * 3 * 12 * 12).remainder(251).to(torch.uint8).view(40, 3, 12, 12)
    split = Split("train", images, torch.arange(40) % 5, torch.arange(1, 38))
    for sampler in ("permutation", "subset", "weighted"):
        for mode, flips in (("reflect", "random"), ("zeros", "alternating")):
            augmentation = AugmentationConfig(
                crop_padding=2,
                horizontal_flip=True,
                padding_mode=mode,  # type: ignore[arg-type]
                flips=flips,  # type: ignore[arg-type]
            )
            epochs = batches.Batches(
                split,
                batch_size=9,
                seed=5,
                normalisation=batches.Normalisation(None, None),
                augmentation=augmentation,
                num_classes=5,
                sampler=sampler,
            )
            parts = [torch.cat(part) for part in zip(*epochs.epoch(2), strict=True)]
            result[f"batches, {sampler}, {mode}"] = digest((parts[0] * 255).round(), parts[1])
    generator = torch.Generator().manual_seed(7)
    result["cutout"] = digest(augment.sample_cutout(50, 5, (12, 12), generator))
    result["erasing"] = digest(augment.sample_erasing(50, 0.5, (12, 12), generator))
    mask = dropout_mask(torch.ones(7, 3, 5, 5), 0.3, generator)
    result["dropout"] = digest(mask > 0)
    with tempfile.TemporaryDirectory() as folder:
        from PIL import Image

        path = Path(folder) / "picture.png"
        Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(path)
        result["decoded"] = digest(read_picture(path, Preparation((3, 8, 8), "crop")))
    return result


def counted() -> dict[str, float]:
    """Return the metrics of given logits."""
    draw = np.random.RandomState(1)
    logits = draw.randn(200, 6).astype(np.float32) * 3
    labels = np.where(draw.rand(200) < 0.6, logits.argmax(1), draw.randint(0, 6, 200))
    scored = Predictions(logits, labels.astype(np.int64), np.arange(200))
    balanced, macro_f1 = scores_by_class(scored.labels, scored.predicted)
    calibrated = calibration(scored)
    assert calibrated is not None
    return {
        "accuracy": scored.accuracy,
        "loss": scored.loss,
        "balanced accuracy": balanced,
        "macro F1": macro_f1,
        "calibration error": calibrated.error,
        "most confused": scored.most_confused()[0][2],
    }


def trained(folder: Path) -> dict[str, float]:
    """Return losses, accuracies and logits of short runs."""
    result: dict[str, float] = {}
    for name, words in RUNS.items():
        run = cifar_lab.run(*TINY, *words, f"output_dir={folder}", "name=golden")
        for column in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            for epoch, value in enumerate(run.metrics[column], start=1):
                result[f"{name}: {column} {epoch}"] = float(value or 0)
        with np.load(run.path / "predictions.npz") as arrays:
            logits = arrays["logits"]
        result[f"{name}: mean of the logits' squares"] = float((logits**2).mean())
        result |= {f"{name}: logit {n}": float(v) for n, v in enumerate(logits[0, :4])}
    return result


def compute() -> dict[str, Any]:
    """Return everything that the file holds."""
    with tempfile.TemporaryDirectory() as folder:
        values = {"drawn": drawn(), "counted": counted(), "trained": trained(Path(folder))}
    return {"results_version": RESULTS_VERSION, **values}


def changes(stored: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the names of the values that differ: exact ones at all, others by TOLERANCE."""
    names = [name for name in stored["drawn"] if now["drawn"].get(name) != stored["drawn"][name]]
    for part in ("counted", "trained"):
        for name, value in stored[part].items():
            close = abs(now[part].get(name, np.inf) - value) <= TOLERANCE * max(1, abs(value))
            names += [] if close else [name]
    return names


def main() -> int:
    """Write the file anew; refuse where the version and the results do not change together."""
    now = compute()
    if FILE.exists():
        stored = json.loads(FILE.read_text(encoding="utf-8"))
        raised = stored["results_version"] != RESULTS_VERSION
        differences = changes(stored, now)
        same_names = [stored[part].keys() == now[part].keys() for part in stored if part in now][1:]
        if raised != bool(differences) and all(same_names):
            print(f"RESULTS_VERSION is {RESULTS_VERSION}; changed results: {differences or 'none'}")
            return 1
    FILE.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
