"""Images of a dataset as pictures that a page contains."""

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]


def thumbnail(pixels: Pixels, longest: int) -> Image.Image:
    """Return an image (C, H, W) as a picture whose longer side has at most `longest` pixels."""
    plane = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    picture = Image.fromarray(np.ascontiguousarray(plane))
    picture.thumbnail((longest, longest))
    return picture


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Return pictures of one size as one strip."""
    width, height = pictures[0].size
    strip = Image.new("RGB", (width * len(pictures), height))
    for place, picture in enumerate(pictures):
        strip.paste(picture, (place * width, 0))
    return strip


def data_address(picture: Image.Image) -> str:
    """Return the address of a picture that contains it."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
