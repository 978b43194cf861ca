"""Pictures that are decoded once into mapped files: the same runs, and a cache that holds."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import tiny_sets
import torch
from PIL import Image

from cifar_lab.config.identity import address
from cifar_lab.datasets import ImageArrays, image_folder, pictures
from cifar_lab.errors import Unavailable, UsageError
from cifar_lab.runs import files
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.batches import read_images
from cifar_lab.training.build import load_splits
from cifar_lab.training.preflight import compose_checked
from cifar_lab.training.run import run_experiment

SHAPE = (3, 16, 16)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CIFAR_LAB_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sixty pictures of noise, of two classes, larger than they will be."""
    random = np.random.default_rng(0)
    for index in range(60):
        write(tmp_path / "pictures" / ("ant", "bee")[index % 2] / f"{index:02}.png", random)
    return tmp_path / "pictures"


def write(path: Path, random: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)


def load(folder: Path, root: Path, storage: image_folder.Storage, **options: Any) -> ImageArrays:
    return image_folder.load(
        root=root if storage != "memory" else root / "memory",  # two files, so as to compare them
        checksums={},
        path=str(folder),
        image_shape=SHAPE,
        storage=storage,
        **options,
    )


def caches(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob("decoded/pictures/*/contents.json"))


def count_decoding(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    decoded: list[str] = []
    before = pictures.decode

    def counted(opened: IO[bytes], *options: Any) -> Any:
        decoded.append(opened.name)
        return before(opened, *options)

    monkeypatch.setattr(pictures, "decode", counted)
    return decoded


def test_mapped_images_are_those_in_memory(folder: Path, root: Path) -> None:
    mapped, memory = load(folder, root, "mapped"), load(folder, root, "memory")
    assert tiny_sets.same(mapped, memory)
    assert isinstance(mapped.train_images, np.memmap)
    assert not mapped.train_images.flags.writeable
    assert mapped.checksums == memory.checksums
    assert mapped.mapped
    assert not memory.mapped


def test_size_decides_where_nothing_is_said(
    folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 60 * 3 * 16 * 16
    monkeypatch.setattr(image_folder, "LARGEST_IN_MEMORY", size)
    assert not load(folder, root, "auto").mapped
    monkeypatch.setattr(image_folder, "LARGEST_IN_MEMORY", size - 1)
    assert load(folder, root, "auto").mapped
    assert not load(folder, root, "memory").mapped


def test_pictures_are_decoded_once_and_anew_when_one_changes(
    folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = count_decoding(monkeypatch)
    mapped = load(folder, root, "mapped")
    pixels = np.array(mapped.train_images)
    assert len(decoded) == 60
    assert load(folder, root, "mapped").checksums == mapped.checksums
    assert load(folder, root, "auto").checksums == mapped.checksums
    assert len(decoded) == 60

    path = folder / "ant" / "00.png"
    state = path.stat()
    write(path, np.random.default_rng(1))
    path.write_bytes(path.read_bytes()[: state.st_size].ljust(state.st_size, b"\0"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    changed = load(folder, root, "mapped")
    assert changed.checksums != mapped.checksums, "noticed by the time of change alone"
    assert len(decoded) == 120
    assert len(caches(root)) == 1
    assert np.array_equal(mapped.train_images, pixels), "what is mapped stays"


def test_a_full_disk_and_a_folder_that_cannot_be_written(
    folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync_file", full)
        with pytest.raises(Unavailable, match=r"No space left on device\); set CIFAR_LAB_DATA"):
            load(folder, root, "mapped")
    assert not list(root.rglob("*.bin"))
    (root.parent / "file").write_text("")
    with pytest.raises(Unavailable, match=r"cannot be written .*dataset\.storage=memory"):
        load(folder, root.parent / "file" / "data", "mapped")


def break_pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"no picture")


@pytest.mark.parametrize("storage", ["memory", "mapped"])
def test_broken_pictures_are_listed_or_skipped(
    folder: Path, root: Path, storage: image_folder.Storage
) -> None:
    whole = load(folder, root, storage)
    names = ["ant/00.png", "ant/02.png", "bee/01.png"]
    break_pictures(folder, *names)
    with pytest.raises(UsageError, match=r"cannot be read .*\(one of 3 of the 60") as caught:
        load(folder, root, storage)
    assert all(name in str(caught.value) for name in names)
    assert "skip_broken=true" in str(caught.value)
    assert len(str(caught.value)) < 400
    for _ in range(2):  # the second time from the cache
        data = load(folder, root, storage, skip_broken=True)
        (warning,) = data.warnings
        assert warning.startswith("skipped 3 of the 60 pictures in ")
        assert "that cannot be read: ant/00.png" in warning
        # The others are in the set in which they were.
        for name in ("train", "test"):
            before = {image.tobytes() for image in getattr(whole, f"{name}_images")}
            after = {image.tobytes() for image in getattr(data, f"{name}_images")}
            assert after < before
            assert len(after) == len(getattr(data, f"{name}_labels"))
        assert len(data.train_labels) + len(data.test_labels) == 57
    with pytest.raises(UsageError, match="one of 3 of the 60 pictures"):
        load(folder, root, storage)
    with pytest.raises(
        UsageError, match=r"3 of the 60 pictures .* more than dataset\.source\.max_broken=2"
    ):
        load(folder, root, storage, skip_broken=True, max_broken=2)


LINE = (
    *("dataset=image_folder", "dataset.mean=auto", "dataset.std=auto", "augmentation=crop_flip"),
    *("model=convnet_plain", "model.widths=[2,4]", "model.hidden=8", "figures=none", "device=cpu"),
    *("threads=1", "training.epochs=2"),
)
SMALL = (
    *("dataset.image_shape=[3,16,16]", "augmentation.crop_padding=2", "split.validation=12"),
    *("training.batch_size=7", "evaluation.batch_size=5"),
)


def run_of(folder: Path, *overrides: str) -> RunDir:
    line = [*LINE, *SMALL, f"dataset.source.path={folder}", *overrides]
    return RunDir.create(compose_checked(line).runs[0].config)


def test_a_run_on_mapped_pictures_has_the_weights_of_one_in_memory(
    folder: Path, root: Path, tmp_path: Path
) -> None:
    runs = {}
    for storage in ("memory", "mapped"):
        run = run_of(folder, f"dataset.storage={storage}", f"output_dir={tmp_path / storage}")
        run_experiment(run)
        runs[storage] = run
    memory, mapped = runs["memory"], runs["mapped"]
    assert memory.path.name == mapped.path.name
    left, right = (torch.load(run.last, weights_only=True) for run in (memory, mapped))
    for name, tensor in left["model"].items():
        assert torch.equal(tensor, right["model"][name]), name
    assert left["dataset"] == right["dataset"]
    for name in ("test", "validation"):
        one, other = (run.read_predictions(name) for run in (memory, mapped))
        assert np.array_equal(one.logits, other.logits)
        assert np.array_equal(one.indices, other.indices)
    assert "mapped from a file, copied ahead of each step" in mapped.log_file.read_text()
    assert "images:" not in memory.log_file.read_text()


PEAK_OF_A_RUN = """
import re, sys, threading, time
from pathlib import Path
from cifar_lab import train

peak = 0

def watch():
    global peak
    while True:
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]))
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
assert train.main(sys.argv[2:]) == 0
Path(sys.argv[1]).write_text(str(peak * 1024))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_20_000_pictures_of_3_gb_train_in_less_than_1_5_gb(root: Path, tmp_path: Path) -> None:
    pictures, peak = tmp_path / "pictures", tmp_path / "peak"
    for index in range(20_000):  # no two are equal
        path = pictures / ("ant", "bee")[index % 2] / f"{index:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = (index % 256, index // 256, index % 7)
        Image.new("RGB", (224, 224), colour).save(path, compress_level=1)
    line = [*LINE, f"dataset.source.path={pictures}", "dataset.image_shape=[3,224,224]"]
    line += ["dataset.storage=mapped", "training.epochs=1", f"output_dir={tmp_path / 'out'}"]
    subprocess.run([sys.executable, "-c", PEAK_OF_A_RUN, str(peak), *line], check=True)
    images = (root / "decoded").rglob("*_images.bin")
    assert sum(file.stat().st_size for file in images) == 20_000 * 3 * 224 * 224
    assert int(peak.read_text()) < 1_500_000_000
    shutil.rmtree(root)  # pytest keeps the folders of three runs


def test_only_what_changes_the_images_changes_the_address() -> None:
    def place(*overrides: str) -> Path:
        data = ["dataset=image_folder", "dataset.source.path=somewhere"]
        line = [*data, "dataset.mean=null", "dataset.std=null", "device=cpu", *overrides]
        return address(compose_checked(line).runs[0].config)

    # As it was before there were these settings.
    assert place().name == "image_folder-convnet-adam-relu-lr0.001-seed0-7b6c8fa1"
    assert (
        place("dataset.storage=mapped", "dataset.source.max_broken=3", "dataset.max_megapixels=9")
        == place()
    )
    assert place("dataset.source.skip_broken=true") != place()


def test_parts_are_read_ahead_in_order_and_an_abandoned_reader_ends(
    folder: Path, root: Path, tmp_path: Path
) -> None:
    settings = run_of(
        folder, "dataset.storage=mapped", f"output_dir={tmp_path / 'out'}"
    ).read_config()
    split = load_splits(settings, "cpu").train
    assert split.ahead
    order = torch.tensor([5, 3, 3, 8, 0, 1, 2])
    parts = [slice(0, 3), slice(3, 4), slice(4, 100)]
    found = list(read_images(split, order, parts))
    for part, images in zip(parts, found, strict=True):
        assert torch.equal(images, split.images[order[part]])
    reader = read_images(split, order, parts)
    next(reader)
    reader.close()
