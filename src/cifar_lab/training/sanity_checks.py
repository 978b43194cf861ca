"""Sanity checks: mistakes of the reproduced reports and other pitfalls, detected in a run.

Each check returns warnings, none if all is well; `run_experiment` logs them and keeps them in
summary.json. docs/reports.md lists the reports' mistakes with what is done about each.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cifar_lab.config.run_config import EvaluationConfig, RunConfig
from cifar_lab.runs.metrics import EpochMetrics, are_probabilities, binomial_half_width
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.batches import Batches, in_order
from cifar_lab.training.device import seeded
from cifar_lab.training.splits import Split, Splits
from cifar_lab.training.state import TrainState
from cifar_lab.training.step import class_weights

_PROBED = 64  # images on which a model's outputs and gates are inspected
_WIDE = 0.02  # half width of the validation accuracy's interval from which to warn
_LEARNT = 0.995  # a loss below this share of a constant answer's loss is not chance
_FEATURES_KEPT = 2000  # images whose features the evaluation keeps
_DIGITS = ("cifar_lab.datasets.digits.load", "cifar_lab.datasets.mnist.load")


def before(config: RunConfig, splits: Splits, state: TrainState, batches: Batches) -> list[str]:
    """Return the warnings before training: about the config, the images and the model."""
    images = first_images(splits.train, batches)
    return [
        *splits.warnings,
        *check_config(config, splits),
        *check_outputs(state.model, images),
        *check_gates(state.model, images),
    ]


def after(run: RunDir, splits: Splits, state: TrainState, batches: Batches) -> list[str]:
    """Return the warnings after evaluation: about losses, scores and gates."""
    setting = run.read_config().training.class_weights
    labels = splits.train.labels.cpu().index_select(0, splits.train.indices)
    weights = class_weights(setting, splits.train, len(splits.class_names))
    warnings = check_learning(state.history, labels, weights)
    if splits.validation is not None:
        scored = run.read_predictions("validation")
        warnings += check_interval(scored.accuracy, len(scored))
    return warnings + check_gates(state.model, first_images(splits.train, batches))


# --- the config and the sizes of the splits -------------------------------------------------------


def check_config(config: RunConfig, splits: Splits) -> list[str]:
    """Return the warnings that follow from the config and the sizes of the splits."""
    dataset, split, evaluation = config.dataset, config.split, config.evaluation
    tested, official = len(splits.test), len(splits.official_test)
    seen = "; the test set is watched each epoch" if evaluation.watch_test else ""
    on_cuda = config.device.startswith("cuda") and config.precision == "bf16"
    drawn = (config.figures.get("tsne") or {}, config.figures.get("pca") or {})
    asked = max(int(figure.get("sample_size") or 0) for figure in drawn)
    kept = min(_FEATURES_KEPT, tested)
    checks = [
        (
            evaluation.crop_padding,
            f"evaluated images are cropped at random (evaluation.crop_padding="
            f"{evaluation.crop_padding}): scores are noisy and too low",
        ),
        (
            split.source == "test" and split.validation,
            "the validation images come from the official test set (split.source=test): the best "
            "epoch is chosen on test images, and a test score that includes them is too high",
        ),
        (
            evaluation.test == "official" and official != tested,
            f"the supports add up to {official:,} images, but the test split has {tested:,}: the "
            "others were there when the model was chosen",
        ),
        (
            not split.validation,
            f"no validation images (split.validation=0){seen}: an epoch or a learning rate chosen "
            "by these scores is chosen on the test set",
        ),
        (
            dataset.mean is None and dataset.std is None,
            "images are not normalised (dataset.mean and dataset.std are null); dataset.mean=auto "
            "dataset.std=auto computes them from the training images",
        ),
        (
            dataset.source["_target_"] in _DIGITS and config.augmentation.horizontal_flip,
            f"training images of {dataset.name} are mirrored (augmentation.horizontal_flip=true): "
            "a mirrored digit is not that digit, and the accuracy is lower; augmentation=none "
            "leaves them as they are",
        ),
        (
            on_cuda and not torch.cuda.is_bf16_supported(including_emulation=False),
            "this GPU emulates bf16, slower than fp32; precision=fp16 is what it computes fast",
        ),
        (
            asked > kept,
            f"pca and tsne show {kept:,} test images instead of the requested {asked:,}",
        ),
    ]
    return [warning for holds, warning in checks if holds]


# --- the model ------------------------------------------------------------------------------------


def check_outputs(model: nn.Module, images: Tensor) -> list[str]:
    """Warn if the outputs are already probabilities: the loss applies softmax too (S4)."""
    model.eval()
    with seeded(0), torch.no_grad():
        outputs = model(images).float()
    if not are_probabilities(outputs.cpu().numpy()):
        return []
    # The lowest loss is that of the outputs (1, 0, ..., 0) where the first class is right.
    best = torch.eye(outputs.shape[1], dtype=torch.float64)[0]
    floor = float(torch.logsumexp(best, 0) - 1)
    return [
        "the model's outputs already sum to 1, and cross-entropy applies softmax to them "
        f"again: the loss cannot fall below {floor:.4f} and gradients "
        "are damped; let the model return logits (mixed_kernel: model.softmax_output=false)"
    ]


def check_gates(model: nn.Module, images: Tensor) -> list[str]:
    """Warn of blocks whose gates are zero for every image of a batch: they output zeros."""
    gates: Callable[[Tensor], list[Tensor]] | None = getattr(model, "gates", None)
    if gates is None:
        return []
    model.eval()
    with seeded(0), torch.no_grad():
        weights = gates(images)
    dead = [str(number) for number, gate in enumerate(weights, start=1) if not gate.any()]
    if not dead:
        return []
    blocks = "block " + dead[0] if len(dead) == 1 else "blocks " + ", ".join(dead)
    return [
        f"the gate of {blocks} is zero for all of {len(images)} images, so its output is zero; "
        "try another seed, or model.gate=softmax"
    ]


def first_images(split: Split, batches: Batches) -> Tensor:
    """Return some images of a split as the model receives them, without augmentation."""
    part = dataclasses.replace(split, indices=split.indices[:_PROBED])
    chosen = in_order(part, EvaluationConfig(batch_size=_PROBED), batches.normalisation)
    return next(chosen)[0]


# --- losses and scores ----------------------------------------------------------------------------


def check_learning(
    history: Sequence[EpochMetrics], labels: Tensor, weights: Tensor | None = None
) -> list[str]:
    """Warn if the network ends no better than one that ignores the image.

    `labels` (N,) are those of the training images. The best answer that is the same for every
    image is their frequencies, and its cross-entropy is their entropy: this is where S1's printed
    learning rate ends. With class `weights` (C,), the training loss is compared with the best
    answer by these weights. A run of a single epoch is not judged.
    """
    counts = labels.bincount(minlength=0 if weights is None else len(weights)).double()
    unweighted = _entropy(counts)
    constant = unweighted if weights is None else _entropy(counts * weights.cpu())

    def learnt(row: EpochMetrics) -> bool:
        validates = row.val_loss is not None and row.val_loss < _LEARNT * unweighted
        return validates or row.train_loss < _LEARNT * constant

    if len(history) < 2 or constant == 0 or learnt(history[-1]):
        return []
    last, better = history[-1], [row for row in history if learnt(row)]
    loss = f"its training loss, {last.train_loss:.4f}, is no better than a constant answer's"
    loss += f", {constant:.4f}"
    if not better:
        return [
            f"the network has learnt nothing: {loss}; try another optimizer.lr (it is "
            f"{last.learning_rate:g}), or more epochs"
        ]
    best = min(better, key=lambda row: row.train_loss)
    return [
        f"learning collapsed after epoch {better[-1].epoch}: {loss} ({best.train_loss:.4f} in "
        f"epoch {best.epoch}); try a smaller optimizer.lr (it is {last.learning_rate:g})"
    ]


def _entropy(counts: Tensor) -> float:
    shares = counts / counts.sum().clamp(min=1e-300)
    return float(torch.special.entr(shares).sum())


def check_interval(accuracy: float, images: int) -> list[str]:
    """Warn of a validation split too small to compare epochs or runs."""
    half = binomial_half_width(accuracy, images)
    if not half > _WIDE:
        return []
    return [
        f"the validation accuracy {accuracy:.2%} is measured on {images:,} images, 95 % interval "
        f"±{100 * half:.1f} points: epochs and runs that differ by less cannot be told apart"
    ]
