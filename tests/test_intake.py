"""What comes from outside: pictures of every mode, names of every kind, and equal images."""

import importlib.util
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures import Capture, CaptureLog, Patch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from cifar_lab import describe, evaluate, predict, train
from cifar_lab.datasets import (
    class_names,
    equal_images,
    image_folder,
    npz,
    pictures,
    trait_warnings,
)
from cifar_lab.datasets.pictures import Preparation, Traits, Unreadable
from cifar_lab.errors import UsageError, printable
from cifar_lab.runs.run_dir import RunDir

GREY = Preparation((1, 8, 8))
RAMP = np.linspace(0, 1, 64).reshape(8, 8)
EIGHT = (RAMP * 255).round()


def decode(content: bytes) -> np.ndarray:
    pixels: np.ndarray = pictures.decode(io.BytesIO(content), GREY)[0][0]
    return pixels


def reason(content: bytes) -> str:
    """Why the content is no picture, "" if it is one."""
    try:
        assert decode(content).shape == (8, 8)
    except Unreadable as error:
        return str(error)
    return ""


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def pgm(maximum: int) -> bytes:
    values = (RAMP * maximum).round().astype(">u2" if maximum > 255 else "u1")
    return f"P5\n8 8\n{maximum}\n".encode() + values.tobytes()


@pytest.mark.parametrize("maximum", [65535, 4095, 1023, 255, 100])
def test_a_pgm_is_scaled_by_its_maximum(maximum: int) -> None:
    assert np.abs(decode(pgm(maximum)).astype(int) - EIGHT).max() <= 1 + 255 / maximum


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_rotated_and_clear_where_the_file_says(kind: str) -> None:
    deep = Image.fromarray((RAMP * 65535).astype(np.uint16))
    assert np.abs(decode(saved(deep, kind)).astype(int) - EIGHT).max() <= 1
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    assert decode(saved(deep, kind, exif=turned))[0, 0] == 255


@pytest.mark.parametrize(
    ("picture", "why"),
    [
        (Image.fromarray((RAMP * 1e6).astype(np.int32)), "32-bit integers of no stated range"),
        (Image.fromarray(RAMP.astype(np.float32)), "floating-point numbers of no stated range"),
        (Image.new("LAB", (8, 8)), "LAB; save it as RGB"),
    ],
)
def test_a_picture_whose_range_is_unknown_is_refused(picture: Image.Image, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        decode(saved(picture, "TIFF"))
    with pytest.raises(UsageError, match=why):
        pictures.to_pixels(picture, GREY)


MODES = ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I;16", "I", "F")


def any_picture(mode: str, white: bool) -> Image.Image:
    if mode in ("I;16", "I", "F"):
        value = (1 if mode == "F" else 65535) if white else 0
        return Image.fromarray(
            np.full((8, 8), value, {"I;16": "<u2", "I": "<i4", "F": "<f4"}[mode])
        )
    picture = Image.new("RGBA", (8, 8), "white" if white else "black")
    if mode in ("HSV", "YCbCr", "CMYK", "RGBX", "1"):
        picture = picture.convert("RGB")
    return picture.convert("P" if mode == "PA" else mode)


@given(st.sampled_from(MODES), st.booleans(), st.sampled_from(pictures.FORMATS))
@settings(deadline=None)
def test_white_is_white_and_black_is_black_in_every_mode(mode: str, white: bool, kind: str) -> None:
    if mode in ("I", "F") and kind != "TIFF":
        return  # Pillow cuts its values off at 255, or is about to give it up (PNG)
    if (mode, kind) == ("YCbCr", "TIFF"):
        return  # Pillow cannot read what it writes
    try:
        content = saved(any_picture(mode, white), kind)
    except (OSError, ValueError, KeyError):
        return  # Pillow does not write this mode in this format
    if why := reason(content):
        assert "no stated range" in why
        assert mode in ("I", "F")
    else:
        assert abs(int(decode(content).mean()) - 255 * white) <= 2


@given(st.binary(max_size=400), st.sampled_from([pgm(4095), saved(any_picture("L", True), "PNG")]))
@settings(deadline=None)
def test_damaged_content_is_one_line_or_a_picture(noise: bytes, whole: bytes) -> None:
    for content in (noise, whole[:20] + noise, whole[: len(whole) // 2]):
        assert "\n" not in reason(content)


def test_a_torn_picture_is_broken_whatever_pillow_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    noise = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    (tmp_path / "a.jpg").write_bytes(saved(Image.fromarray(noise), "JPEG")[:900])
    with pytest.raises(UsageError, match="truncated"):
        pictures.read_picture(tmp_path / "a.jpg", GREY)
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_classes_that_differ_in_format_depth_or_size_are_warned_of() -> None:
    def warned(*traits: Traits) -> str:
        return "; ".join(trait_warnings([*traits] * 10, [0, 1] * 10, ("ant", "bee")))

    one = Traits("PNG", 8, (40, 40), 1.0)
    assert warned(one, one) == ""
    assert "the format of a picture tells its class" in warned(one, one._replace(format="JPEG"))
    assert "the depth of a picture tells its class" in warned(one, one._replace(bits=16))
    assert "40x40 mostly ant, 9x9 mostly bee" in warned(one, one._replace(size=(9, 9)))
    assert "of 10 pictures with more pages or frames" in warned(one, one._replace(several=True))
    dark = one._replace(bits=16, highest=1 / 16)
    assert "20 pictures of 16 bits are nearly black: they use 6.2%" in warned(dark, dark)
    sizes = [one._replace(size=(i, i)) for i in range(200)]  # of photographs cut by hand
    assert trait_warnings(sizes, [0, 1] * 100, ("ant", "bee")) == []


@given(st.text(max_size=12))
@settings(deadline=None)
def test_no_name_reaches_a_terminal_raw(text: str) -> None:
    shown = printable(text)
    assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in shown)
    assert shown.encode().decode() == shown
    assert printable(shown) == shown


def test_names_have_one_form_and_are_neither_empty_nor_equal() -> None:
    assert class_names([b"caf\xc3\xa9", "cafe"], "x") == ("café", "cafe")
    assert class_names(["a\x1b[31m", os.fsdecode(b"\xe9")], "x") == (r"a\x1b[31m", r"\xe9")
    for names in (["cat", "cat"], ["é", "e\u0301"], ["cat", " "]):
        with pytest.raises(UsageError, match=r"x: (two classes are called|the name of a class is)"):
            class_names(names, "x")


def write(folder: Path, names: Any, count: int = 6, first: int = 0, side: int = 8) -> Path:
    """Write pictures of noise, no two of which are equal."""
    for label, name in enumerate(names):
        place = os.path.join(os.fsencode(folder), os.fsencode(name))  # noqa: PTH118
        os.makedirs(place)  # noqa: PTH103
        for index in range(first, first + count):
            random = np.random.default_rng([label, index])
            pixels = random.integers(0, 25 * (label + 1), (side, side), dtype=np.uint8)
            with open(os.path.join(place, b"%d.png" % index), "wb") as file:  # noqa: PTH118, PTH123
                Image.fromarray(pixels).save(file, "PNG")
    return folder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: Patch) -> Path:
    monkeypatch.setenv("CIFAR_LAB_DATA", str(tmp_path / "data"))
    return tmp_path


def line(root: Path, folder: Path, *more: str) -> list[str]:
    data = ["dataset=image_folder", f"dataset.source.path={folder}", "dataset.image_shape=[1,8,8]"]
    small = ["model.widths=[2,4]", "model.hidden=8", "training.epochs=1", "figures=none"]
    return [*data, *small, "device=cpu", "threads=1", f"output_dir={root / 'out'}", *more]


def run_of(root: Path) -> RunDir:
    [summary] = (root / "out").rglob("summary.json")
    return RunDir(summary.parent)


NAMES = ("accuracy", "macro avg", "_x", "a\tb", "e\u0301", b"th\xe9", "no")


def test_names_are_values_in_results_and_every_command_takes_them(
    root: Path, capsys: Capture
) -> None:
    folder = write(root / os.fsdecode(b"b\xfccher"), NAMES)  # as Windows names it in a zip
    assert train.main(line(root, folder)) == 0
    run = run_of(root)
    shown = sorted(["accuracy", "macro avg", "_x", r"a\tb", "é", r"th\xe9", "no"])
    assert sorted(run.class_names()) == shown
    report = json.loads(run.report_json.read_text())
    assert [row["class"] for row in report["classes"]] == run.class_names()
    assert isinstance(report["accuracy"], float)
    assert len(run.read_report()) == len(NAMES)
    assert evaluate.main([str(run.path)]) == 0
    assert predict.main([str(run.path), str(folder)]) == 0
    said = capsys.readouterr()
    assert "\t" not in said.out + said.err
    assert "\x1b" not in said.out


def test_val_validates(root: Path, capsys: Capture) -> None:
    folder = root / "pics"
    for part, count, first in (("train", 9, 0), ("val", 4, 20), ("test", 3, 40)):
        write(folder / part, "ab", count, first)
    (folder / "Dev").mkdir()
    assert train.main(line(root, folder, "split.validation=0.5")) == 0
    said = capsys.readouterr()
    assert "disjoint: train 18, validation 8, test 6" in said.out
    assert f"skipped in {folder}: 1 folder Dev" in said.err
    assert train.main(line(root, folder, "split.folds=2", "split.fold=0")) == 2
    assert "validation images of its own (val)" in capsys.readouterr().err


def test_val_arrays_validate(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 3, 8, 8), dtype=np.uint8)
    parts = {"train": slice(0, 16), "val": slice(16, 22), "test": slice(22, 30)}
    arrays: dict[str, Any] = {f"{name}_images": images[part] for name, part in parts.items()}
    arrays |= {f"{name}_labels": np.arange(30)[part] % 2 for name, part in parts.items()}
    arrays["test_images"] = arrays["test_images"].transpose(0, 2, 3, 1)  # channels last
    where: dict[str, Any] = {"root": tmp_path, "path": str(tmp_path / "a.npz"), "checksums": {}}
    np.savez(tmp_path / "a.npz", **arrays, more=np.array([{}]))  # not read, so of any kind
    data = npz.load(**where, image_shape=(3, 8, 8))
    assert data.validation == 6
    assert data.warnings[0].endswith("that are not used: more")
    assert np.array_equal(data.train_images, images[:22])
    assert np.array_equal(data.test_images, images[22:])
    assert data.test_labels.tolist() == arrays["test_labels"].tolist()
    del arrays["val_labels"]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UsageError, match="holds no val_labels"):
        npz.load(**where, image_shape=(3, 8, 8))


def test_what_is_skipped_and_classes_without_images_are_warnings_of_the_run(root: Path) -> None:
    folder = write(root / "pics", "ab")
    write(folder, ["rare"], 1, 9)
    (folder / "a" / "x.HEIC").write_bytes(b"?")
    (folder / "a" / "._0.png").write_bytes(b"?")
    (folder / "b" / "inner").mkdir()
    (folder / "__MACOSX").mkdir()
    (folder / "loose.png").write_bytes(b"?")
    assert train.main(line(root, folder)) == 0
    warnings = run_of(root).read_summary().warnings
    kinds = "1 pictures outside of the classes, 1 .HEIC files, 1 folders"
    assert f"skipped in {folder}: {kinds}" in warnings
    assert any("there is no test image of rare" in warning for warning in warnings)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12), st.integers(1, 11))
@settings(deadline=None)
def test_equal_images_are_found_and_no_others(kinds: list[int], size: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 1, size, 3), dtype=np.uint8)[kinds]
    images[0, 0, 0, 0] ^= 1  # differs from its kin in one bit
    groups = equal_images(images[:1], images[1:])
    expected = {
        tuple(i for i in range(1, len(kinds)) if kinds[i] == kind) for kind in set(kinds[1:])
    }
    assert {tuple(group) for group in groups} == {g for g in expected if len(g) > 1}


def test_test_images_that_are_trained_on_are_counted_and_left_out_of_a_second_score(
    root: Path,
) -> None:
    folder = root / "pics"
    write(folder / "train", "ab", 12)
    write(folder / "test", "ab", 8, 8)  # 8 to 11 are in both
    assert train.main(line(root, folder, "split.validation=0")) == 0
    run = run_of(root)
    summary, stored = run.read_summary(), run.read_predictions()
    assert "test images that are training images, too: 8" in summary.warnings
    assert summary.test_images_trained_on == 8
    others = [2, 3, 4, 5, 10, 11, 12, 13]  # 12 to 15, which stand before 8 and 9
    assert summary.test_accuracy_without_them == (stored.predicted == stored.labels)[others].mean()


def test_a_copy_of_the_training_images_is_no_test_set(root: Path, capsys: Capture) -> None:
    for part in ("train", "test"):
        write(root / "pics" / part, "ab", 9)
    assert train.main(line(root, root / "pics")) == 2
    assert "the test images are the training images" in capsys.readouterr().err
    assert not (root / "out").exists()


def test_near_duplicates_and_odd_images_are_found_on_request(root: Path, capsys: Capture) -> None:
    folder = write(root / "pics", "ab", 8, side=32)
    noise = np.random.default_rng(0).integers(50, 200, (32, 32), dtype=np.uint8)
    for name, brighter in (("a/noise.png", 0), ("b/near.png", 3)):
        Image.fromarray(noise + np.uint8(brighter)).save(folder / name)
    Image.new("L", (32, 32)).save(folder / "b" / "dark.png")
    words = [*line(root, folder)[:-3], "--check-data", f"--figure={root / 'x.png'}"]
    if importlib.util.find_spec("cleanvision") is None:
        assert describe.main(words) == 2
        assert "pip install 'cifar-lab[check]'" in capsys.readouterr().err
        return
    assert describe.main(words) == 0
    said = capsys.readouterr().out
    assert "near duplicates: 2 images in 1 groups" in said
    assert "b/near.png" in said
    assert "low information: 1: b/dark.png" in said


def test_a_mapped_cache_that_was_replaced_under_the_same_size_and_time_is_noticed(
    root: Path, caplog: CaptureLog, monkeypatch: Patch
) -> None:
    folder = write(root / "pics", "ab", 400, side=30)

    def load() -> Any:
        return image_folder.load(
            root=root / "data",
            checksums={},
            path=str(folder),
            image_shape=(3, 64, 64),
            storage="mapped",
        )

    def damage(place: int) -> None:
        [file] = (root / "data").rglob("train_images.bin")
        state = file.stat()
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        file.write_bytes(content)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))

    whole = load()
    assert load().verified == "samples"
    damage(100)
    assert load().checksums == whole.checksums
    assert "samples of it does not match" in caplog.text
    damage(70_000)  # between two samples
    assert load().verified == "samples"
    monkeypatch.setenv("CIFAR_LAB_VERIFY", "1")
    assert load().checksums == whole.checksums
    assert "its sha256 does not match" in caplog.text


def test_predict_goes_on_after_a_broken_picture_of_a_folder(
    finished: RunDir, tmp_path: Path, capsys: Capture
) -> None:
    folder = write(tmp_path / "pics", "ab", 2)
    (folder / "a" / "0.png").write_bytes(b"?")
    os.truncate(folder / "a" / "0.png", 2**40)  # a sparse file: nothing reads all of it
    (folder / "a" / "._1.png").write_bytes(b"?")
    (folder / "notes.txt").write_text("x")
    assert predict.main([str(finished.path), str(folder), "--top", "1"]) == 1
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 4
    assert "skipped in" in said.err
    assert "1 of 4 pictures were left out" in said.err
    assert "0.png cannot be read" in said.err
