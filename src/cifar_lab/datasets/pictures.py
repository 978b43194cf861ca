"""Picture files: which there are, and each as an array of a given shape."""

import contextlib
import io
import os
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cifar_lab.errors import UsageError, first_line, shorten_path
from cifar_lab.runs.files import open_for_reading

if TYPE_CHECKING:
    from PIL import Image

Fit = Literal["crop", "resize", "pad"]

Picture: TypeAlias = "str | Path | Image.Image | NDArray[np.uint8]"
Pictures: TypeAlias = "Picture | Sequence[Picture]"
"""Paths, PIL images and uint8 arrays (H, W) or (H, W, C), or one array of them all, (N, ...)."""

# Formats that Pillow decodes by itself: EPS, for one, would start a program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = frozenset(
    ".bmp .gif .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()  # noqa: SIM905
)


class Unreadable(Exception):
    """A file is not a picture that can be decoded; the message is the reason, in one line."""


def list_pictures(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the pictures in a folder, and what else is in it, each by name."""
    entries = sorted(folder.iterdir())
    return (
        [entry for entry in entries if entry.suffix.lower() in SUFFIXES],
        [entry for entry in entries if entry.suffix.lower() not in SUFFIXES],
    )


def find_pictures(path: Path) -> list[Path]:
    """Return the pictures in a folder by name, or the path itself if it is no folder."""
    try:
        if not path.is_dir():
            return [path]
        pictures, _ = list_pictures(path)
    except (OSError, ValueError):  # a path that no file system takes is refused when it is read
        return [path]
    if not pictures:
        raise UsageError(f"{shorten_path(path)} holds no pictures ({' '.join(sorted(SUFFIXES))})")
    return pictures


def read_picture(path: Path, image_shape: Sequence[int], fit: Fit = "crop") -> NDArray[np.uint8]:
    """Return a picture file as `fit_picture` does; UsageError if it cannot be read."""
    try:
        with _refusing_bombs():
            return decode(read_content(path), image_shape, fit)
    except Unreadable as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise UsageError(f"{shorten_path(path)}: there is no such picture") from None
        raise UsageError(cannot_be_read(path, str(error))) from error


def cannot_be_read(path: Path, reason: str) -> str:
    """Return the message for one picture that cannot be read."""
    return f"{shorten_path(path)} cannot be read as a picture ({', '.join(FORMATS)}): {reason}"


def read_content(path: Path) -> bytes:
    """Return the bytes of a picture file; Unreadable if there are none."""
    try:
        with open_for_reading(path) as file:
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise Unreadable(getattr(error, "strerror", None) or first_line(error)) from error


def decode_files(
    paths: Sequence[Path], image_shape: Sequence[int], fit: Fit
) -> Iterator[NDArray[np.uint8] | Unreadable]:
    """Yield the picture (C, H, W) of each file, or why there is none.

    They are decoded by as many threads as there are cores, since Pillow works without Python's
    global lock: of 1,000 photographs and of 4,000 small pictures, threads decoded as many a second
    as processes did. Only a few are in memory at a time, however slowly they are taken.
    """

    def read(path: Path) -> NDArray[np.uint8] | Unreadable:
        try:
            return decode(read_content(path), image_shape, fit)
        except Unreadable as error:
            return error

    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    with _refusing_bombs(), ThreadPoolExecutor(cores, thread_name_prefix="pictures") as threads:
        coming: deque[Future[NDArray[np.uint8] | Unreadable]] = deque()
        for path in paths:
            coming.append(threads.submit(read, path))
            if len(coming) > 4 * cores:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


@contextlib.contextmanager
def _refusing_bombs() -> Iterator[None]:
    """Refuse pictures that are small on disk and enormous in memory: Pillow only warns of them.

    To be entered before threads are started, which share what becomes of a warning.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def decode(content: bytes, image_shape: Sequence[int], fit: Fit = "crop") -> NDArray[np.uint8]:
    """Return the picture in the bytes of a file as `fit_picture` does; Unreadable if there is none.

    Its size is limited as by Pillow.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as file:
            return fit_picture(file, image_shape, fit)
    except UnidentifiedImageError:  # its message names an object in memory
        raise Unreadable("its content is of none of these formats") from None
    except Exception as error:
        # Pillow's decoders raise errors of a dozen kinds for a damaged picture.
        raise Unreadable(first_line(error)) from error


def to_pixels(
    pictures: Pictures, image_shape: Sequence[int], fit: Fit = "crop"
) -> NDArray[np.uint8]:
    """Return pictures as (N, *image_shape), prepared as those of `dataset=image_folder`.

    An array that has the model's size and channels is taken as it is. Raises UsageError for the
    first picture that is wrong.
    """
    from PIL import Image

    if isinstance(pictures, str | Path | Image.Image):
        pictures = [pictures]
    if isinstance(pictures, np.ndarray):
        is_one = pictures.ndim == 2 or (pictures.ndim == 3 and pictures.shape[2] in (3, 4))
        if is_one or pictures.ndim not in (3, 4):
            hint = "; put one picture into a list" if is_one else ""
            raise UsageError(
                f"an array of pictures has the shape (N, height, width) or (N, height, width, "
                f"channels), not {list(pictures.shape)}{hint}"
            )
    shape = tuple(image_shape)
    pixels = np.empty((len(pictures), *shape), dtype=np.uint8)
    for number, picture in enumerate(pictures):
        pixels[number] = _pixels(picture, shape, number, fit)
    return pixels


def _pixels(picture: Any, shape: tuple[int, ...], number: int, fit: Fit) -> NDArray[np.uint8]:
    from PIL import Image

    if isinstance(picture, str | Path):
        return read_picture(Path(picture), shape, fit)
    if isinstance(picture, np.ndarray):
        channels_last = picture[..., None] if picture.ndim == 2 else picture
        if channels_last.ndim != 3 or channels_last.shape[2] not in (1, 3, 4):
            raise UsageError(
                f"picture {number} is an array of shape {list(picture.shape)}; it must be "
                "(height, width) or (height, width, channels) with 1, 3 or 4 channels"
            )
        if picture.dtype != np.uint8:
            raise UsageError(
                f"picture {number} is an array of {picture.dtype}; it must be uint8, from 0 to 255"
            )
        if (channels_last.shape[2], *channels_last.shape[:2]) == shape:
            return channels_last.transpose(2, 0, 1)
        picture = Image.fromarray(channels_last[..., 0] if channels_last.shape[2] == 1 else picture)
    if not isinstance(picture, Image.Image):
        raise UsageError(
            f"picture {number} is of type {type(picture).__name__}; it must be a path, a PIL image "
            "or a numpy array"
        )
    try:
        return fit_picture(picture, shape, fit)
    except Exception as error:  # a file that PIL opened is decoded only here
        raise UsageError(f"picture {number} cannot be read: {first_line(error)}") from error


def fit_picture(
    picture: "Image.Image", image_shape: Sequence[int], fit: Fit = "crop"
) -> NDArray[np.uint8]:
    """Return a picture of any size as uint8 (C, H, W).

    It is rotated as its EXIF orientation says, put on a white background where it is transparent,
    and converted to RGB or grayscale. Then it is brought to height and width: `crop` scales it
    until it covers them and cuts off what is outside the center, `resize` ignores its aspect ratio,
    `pad` scales it until it fits inside and makes the rest black.
    """
    from PIL import Image, ImageOps

    channels, height, width = image_shape
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    picture = picture.convert("L" if channels == 1 else "RGB")
    size, method = (width, height), Image.Resampling.BICUBIC
    if fit == "resize":
        picture = picture.resize(size, method)
    elif fit == "pad":
        picture = ImageOps.pad(picture, size, method)
    else:
        picture = ImageOps.fit(picture, size, method)
    pixels = np.asarray(picture, dtype=np.uint8).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
