"""One's own pictures: `train/<class>/*` and `test/<class>/*`, or `<class>/*` alone."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cifar_lab.datasets import ImageArrays
from cifar_lab.datasets.held_out import check_checksums, held_out_fraction
from cifar_lab.errors import RequestError

log = logging.getLogger("cifar_lab")

# Formats that Pillow decodes by itself: EPS, for one, would start a program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = frozenset(
    ".bmp .gif .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()  # noqa: SIM905
)


def load(
    *,
    root: Path,
    checksums: Mapping[str, str],
    path: str | None,
    image_shape: Sequence[int],
    test_fraction: float = 0.2,
) -> ImageArrays:
    """Return the pictures below `path`, each brought to `image_shape` (channels, height, width).

    Without the folders train and test, a fixed stratified `test_fraction` is held out. Raises
    RequestError naming the folder or file that is wrong.
    """
    if not path:
        raise RequestError(
            "dataset.source.path is missing; give the folder that holds train/<class>/* "
            "and test/<class>/*, or <class>/*"
        )
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise RequestError(f"dataset.source.path={path}: there is no such folder")
    divided = [name for name in ("train", "test") if (folder / name).is_dir()]
    if len(divided) == 1:
        other = "test" if divided == ["train"] else "train"
        raise RequestError(
            f"{folder} has {divided[0]} but not {other}; it must have both, or neither"
        )
    if divided:
        classes = _classes(folder / "train")
        unknown = sorted(set(_classes(folder / "test")) - set(classes))
        if unknown:
            raise RequestError(f"{folder / 'test' / unknown[0]} has no counterpart in train")
        train = _read(folder / "train", classes, image_shape)
        test = _read(folder / "test", classes, image_shape)
        arrays = ImageArrays(*train, *test, class_names=classes)
    else:
        classes = _classes(folder)
        images, labels = _read(folder, classes, image_shape)
        kept, out = held_out_fraction(labels, test_fraction, folder)
        arrays = ImageArrays(images[kept], labels[kept], images[out], labels[out], classes)
    check_checksums(arrays, checksums, folder)
    return arrays


def read_picture(path: Path, image_shape: Sequence[int]) -> NDArray[np.uint8]:
    """Return a picture of any size as uint8 (C, H, W).

    It is turned as its camera says, laid on white where it is transparent, brought to RGB or grey,
    scaled until it covers height and width, and cut to them around its middle. Raises RequestError.
    """
    from PIL import Image, ImageOps

    channels, height, width = image_shape
    try:
        with warnings.catch_warnings():
            # Pillow only warns of a picture that is small on disk and enormous in memory.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                picture = ImageOps.exif_transpose(file)
                if picture.mode.startswith("I;16"):
                    picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
                if picture.has_transparency_data:
                    picture = picture.convert("RGBA")
                    white = Image.new("RGBA", picture.size, "white")
                    picture = Image.alpha_composite(white, picture)
                picture = picture.convert("L" if channels == 1 else "RGB")
                picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    except FileNotFoundError:
        raise RequestError(f"{path}: there is no such picture") from None
    except Exception as error:
        # Pillow's decoders raise errors of a dozen kinds for what is no sound picture.
        kinds = ", ".join(FORMATS)
        why = str(error).partition("\n")[0]
        raise RequestError(f"{path} cannot be read as a picture ({kinds}): {why}") from error
    pixels = np.asarray(picture, dtype=np.uint8).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _classes(folder: Path) -> tuple[str, ...]:
    found = (entry for entry in folder.iterdir() if entry.is_dir())
    classes = tuple(sorted(entry.name for entry in found if not entry.name.startswith(".")))
    if len(classes) < 2:
        raise RequestError(
            f"{folder} has {len(classes)} folders; it must have at least two, one for each class"
        )
    return classes


def _read(
    folder: Path, classes: Sequence[str], image_shape: Sequence[int]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    paths: list[Path] = []
    labels: list[int] = []
    others: list[Path] = []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue
        entries = [e for e in sorted((folder / name).iterdir()) if not e.name.startswith(".")]
        pictures = [entry for entry in entries if entry.suffix.lower() in SUFFIXES]
        others += [entry for entry in entries if entry.suffix.lower() not in SUFFIXES]
        if not pictures:
            kinds = " ".join(sorted(SUFFIXES))
            raise RequestError(f"{folder / name} holds no pictures ({kinds})")
        paths += pictures
        labels += [label] * len(pictures)
    if others:
        log.warning("left out, as they are no pictures: %d files, %s first", len(others), others[0])
    images = np.stack([read_picture(path, image_shape) for path in paths])
    return images, np.array(labels, dtype=np.int64)
