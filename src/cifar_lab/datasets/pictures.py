"""The one intake of picture files: which there are, and each as an array of a given shape."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cifar_lab.errors import UsageError, first_line, listing, printable, shorten_path
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
KINDS = " ".join(sorted(SUFFIXES))

HIDDEN = (".", "__MACOSX", "@eaDir")
"""How names begin that people did not give: ._x.jpg beside x.jpg, a Mac's zip, a network drive."""

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF


class Unreadable(Exception):
    """A file is not a picture that can be decoded; the message is the reason, in one line."""


class Preparation(NamedTuple):
    """How a picture becomes an image: `shape` (C, H, W), and the size from which it is refused.

    Its fields are the settings of `dataset`; `fit` is explained in `fit_picture`.
    """

    shape: Sequence[int]
    fit: Fit = "crop"
    max_megapixels: float = 120.0


class Traits(NamedTuple):
    """What a picture was before it became an image.

    `highest`: its largest value as a share of its range, of a deep picture (1 for one of 8 bits).
    `several`: it has more pages or frames than the first, which is the image.
    """

    format: str
    bits: int
    size: tuple[int, int]
    highest: float
    several: bool = False


# --- which files are pictures ---------------------------------------------------------------------


def list_pictures(folder: Path, skipped: Counter[str]) -> list[Path]:
    """Return the pictures in a folder by name; the kinds of the other entries are counted.

    Hidden files are neither.
    """
    pictures = []
    for entry in sorted(e for e in folder.iterdir() if not e.name.startswith(HIDDEN)):
        if entry.suffix.lower() in SUFFIXES:
            pictures.append(entry)
        else:
            kind = "folders" if entry.is_dir() else f"{entry.suffix or 'other'} files"
            skipped[kind] += 1
    return pictures


def visible_folders(folder: Path) -> list[Path]:
    """Return the folders in a folder by name, hidden ones left out."""
    return sorted(e for e in folder.iterdir() if e.is_dir() and not e.name.startswith(HIDDEN))


def find_pictures(path: Path) -> tuple[list[Path], tuple[str, ...]]:
    """Return the pictures in a folder and its class folders, and a warning if others are skipped.

    Raises UsageError if it holds no picture.
    """
    skipped = Counter[str]()
    pictures = list_pictures(path, skipped)
    del skipped["folders"]
    for folder in visible_folders(path):
        pictures += list_pictures(folder, skipped)
    if not pictures:
        raise UsageError(f"{shorten_path(path)} holds no pictures ({KINDS})")
    return pictures, skipped_warning(skipped, path)


def skipped_warning(skipped: Counter[str], where: Path) -> tuple[str, ...]:
    """Return what to say of entries that are no pictures, if there are any."""
    counts = [f"{number:,} {printable(kind)}" for kind, number in (+skipped).most_common()]
    return (f"skipped in {shorten_path(where)}: {listing(counts)}",) if counts else ()


# --- from a file to an image ----------------------------------------------------------------------


def read_picture(path: Path, preparation: Preparation) -> NDArray[np.uint8]:
    """Return a picture file as `fit_picture` does; UsageError if it cannot be read."""
    if not path.exists():
        raise UsageError(f"{shorten_path(path)}: there is no such picture")
    [picture] = decode_files([path], preparation)
    if isinstance(picture, Unreadable):
        raise UsageError(cannot_be_read(path, str(picture)))
    return picture[0]


def cannot_be_read(path: Path, reason: str) -> str:
    """Return the message for one picture that cannot be read."""
    return f"{shorten_path(path)} cannot be read as a picture ({', '.join(FORMATS)}): {reason}"


def decode_files(
    paths: Sequence[Path], preparation: Preparation
) -> Iterator[tuple[NDArray[np.uint8], Traits] | Unreadable]:
    """Yield the picture (C, H, W) of each file and what it was, or why there is none.

    They are decoded by as many threads as there are cores, since Pillow works without Python's
    global lock: of 1,000 photographs and of 4,000 small pictures, threads decoded as many a second
    as processes did. Only some are in memory at a time, however slowly they are taken.
    """
    from PIL import Image, ImageFile

    def read(path: Path) -> tuple[NDArray[np.uint8], Traits] | Unreadable:
        try:
            with open_for_reading(path) as file:
                return decode(file, preparation)
        except Unreadable as error:
            return error
        except OSError as error:
            return Unreadable(error.strerror or first_line(error))

    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    # Pictures of any size are opened, since `decode` has a limit of its own, and no torn ones. But
    # Pillow's settings are the caller's, and those of the process: they change before the threads.
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
    try:
        with ThreadPoolExecutor(cores, thread_name_prefix="pictures") as threads:
            for first in range(0, len(paths), 32 * cores):
                yield from threads.map(read, paths[first : first + 32 * cores])
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def decode(opened: IO[bytes], preparation: Preparation) -> tuple[NDArray[np.uint8], Traits]:
    """Return the picture in an open file as `fit_picture` does, and what it was.

    Raises Unreadable if there is none.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(opened, formats=FORMATS) as file:
            if prod(file.size) > 1e6 * preparation.max_megapixels:  # however small the file is
                raise Unreadable(
                    f"it has {file.width:,} x {file.height:,} pixels, more than "
                    f"dataset.max_megapixels={preparation.max_megapixels:g} allows"
                )
            picture, bits, highest = eight_bits(file)
            # MPO: a JPEG of a telephone, whose other frames are of another kind.
            several = file.format != "MPO" and getattr(file, "is_animated", False)
            traits = Traits(str(file.format), bits, file.size, highest, several)
            return fit_picture(picture, preparation.shape, preparation.fit), traits
    except UnidentifiedImageError:  # its message names an object in memory
        raise Unreadable("its content is of none of these formats") from None
    except Unreadable:
        raise
    except Exception as error:
        # Pillow's decoders raise errors of a dozen kinds for a damaged picture.
        raise Unreadable(first_line(error)) from error


def eight_bits(picture: "Image.Image") -> tuple["Image.Image", int, float]:
    """Return a picture upright and with 8 bits a sample, its bits, and its `Traits.highest`.

    It is rotated as its EXIF orientation says. Deep grey pictures are scaled by the range that
    their file states: 16 bits, or TIFF's own number of them. Pillow alone would cut their values
    off at 255, and all would be white. Raises Unreadable where no range is stated (32-bit integers,
    floats): one guessed from the picture's own values would make dark and bright pictures equal.
    """
    from PIL import Image, ImageOps

    mode, tags = picture.mode, getattr(picture, "tag_v2", {})
    # Pillow scales a PGM of any maximum to 16 bits; older versions open PNGs of 16 bits as I.
    deep = mode.startswith("I;16") or (mode == "I" and picture.format in ("PNG", "PPM"))
    if mode in ("I", "F") and not deep:
        kind = "32-bit integers" if mode == "I" else "floating-point numbers"
        raise Unreadable(f"its values are {kind} of no stated range; save it with 8 or 16 bits")
    if mode == "LAB":
        raise Unreadable("its colours are in LAB; save it as RGB")
    clear = picture.info.get("transparency")
    picture = ImageOps.exif_transpose(picture)
    if mode == "La":
        picture = picture.convert("LA")
    if not deep:
        return picture, 8, 1.0
    bits = int(tags.get(_BITS_PER_SAMPLE, (16,))[0])
    white = (1 << bits) - 1
    values = np.asarray(picture).astype(np.int64)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = white - values
    if isinstance(clear, int):
        values[values == clear] = white  # as white as what it lies on
    eight = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    return eight, bits, float(values.max()) / white


def to_pixels(pictures: Pictures, preparation: Preparation) -> NDArray[np.uint8]:
    """Return pictures as (N, *shape), prepared as those of `dataset=image_folder`.

    Raises UsageError for the first picture that is wrong.
    """
    from PIL import Image

    if isinstance(pictures, str | Path | Image.Image):
        pictures = [pictures]
    if not hasattr(pictures, "__len__"):
        raise UsageError(
            f"pictures of type {type(pictures).__name__} are none; give paths, PIL images or arrays"
        )
    if isinstance(pictures, np.ndarray) and (
        pictures.ndim not in (3, 4) or pictures.shape[2:] in ((3,), (4,))
    ):
        raise UsageError(
            "an array of pictures has the shape (N, height, width) or (N, height, width, channels)"
            f", not {list(pictures.shape)}; put one picture into a list"
        )
    pixels = np.empty((len(pictures), *preparation.shape), dtype=np.uint8)
    for number, picture in enumerate(pictures):
        pixels[number] = _pixels(picture, number, preparation)
    return pixels


def _pixels(picture: Any, number: int, preparation: Preparation) -> NDArray[np.uint8]:
    from PIL import Image

    if isinstance(picture, str | Path):
        return read_picture(Path(picture), preparation)
    wrong = None
    if isinstance(picture, np.ndarray):
        if picture.ndim != 2 and (picture.ndim != 3 or picture.shape[2] not in (1, 3, 4)):
            wrong = (
                f"an array of shape {list(picture.shape)}; it must be (height, width) or "
                "(height, width, channels) with 1, 3 or 4 channels"
            )
        elif picture.dtype != np.uint8:
            wrong = f"an array of {picture.dtype}; it must be uint8, from 0 to 255"
        else:
            picture = Image.fromarray(picture[..., 0] if picture.shape[2:] == (1,) else picture)
    elif not isinstance(picture, Image.Image):
        wrong = f"of type {type(picture).__name__}; it must be a path, a PIL image or a numpy array"
    if wrong is not None:
        raise UsageError(f"picture {number} is {wrong}")
    try:
        return fit_picture(eight_bits(picture)[0], preparation.shape, preparation.fit)
    except Exception as error:  # a file that PIL opened is decoded only here
        raise UsageError(f"picture {number} cannot be read: {first_line(error)}") from error


def fit_picture(
    picture: "Image.Image", image_shape: Sequence[int], fit: Fit = "crop"
) -> NDArray[np.uint8]:
    """Return a picture of 8 bits and any size as uint8 (C, H, W).

    It is put on a white background where it is transparent, and converted to RGB or grayscale. Then
    it is brought to height and width: `crop` scales it until it covers them and cuts off what is
    outside the center, `resize` ignores its aspect ratio, `pad` scales it until it fits inside and
    makes the rest black.
    """
    from PIL import Image, ImageOps

    channels, height, width = image_shape
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    picture = picture.convert("L" if channels == 1 else "RGB")
    size, method = (width, height), Image.Resampling.BICUBIC
    if fit == "resize":
        picture = picture.resize(size, method)
    elif fit == "pad":
        scale = min(width / picture.width, height / picture.height)
        if scale * min(picture.size) < 1:  # Pillow would round the shorter side down to 0
            across, down = (max(1, round(scale * side)) for side in picture.size)
            picture = picture.resize((across, down), method)
        picture = ImageOps.pad(picture, size, method)
    else:
        picture = ImageOps.fit(picture, size, method)
    pixels = np.asarray(picture, dtype=np.uint8).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
