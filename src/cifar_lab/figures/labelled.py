"""Pictures with a line of text below them: what a model took them for."""

from collections.abc import Sequence
from pathlib import Path

_WIDTH = 256  # pixels that the smallest picture is enlarged to


def write_labelled(paths: Sequence[Path], texts: Sequence[str], folder: Path) -> None:
    """Write each picture into a folder as PNG, small ones enlarged, with its text below it.

    Of several pictures of one name, all but the first get a number.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    font_file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    folder.mkdir(parents=True, exist_ok=True)
    taken: dict[str, int] = {}
    for path, text in zip(paths, texts, strict=True):
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
        if (scale := -(-_WIDTH // picture.width)) > 1:
            picture = ImageOps.scale(picture, scale, Image.Resampling.NEAREST)
        size = picture.width // 16
        room = 0.94 * picture.width
        while size > 6 and ImageFont.truetype(font_file, size).getlength(text) > room:
            size -= 1
        labelled = Image.new("RGB", (picture.width, picture.height + 2 * size), "white")
        labelled.paste(picture)
        place = (0.03 * picture.width, picture.height + 1.4 * size)
        font = ImageFont.truetype(font_file, size)
        ImageDraw.Draw(labelled).text(place, text, fill="black", font=font, anchor="ls")
        number = taken[path.stem] = taken.get(path.stem, 0) + 1
        labelled.save(folder / f"{path.stem}{f'-{number}' if number > 1 else ''}.png")
