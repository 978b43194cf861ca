"""Images with texts: in rows, each under its title, or one by one, with a line below."""

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cifar_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
_WIDTH, _TALLEST = 256, 4096  # pixels that the smallest picture is enlarged to, and no further


def draw_images(images: Sequence[Pixels], titles: Sequence[str]) -> "Figure":
    """Draw uint8 images (C, H, W), each under its title, eight in a row."""
    columns = min(len(images), 8)
    rows = -(-len(images) // columns)
    figure = style.new_figure(1.9 * columns, 2.3 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
    for axes, image, title in zip(panels, images, titles, strict=False):
        axes.imshow(style.plane(image), cmap="gray")
        axes.set_title(title, fontsize=style.NORMAL)
    return figure


def thumbnail(image: Pixels, longest: int) -> dict[str, Any]:
    """Return an image (C, H, W) for a page: its address, which contains it, its width and height.

    Its longer side has `longest` pixels on the page, and at most twice as many in the file.
    """
    from PIL import Image

    picture = Image.fromarray(style.plane(image))
    picture.thumbnail((2 * longest, 2 * longest))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    width, height = (max(1, round(side * longest / max(picture.size))) for side in picture.size)
    return {"address": f"data:image/png;base64,{data}", "width": width, "height": height}


def write_labelled(pictures: Iterable[tuple[Path, Any, str]], folder: Path) -> None:
    """Write each picture (PIL's, of 8 bits) as PNG, small ones enlarged, with its text below it.

    Of several pictures whose paths have one name, all but the first get a number.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    font_file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    folder.mkdir(parents=True, exist_ok=True)
    taken: dict[str, int] = {}
    for path, eight_bits, text in pictures:
        picture = eight_bits.convert("RGBA")
        if (scale := min(-(-_WIDTH // picture.width), _TALLEST // picture.height)) > 1:
            picture = ImageOps.scale(picture, scale, Image.Resampling.NEAREST)
        size = max(picture.width // 16, 6)
        room = 0.94 * picture.width
        while size > 6 and ImageFont.truetype(font_file, size).getlength(text) > room:
            size -= 1
        labelled = Image.new("RGB", (picture.width, picture.height + 2 * size), "white")
        labelled.paste(picture, mask=picture)
        place = (0.03 * picture.width, picture.height + 1.4 * size)
        font = ImageFont.truetype(font_file, size)
        ImageDraw.Draw(labelled).text(place, text, fill="black", font=font, anchor="ls")
        number = taken[path.stem] = taken.get(path.stem, 0) + 1
        labelled.save(folder / f"{path.stem}{f'-{number}' if number > 1 else ''}.png")
