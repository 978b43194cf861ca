"""Pictures, names and states of the caller, drawn at length: one line, or the same answer."""

import contextlib
import io
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_ambient import AMBIENT, WORDS
from test_intake import MODES

import cifar_lab
from cifar_lab.datasets import image_folder, pictures
from cifar_lab.datasets.pictures import Preparation, Unreadable
from cifar_lab.errors import UsageError, printable

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Saving I mode")]


def noise(mode: str, size: tuple[int, int], seed: int) -> Image.Image:
    """Return a picture of random pixels; those of some modes are converted from RGBA."""
    random = np.random.default_rng(seed)
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": "<u2", "I": "<i4", "F": "<f4"}[mode]
        return Image.fromarray(random.integers(0, 65536, size[::-1]).astype(kind))
    picture = Image.fromarray(random.integers(0, 256, (*size[::-1], 4), dtype=np.uint8))
    return picture.convert("P" if mode == "PA" else mode if mode in ("LA", "RGBA") else "RGB")


@given(
    st.sampled_from(MODES),
    st.sampled_from(pictures.FORMATS),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.integers(0, 99),
    st.integers(0, 9),
    st.sampled_from(["crop", "resize", "pad"]),
    st.sampled_from([1, 3]),
    st.none() | st.tuples(st.floats(0, 1), st.integers(0, 255)),
)
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_picture_is_an_image_or_one_line(
    mode: str,
    kind: str,
    size: tuple[int, int],
    seed: int,
    turned: int,
    fit: pictures.Fit,
    channels: int,
    damage: tuple[float, int] | None,
) -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = turned
    picture = noise(mode, size, seed)
    try:
        if mode not in ("PA", "I;16", "I", "F", picture.mode):
            picture = picture.convert(mode)
        picture.save(file, kind, exif=exif)
    except (OSError, ValueError, KeyError):
        return  # Pillow does not write this mode in this format
    content = bytearray(file.getvalue())
    if damage is not None:
        content[int(damage[0] * (len(content) - 1))] = damage[1]
    prepared = Preparation((channels, 8, 9), fit)
    try:
        image, traits = pictures.decode(bytes(content), prepared)
    except Unreadable as error:
        why = str(error)
    else:
        assert image.shape == (channels, 8, 9)
        assert 0 <= traits.highest <= 1
        return
    assert "\n" not in why
    assert damage is not None or "stated range" in why or mode == "YCbCr", why


NAME = st.binary(min_size=1, max_size=12).filter(
    lambda name: not {0, ord("/")} & set(name) and name not in (b".", b"..")
)


@given(st.lists(NAME, min_size=1, max_size=4, unique=True), st.lists(NAME, max_size=4, unique=True))
@settings(max_examples=250, deadline=None)
def test_names_are_one_line_or_classes(
    tmp_path_factory: pytest.TempPathFactory, classes: list[bytes], files: list[bytes]
) -> None:
    root = tmp_path_factory.mktemp("names")
    for label, name in enumerate(classes):
        folder = root / "pics" / os.fsdecode(name)
        folder.mkdir(parents=True)
        for number, file in enumerate([b"0", b"1", b"2", *files]):
            path = folder / os.fsdecode(file + b".png")
            Image.new("RGB", (4, 4), (label, number, 0)).save(path, "PNG")
    try:
        data = image_folder.load(
            root=root / "data", checksums={}, path=str(root / "pics"), image_shape=(3, 4, 4)
        )
    except UsageError as error:
        texts: tuple[str, ...] = (str(error),)
    else:
        texts = (*data.class_names, *data.warnings)
        shown = [name for name in classes if not name.startswith(b".")]
        assert len(set(data.class_names)) == len(shown)
    assert all(text == printable(text) for text in texts), texts


@given(st.sets(st.sampled_from(sorted(AMBIENT)), min_size=2))
@settings(max_examples=12, deadline=None)
def test_states_of_the_caller_together_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, states: set[str]
) -> None:
    folder = tmp_path_factory.mktemp("ambient")
    plain = cifar_lab.run(*WORDS, f"output_dir={folder / 'plain'}")
    with contextlib.ExitStack() as stack:
        for state in sorted(states):
            stack.enter_context(AMBIENT[state]())
        among = cifar_lab.run(*WORDS, f"output_dir={folder / 'among'}")
    for name in ("train_loss", "val_loss", "val_accuracy"):
        assert among.metrics[name] == plain.metrics[name], states
    assert among.summary.test_loss == plain.summary.test_loss
