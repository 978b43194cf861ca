"""The logits of a split's images, averaged over views of each where the run asks for it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from cifar_lab.config.run_config import EvaluationConfig
from cifar_lab.runs.metrics import Predictions
from cifar_lab.training.batches import Normalisation, in_order
from cifar_lab.training.device import autocast
from cifar_lab.training.splits import Split


def predict(
    model: nn.Module,
    split: Split,
    normalisation: Normalisation,
    evaluation: EvaluationConfig,
    *,
    memory_format: torch.memory_format = torch.contiguous_format,
    precision: str = "fp32",
    crop_seed: int = 0,
    advance: Callable[[int], object] = lambda images: None,
) -> Predictions:
    """Return the logits of a split's images in evaluation mode, in the split's order.

    `advance` is called with the number of images of each batch that is done.
    """
    model.eval()
    logits, done = torch.empty(0), 0
    with torch.inference_mode(), autocast(str(split.device), precision):
        for images, _ in in_order(
            split,
            batch_size=evaluation.batch_size,
            normalisation=normalisation,
            memory_format=memory_format,
            crop_padding=evaluation.crop_padding,
            crop_seed=crop_seed,
        ):
            part = mean_logits(model, images, evaluation.views, evaluation.views_margin)
            if done == 0:
                # One array for all: small results kept beside large activations fragment glibc's
                # heap, which grew by 40 kB per image.
                logits = torch.empty((len(split), *part.shape[1:]), device=part.device)
            logits[done : done + len(part)] = part
            done += len(part)
            advance(len(part))
    labels = split.labels.index_select(0, split.indices.to(split.labels.device))
    return Predictions(logits.cpu().numpy(), labels.cpu().numpy(), split.indices.numpy())


def mean_logits(model: nn.Module, images: Tensor, views: str, margin: float = 1.0) -> Tensor:
    """Return the logits (B, C) of float images (B, C, H, W), averaged over views of each image.

    `one` is the image alone, `mirrored` the image and its mirror image. `moved` gives half of the
    weight to these two, and the other half to both shifted by one pixel along the diagonal in
    either direction, with a reflected border: the six views of airbench94 (Jordan 2024,
    arXiv:2404.00498). `unsure` gives these six to the images whose two largest probabilities in one
    view differ by less than `margin`, and one view to the others.
    """

    def both(shifted: Tensor) -> Tensor:
        logits: Tensor = (model(shifted) + model(shifted.flip(-1))) / 2
        return logits

    if views == "one":
        logits: Tensor = model(images)
        return logits
    if views == "unsure":
        logits = model(images).float()
        largest = logits.softmax(1).topk(2, dim=1).values
        unsure = (largest[:, 0] - largest[:, 1] < margin).nonzero().flatten()
        if len(unsure):
            few = mean_logits(model, images.index_select(0, unsure), "moved")
            logits = logits.index_copy(0, unsure, few.float())
        return logits
    if views == "mirrored":
        return both(images)
    padded = functional.pad(images, [1] * 4, mode="reflect")
    moved = both(padded[..., :-2, :-2]) + both(padded[..., 2:, 2:])
    return both(images) / 2 + moved / 4
