"""A past run as a classifier: its model with trained weights, and what it says about pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from cifar_lab.datasets.pictures import Fit, fit_picture, read_picture
from cifar_lab.errors import UsageError, first_line
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.build import build_model, normalisation
from cifar_lab.training.device import memory_format, seeded, select_device
from cifar_lab.training.predict import mean_logits
from cifar_lab.training.sanity_checks import sum_to_one
from cifar_lab.training.scoring import load_weights, weights_to_score

Pixels = npt.NDArray[np.uint8]
Pictures = str | Path | Image.Image | Pixels | Sequence[str | Path | Image.Image | Pixels]
"""Paths, PIL images and uint8 arrays (H, W) or (H, W, C), or one array of them all, (N, ...)."""


def load_model(run: RunDir, *, weights: str | None = None, device: str = "cpu") -> nn.Module:
    """Return a run's model on a device, in evaluation mode.

    `weights` is best or last; None takes those that the run was scored with. The model takes images
    that are normalised with the dataset's mean and std. Raises UsageError if there are no weights
    yet.
    """
    config = run.read_config()
    num_classes = len(run.class_names())
    if num_classes == 0:  # the classes of a folder of images are known once it was evaluated
        raise UsageError(
            f"{run.path} does not name its classes yet; finish the run first: "
            f"python -m cifar_lab.train {run.path}"
        )
    weights = weights or weights_to_score(run, config)
    with seeded(config.seed):
        model: nn.Module = build_model(config, num_classes)
    load_weights(run, weights, model)
    model.to(device)
    model.to(memory_format=memory_format(device))
    return model.eval()


def probabilities(
    run: RunDir,
    pictures: Pictures,
    *,
    weights: str | None = None,
    device: str | None = None,
    fit: Fit | None = None,
) -> npt.NDArray[np.float64]:
    """Return the probability of each class for each picture, (N, C).

    Logits are averaged over the run's `evaluation.views`. `device` and `fit`, which says how a
    picture is brought to the model's size, replace the run's own. Raises UsageError for the first
    picture that cannot be read, before a model is built.
    """
    config = run.read_config()
    pixels = to_pixels(pictures, config.dataset.image_shape, fit or config.dataset.fit)
    device, _ = select_device(device or config.device)
    model = load_model(run, weights=weights, device=device)
    normalise, layout = normalisation(config), memory_format(device)
    rows = torch.empty(len(pixels), len(run.class_names()), dtype=torch.float64)
    size = config.evaluation.batch_size
    with torch.inference_mode():
        for first in range(0, len(pixels), size):
            images = normalise(pixels[first : first + size].to(device), layout)
            logits = mean_logits(
                model, images, config.evaluation.views, config.evaluation.views_margin
            )
            rows[first : first + size] = logits.double()
    return (rows if sum_to_one(rows) else rows.softmax(dim=1)).numpy()


def to_pixels(pictures: Pictures, image_shape: Sequence[int], fit: Fit = "crop") -> Tensor:
    """Return pictures as uint8 (N, *image_shape), prepared as those of `dataset=image_folder`.

    An array that has the model's size and channels is taken as it is. Raises UsageError for the
    first picture that is wrong.
    """
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
    return torch.from_numpy(pixels)


def _pixels(picture: Any, shape: tuple[int, ...], number: int, fit: Fit) -> Pixels:
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
