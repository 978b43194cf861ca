"""Images in rows, each with a title."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cifar_lab.figures import style


def draw_images(
    images: Sequence[np.ndarray[Any, np.dtype[np.uint8]]], titles: Sequence[str], columns: int
) -> Figure:
    """Draw uint8 images (C, H, W), each under its title, so many in a row."""
    rows = -(-len(images) // columns)
    figure = style.new_figure(1.9 * columns, 2.3 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
    for axes, image, title in zip(panels, images, titles, strict=False):
        grey = image.shape[0] == 1
        pixels = image[0] if grey else np.transpose(image, (1, 2, 0))
        axes.imshow(pixels, cmap="gray" if grey else None)
        axes.set_title(title, fontsize=style.NORMAL)
    return figure
