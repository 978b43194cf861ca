"""A past run as a classifier: its model with trained weights, and what it says about pictures."""

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cifar_lab.datasets.pictures import Fit, Pictures, Preparation, to_pixels
from cifar_lab.errors import UsageError
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.build import make_model, normalisation
from cifar_lab.training.device import select_device
from cifar_lab.training.scoring import load_weights, predict, weights_to_score
from cifar_lab.training.splits import Split


def load_model(run: RunDir, *, device: str = "cpu") -> nn.Module:
    """Return a run's model on a device, in evaluation mode, with the weights that were scored.

    It takes images that are normalised with the dataset's mean and std. Raises UsageError if there
    are no weights yet.
    """
    config = run.read_config()
    num_classes = len(run.class_names())
    if num_classes == 0:  # the classes of a folder of images are known once it was evaluated
        raise UsageError(
            f"{run.path} does not name its classes yet; finish the run first: "
            f"python -m cifar_lab.train {run.path}"
        )
    weights = weights_to_score(run, config)
    model = make_model(config, num_classes, device)
    load_weights(run, weights, model)
    return model.eval()


def probabilities(
    run: RunDir,
    pictures: Pictures,
    *,
    device: str | None = None,
    fit: Fit | None = None,
) -> npt.NDArray[np.float64]:
    """Return the probability of each class for each picture, (N, C).

    Logits are averaged over the run's `evaluation.views`. `device` and `fit`, which says how a
    picture is brought to the model's size, replace the run's own. Raises UsageError for the first
    picture that cannot be read, before a model is built.
    """
    config = run.read_config()
    dataset = config.dataset
    prepared = Preparation(dataset.image_shape, fit or dataset.fit, dataset.max_megapixels)
    pixels = torch.from_numpy(to_pixels(pictures, prepared))
    device = select_device(device or config.device)
    model = load_model(run, device=device)
    if not len(pixels):
        return np.empty((0, len(run.class_names())))
    unknown = torch.zeros(len(pixels), dtype=torch.int64)
    split = Split(
        "pictures", pixels.to(device), unknown.to(device), indices=torch.arange(len(pixels))
    )
    evaluation = dataclasses.replace(config.evaluation, crop_padding=0)
    return predict(model, split, normalisation(config), evaluation).class_probabilities
