"""A past run as a classifier: its model with trained weights, and what it says about pictures."""

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cifar_lab.datasets.pictures import Fit, Pictures, to_pixels
from cifar_lab.errors import UsageError
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.build import build_model, normalisation
from cifar_lab.training.device import memory_format, seeded, select_device
from cifar_lab.training.sanity_checks import sum_to_one
from cifar_lab.training.scoring import load_weights, mean_logits, weights_to_score


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
    shape = config.dataset.image_shape
    pixels = torch.from_numpy(to_pixels(pictures, shape, fit or config.dataset.fit))
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
