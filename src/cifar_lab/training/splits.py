"""The training, validation and test splits: parts of a dataset as uint8 tensors on the device."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cifar_lab.config.data_config import DatasetConfig, SplitConfig
from cifar_lab.config.targets import build
from cifar_lab.datasets import ImageArrays, check_leaks, class_names
from cifar_lab.errors import UsageError, listing, shorten
from cifar_lab.training.device import free_memory


@dataclass(frozen=True)
class Split:
    """Some images of an official set: `images` uint8 (N, C, H, W) and `labels` int64 (N,) of the
    whole set on the device, and the `indices` int64 (M,) of those that belong to the split.

    The whole set is kept, not a copy of the part: parallel runs share its pages. `ahead`: the
    images are in memory of the host, or mapped from a file, and parts are copied ahead of time.
    """

    name: str
    images: Tensor
    labels: Tensor
    indices: Tensor
    ahead: bool = False

    @property
    def device(self) -> torch.device:
        """The device that the split's images are used on."""
        return self.labels.device

    def __len__(self) -> int:
        """Return M, the number of images."""
        return len(self.indices)


@dataclass(frozen=True)
class Splits:
    """The images that a run trains, validates and tests on; `validation` is None without any.

    `storage` says where images are that are not simply in the device's memory, and `verified` how
    much of them was compared with the checksums. `warnings` are about the images. `trained_on` are
    the indices of official test images with the pixels of a training image, and `test_files` the
    names of the files of all, if they came from files.
    """

    train: Split
    validation: Split | None
    test: Split
    official_test: Split
    class_names: tuple[str, ...]
    checked: str
    storage: str | None = None
    verified: str = "all"
    warnings: tuple[str, ...] = ()
    trained_on: tuple[int, ...] = ()
    test_files: Sequence[str] = ()


def load_arrays(dataset: DatasetConfig, root: Path) -> ImageArrays:
    """Return a dataset's arrays, checked against the facts in its config.

    Images smaller than `image_shape` are padded with zeros on all sides (MNIST at 32x32).
    """
    arrays: ImageArrays = build(
        dataset.located_source,
        "dataset.source",
        root=root,
        checksums=dataset.checksums,
        fit=dataset.fit,
        storage=dataset.storage,
        max_megapixels=dataset.max_megapixels,
    )
    channels, height, width = dataset.image_shape
    for name in ("train", "test"):
        images = getattr(arrays, f"{name}_images")
        expected = getattr(dataset, f"{name}_size")
        if expected is not None and len(images) != expected:
            raise UsageError(
                f"dataset.{name}_size={expected} is wrong: {dataset.name} has {len(images)} images"
            )
        if images.shape[1] != channels or images.shape[2] > height or images.shape[3] > width:
            right = ",".join(map(str, images.shape[1:]))
            raise UsageError(
                f"dataset.image_shape={dataset.image_shape}, but the images of {dataset.name} are "
                f"[{right}]; set 'dataset.image_shape=[{right}]'"
            )
    for name in ("classes", "display_names"):
        names = getattr(dataset, name)
        if names is not None:
            class_names(names, f"dataset.{name}")
        if names is not None and len(names) != len(arrays.class_names):
            raise UsageError(
                f"dataset.{name} has {len(names)} names, but {dataset.name} has "
                f"{len(arrays.class_names)} classes: {', '.join(arrays.class_names[:20])}"
            )
    dataset.check_limit(len(arrays.class_names), len(arrays.train_labels) - arrays.validation)
    return arrays if dataset.limit is None else _limited(arrays, dataset.limit)


def _limited(arrays: ImageArrays, limit: int) -> ImageArrays:
    """Return the arrays with only so many training images, each class in its share.

    A validation set of their own stays whole.
    """
    first = len(arrays.train_labels) - arrays.validation
    chosen = _choose(SplitConfig(), arrays.train_labels[:first], limit)
    kept = np.concatenate([chosen, np.arange(first, len(arrays.train_labels))])
    return replace(
        arrays,
        train_images=np.asarray(arrays.train_images[kept]),
        train_labels=arrays.train_labels[kept],
        known_checksums={k: v for k, v in arrays.known_checksums.items() if k.startswith("test")},
        known_equal=None,
        files=[arrays.files[i] for i in kept] + list(arrays.files[len(arrays.train_labels) :])
        if arrays.files
        else (),
    )


def make_splits(
    arrays: ImageArrays, dataset: DatasetConfig, split: SplitConfig, device: str
) -> Splits:
    """Divide the official sets and move them to the device; the parts are checked disjoint.

    Images that are too many for the device stay where they are, and are copied in parts.
    """
    (train, validation, test), leaks, trained_on = divide(arrays, split)
    size = arrays.train_images.nbytes + arrays.test_images.nbytes
    ahead = _reads_ahead(arrays.mapped, size, dataset.storage, device)
    official = {}
    for name in ("train", "test"):
        images = getattr(arrays, f"{name}_images")
        pixels = _to_device(images, dataset.image_shape, "cpu" if ahead else device)
        labels = torch.from_numpy(np.array(getattr(arrays, f"{name}_labels"), dtype=np.int64))
        official[name] = pixels, labels.to(device)

    def part(name: str, origin: str, indices: np.ndarray) -> Split:
        return Split(name, *official[origin], torch.from_numpy(indices), ahead)

    where = "mapped from a file" if arrays.mapped else "in the host's memory"
    use = "copied ahead of each step" if ahead else f"copied to {device}"
    storage = f"images: {size / 1e9:,.1f} GB, {where}, {use}"
    divided = train if split.source == "train" else test
    if len(np.intersect1d(validation, divided)):
        raise ValueError(f"the validation split shares images with the {split.source} split")
    return Splits(
        train=part("train", "train", train),
        validation=part("validation", split.source, validation) if len(validation) else None,
        test=part("test", "test", test),
        official_test=part("test", "test", np.arange(len(arrays.test_labels))),
        class_names=tuple(dataset.classes or arrays.class_names),
        checked=(
            f"splits verified disjoint: train {len(train):,}, validation {len(validation):,}, "
            f"test {len(test):,}"
        ),
        storage=storage if arrays.mapped or ahead else None,
        verified=arrays.verified,
        warnings=(*arrays.warnings, *leaks),
        trained_on=trained_on,
        test_files=arrays.files[len(arrays.train_labels) :],
    )


def divide(
    arrays: ImageArrays, split: SplitConfig
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], list[str], tuple[int, ...]]:
    """Return the indices of `split_indices`, warnings about them, and `trained_on` as in Splits.

    Raises UsageError if the division is impossible, or if the test images are trained on.
    """
    train, validation, test = split_indices(
        split, arrays.train_labels, arrays.test_labels, arrays.validation
    )
    first_test = len(arrays.train_labels)  # test images count on after the training images
    parts = {
        "training": train,
        "validation": validation + first_test * (split.source == "test"),
        "test": test + first_test,
    }
    labels = np.concatenate([arrays.train_labels, arrays.test_labels])
    warnings, trained_on = check_leaks(arrays.equal, parts, labels)
    for name, positions in parts.items():
        present = set(np.unique(labels[positions]).tolist())
        absent = [c for label, c in enumerate(arrays.class_names) if label not in present]
        if absent and len(positions):
            names = listing([shorten(name, 40) for name in absent], 80)
            warnings.append(f"there is no {name} image of {names}")
    return (train, validation, test), warnings, tuple(at - first_test for at in trained_on)


def split_indices(
    split: SplitConfig,
    train_labels: "np.ndarray[tuple[int], np.dtype[np.integer]]",
    test_labels: "np.ndarray[tuple[int], np.dtype[np.integer]]",
    official_validation: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the sorted indices of the training, validation and test images.

    Training and validation indices count within the official training set, unless `source` is
    "test": then validation and test divide the official test set (S0) and all the rest trains. If
    the last `official_validation` training images are a validation set of their own, they validate.
    """
    if official_validation:
        if split.folds is not None or split.source == "test":
            key = "split.folds" if split.folds is not None else "split.source=test"
            raise UsageError(
                f"{key} is wrong: the dataset has {official_validation:,} validation images of its "
                "own (val); move them to the training images first"
            )
        first = len(train_labels) - official_validation
        train, validation = np.arange(first), np.arange(first, len(train_labels))
        return train, validation, np.arange(len(test_labels))
    labels = train_labels if split.source == "train" else test_labels
    size = len(labels)
    count = split.count(size, f"the {split.source} set")
    validation = _choose(split, labels, count)
    # Sorted, so that reading a split goes through memory in one direction.
    rest = np.setdiff1d(np.arange(size), validation)
    if split.source == "train":
        return rest, validation, np.arange(len(test_labels))
    return np.arange(len(train_labels)), validation, rest


def _choose(split: SplitConfig, labels: np.ndarray, count: int) -> np.ndarray:
    size = len(labels)
    if split.method == "tail":
        return np.arange(size - count, size)
    if split.method == "numpy":  # numpy's old generator: it draws the very split of S0's code
        return np.sort(np.random.RandomState(split.seed).permutation(size)[:count])
    generator = np.random.default_rng(split.seed)
    classes, totals = np.unique(labels, return_counts=True)
    by_class = [np.flatnonzero(labels == label) for label in classes]
    if split.folds is not None:
        # Dealt out like cards, class after class: the numbers of a class in two folds differ by
        # one at most, as those of scikit-learn's StratifiedKFold do, and so do the folds' sizes.
        parts = [np.arange(size)] if split.method == "random" else by_class
        order = np.concatenate([generator.permutation(members) for members in parts])
        return np.sort(order[split.fold :: split.folds])
    if split.method == "random":
        return np.sort(generator.permutation(size)[:count])
    # Stratified: each class gives its share, and the largest remainders fill up to the count.
    exact = totals * count / size
    quota = np.floor(exact).astype(int)
    for index in np.argsort(quota - exact, kind="stable")[: count - quota.sum()]:
        quota[index] += 1
    quotas = zip(by_class, quota, strict=True)
    chosen = [generator.permutation(members)[:n] for members, n in quotas]
    return np.sort(np.concatenate(chosen)) if chosen else np.arange(0)


def _reads_ahead(mapped: bool, size: int, storage: str, device: str) -> bool:
    """Return whether parts of the images are copied to the device as they are needed.

    On a CPU those that are mapped; on a GPU those that would take more than half of its free
    memory, unless `dataset.storage` decides.
    """
    if device == "cpu":
        return mapped
    if storage != "auto":
        return storage == "mapped"
    return size > free_memory(device) // 2


def _to_device(images: np.ndarray, shape: Sequence[int], device: str) -> Tensor:
    with warnings.catch_warnings():
        # A map of a file is read-only, and nothing writes to the images of a dataset.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensor = torch.from_numpy(images).to(device)
    missing = [shape[1] - images.shape[2], shape[2] - images.shape[3]]
    if any(missing):
        (above, before) = (n // 2 for n in missing)
        tensor = functional.pad(tensor, [before, missing[1] - before, above, missing[0] - above])
    return tensor
