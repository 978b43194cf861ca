"""Pictures of any size, asked of a past run."""

import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_lab import door, predict
from cifar_lab.building import load_splits
from cifar_lab.execute import execute
from cifar_lab.run_dir import RunDir

SMALL = ["dataset=digits", "model.widths=[4,8]", "model.hidden=16", "figures=none", "device=cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("outputs")
    overrides = [*SMALL, "model=convnet", "training.epochs=2", f"output_dir={folder}"]
    made = RunDir.create(door.compose(overrides).cells[0].config)
    execute(made)
    return made


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    Image.fromarray(pixels).save(path, **options)  # type: ignore[arg-type]
    return path


def test_a_test_image_is_answered_as_in_evaluation(run: RunDir, tmp_path: Path) -> None:
    splits = load_splits(run.config, "cpu")
    scored = run.read_predictions()
    paths = [
        save(tmp_path / f"{i}.png", splits.test.images[splits.test.indices[i], 0].numpy())
        for i in range(12)
    ]
    rows = predict.probabilities(run, paths)
    assert rows == pytest.approx(scored.probabilities[:12], abs=1e-4)
    assert rows.sum(axis=1) == pytest.approx(1)


def test_table_names_the_most_probable_classes(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    photo = save(tmp_path / "photo.jpg", random.integers(0, 256, (300, 200, 3), dtype=np.uint8))
    tiny = save(tmp_path / "tiny.png", random.integers(0, 256, (5, 90), dtype=np.uint8))
    assert predict.main([str(run.path), str(photo), str(tiny), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["picture", "class", "probability"]
    assert len(lines) == 5
    rows = predict.probabilities(run, [photo, tiny])
    best = [predict.class_names(run)[int(row.argmax())] for row in rows]
    assert [line.split()[1] for line in (lines[1], lines[3])] == best
    shares = [float(value) for value in re.findall(r"([\d.]+) %", "\n".join(lines))]
    assert shares[0] >= shares[1]
    assert shares[0] == pytest.approx(100 * rows[0].max(), abs=0.01)


def test_a_camera_that_was_turned_makes_no_difference(run: RunDir, tmp_path: Path) -> None:
    upright = np.zeros((40, 40, 3), dtype=np.uint8)
    upright[:10, :30] = 255
    plain = save(tmp_path / "plain.png", upright)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera says: turn by a quarter to see it upright
    turned = save(tmp_path / "turned.png", np.rot90(upright).copy(), exif=exif)
    rows = predict.probabilities(run, [plain, turned])
    assert rows[0] == pytest.approx(rows[1])
    assert not np.allclose(rows[0], predict.probabilities(run, [_without_exif(turned)])[0])


def _without_exif(path: Path) -> Path:
    return save(path.with_name("bare.png"), np.asarray(Image.open(path)))


def test_outputs_that_are_probabilities_stay_as_they_are(tmp_path: Path) -> None:
    base = [*SMALL[:1], "figures=none", "device=cpu", "training.epochs=0", f"output_dir={tmp_path}"]
    small = ["model=mixed_kernel_small", "model.widths=[4,4,4,4,4,4]", "model.hidden=8"]
    rows = []
    picture = save(tmp_path / "picture.png", np.full((32, 32), 200, dtype=np.uint8))
    for softmax in ("false", "true"):
        overrides = [*base, *small, f"model.softmax_output={softmax}"]
        made = RunDir.create(door.compose(overrides).cells[0].config)
        execute(made)
        rows.append(predict.probabilities(made, [picture])[0])
    assert rows[0] == pytest.approx(rows[1], abs=1e-6)


def png_of(width: int, height: int) -> bytes:
    """Return a PNG that says it is that large, and holds almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "cut", "bomb", "folder"])
def test_a_bad_picture_is_one_line_and_exit_2(
    kind: str, run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = save(tmp_path / "good.png", np.zeros((50, 50, 3), dtype=np.uint8))
    bad = tmp_path / "bad.png"
    if kind == "text":
        bad.write_text("not a picture")
    elif kind == "empty":
        bad.touch()
    elif kind == "cut":
        random = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        whole = save(tmp_path / "whole.png", random).read_bytes()
        bad.write_bytes(whole[: len(whole) // 2])
    elif kind == "bomb":
        bad.write_bytes(png_of(50_000, 50_000))
    elif kind == "folder":
        bad.mkdir()
    assert predict.main([str(run.path), str(good), str(bad)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "bad.png" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere", "x.png"], 2, "no run folder"),
        (["RUN", "x.png", "--top", "0"], 2, "--top=0"),
        (["RUN"], 2, "image"),
        (["RUN", "x.png", "--weights", "first"], 2, "first"),
    ],
)
def test_a_wrong_request_is_one_line(
    arguments: list[str], code: int, words: str, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    words_of_it = [str(run.path) if word == "RUN" else word for word in arguments]
    assert predict.main(words_of_it) == code
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_run_that_has_no_weights_yet_says_how_to_train_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queued = RunDir.create(door.compose([*SMALL, f"output_dir={tmp_path}"]).cells[0].config)
    picture = save(tmp_path / "picture.png", np.zeros((9, 9), dtype=np.uint8))
    assert predict.main([str(queued.path), str(picture)]) == 2
    assert "python -m cifar_lab.train" in capsys.readouterr().err


def test_last_weights_can_be_asked(run: RunDir, tmp_path: Path) -> None:
    picture = save(tmp_path / "picture.png", np.full((32, 32), 90, dtype=np.uint8))
    state = run.read_checkpoint(run.last)
    changed = {k: torch.zeros_like(v) for k, v in state["model"].items()}
    kept = run.last.read_bytes()
    run.write_last({**state, "model": changed})
    try:
        rows = predict.probabilities(run, [picture], weights="last")
    finally:
        run.last.write_bytes(kept)
    assert rows[0] == pytest.approx(np.full(10, 0.1))


def test_help_needs_no_torch() -> None:
    for command in ("predict", "describe"):
        code = (
            f"import sys; from cifar_lab.{command} import main\n"
            "try: main(['--help'])\n"
            "except SystemExit: pass\n"
            "print('torch' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip().endswith("False")
