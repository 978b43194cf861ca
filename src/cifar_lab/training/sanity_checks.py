"""Sanity checks: mistakes of the reproduced reports and other pitfalls, detected in a run.

Each check returns warnings, none if all is well; `run_experiment` logs them and keeps them in
summary.json. docs/reports.md lists the reports' mistakes with what is done about each.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import RunFailed, UsageError
from cifar_lab.runs import summary as summary_module
from cifar_lab.runs.files import read_bytes
from cifar_lab.runs.metrics import EpochMetrics, Predictions, binomial_half_width
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.batches import Batches, Normalisation, in_order
from cifar_lab.training.config_checks import check_config
from cifar_lab.training.criterion import class_weights
from cifar_lab.training.device import derive_seed, seeded
from cifar_lab.training.splits import Split, Splits
from cifar_lab.training.state import TrainState

_PROBED = 64  # images on which a model's outputs and gates are inspected
_WIDE = 0.02  # half width of the validation accuracy's interval from which to warn
_LEARNT = 0.995  # a loss below this share of a constant answer's loss is not chance


def before(
    config: RunConfig, splits: Splits, state: TrainState, batches: Batches, run: RunDir
) -> list[str]:
    """Return the warnings before training: about the config, the batches and the model."""
    images = probe(splits.train, batches)
    return [
        *splits.warnings,
        *check_config(config, test_size=len(splits.test)),
        *check_order(sampled(batches), splits),
        *check_learning_rate(config, state.learning_rate, state.epoch),
        *check_outputs(state.model, images),
        *check_gates(state.model, images),
        *check_siblings(run, folds=config.split.folds is not None),
    ]


def after(run: RunDir, splits: Splits, state: TrainState, batches: Batches) -> list[str]:
    """Return the warnings after evaluation: about losses, predictions, scores and gates."""
    config = run.read_config()
    official = config.evaluation.test == "official"
    labels = splits.train.labels.cpu().index_select(0, splits.train.indices)
    weights = class_weights(config.training.class_weights, splits.train, len(splits.class_names))
    warnings = check_learning(state.history, labels, weights)
    warnings += check_predictions(
        run.read_predictions(), splits.official_test if official else splits.test, splits.test
    )
    if splits.validation is not None:
        scored = run.read_predictions("validation")
        warnings += check_predictions(scored, splits.validation, splits.validation)
        warnings += check_interval(scored.accuracy, len(scored))
    return warnings + check_gates(state.model, probe(splits.train, batches))


def check_order(indices: Tensor, splits: Splits) -> list[str]:
    """Check the order in which an epoch visits images: (N,) indices of the official set.

    S1 had two samplers over the whole set, whose draws overlapped.
    """
    warnings = []
    repeated = len(indices) - len(set(indices.tolist()))
    if repeated:
        warnings.append(f"an epoch draws {repeated:,} training images more than once")
    allowed = torch.isin(indices, splits.train.indices)
    if not bool(allowed.all()):
        outside = int((~allowed).sum())
        warnings.append(f"an epoch draws {outside:,} images that are not in the training split")
    # Validation images taken from the test set have indices of their own.
    same_set = splits.validation is not None and splits.validation.images is splits.train.images
    if same_set and splits.validation is not None:
        leaked = int(torch.isin(splits.validation.indices, indices).sum())
        if leaked:
            warnings.append(
                f"the sampler leaks: {leaked:,} of {len(splits.validation):,} validation images "
                "are trained on"
            )
    return warnings


def check_learning_rate(config: RunConfig, actual: float, epoch: int) -> list[str]:
    """Compare the optimizer's rate with the config's: in S1, text and code differ.

    A scheduler may change it; without one they are the same, unless the optimizer came from
    another run (continue_from).
    """
    stated = config.optimizer.get("lr")
    if stated is None or config.scheduler is not None or actual == stated:
        return []
    return [
        f"the optimizer's learning rate is {actual:g} after epoch {epoch}, but optimizer.lr says "
        f"{stated:g}: the rate came with the checkpoint"
    ]


def check_outputs(model: nn.Module, images: Tensor) -> list[str]:
    """Warn if the outputs are already probabilities: the loss applies softmax too (S4)."""
    model.eval()
    with seeded(0), torch.no_grad():
        outputs = model(images).float()
    if sum_to_one(outputs):
        return [
            "the model's outputs already sum to 1, and cross-entropy applies softmax to them "
            f"again: the loss cannot fall below {_loss_floor(outputs.shape[1]):.4f} and gradients "
            "are damped; let the model return logits (mixed_kernel: model.softmax_output=false)"
        ]
    return []


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


def check_predictions(predictions: Predictions, asked: Split, split: Split) -> list[str]:
    """Compare the images that were scored with those that should have been.

    S4 left out a last batch, and S0's supports are not the size of the split.
    """
    warnings = []
    scored = torch.from_numpy(predictions.indices)
    missing = int((~torch.isin(asked.indices, scored)).sum())
    if missing:
        warnings.append(
            f"{missing:,} of {len(asked):,} images of the {asked.name} split were not scored: "
            "evaluation must not drop the last batch"
        )
    if len(predictions) != len(split) and not missing:
        warnings.append(
            f"the supports add up to {len(predictions):,} images, but the {split.name} split has "
            f"{len(split):,}: the others were there when the model was chosen"
        )
    return warnings


def check_interval(accuracy: float, images: int) -> list[str]:
    """Warn of a validation split too small to compare epochs or runs."""
    half = binomial_half_width(accuracy, images)
    if not half > _WIDE:
        return []
    return [
        f"the validation accuracy {accuracy:.2%} is measured on {images:,} images, 95 % interval "
        f"±{100 * half:.1f} points: epochs and runs that differ by less cannot be told apart"
    ]


def check_siblings(run: RunDir, *, folds: bool = False) -> list[str]:
    """Check the runs beside this one: one learning rate for SGD and Adam, one seed for all.

    Only runs of the same dataset and experiment are compared. Runs with `folds` may have one seed.
    """
    own = run.read_summary()
    beside = map(_read_choices, sorted(run.path.parent.glob("*/summary.json")))
    runs = [
        found
        for found in beside
        if found is not None
        and all(found[0].get(key) == own.choices.get(key) for key in ("dataset", "experiment"))
    ]
    rates: dict[str, set[float | None]] = {"sgd": set(), "adam": set()}
    for choices, rate, _ in runs:
        family = next((f for f in rates if str(choices.get("optimizer")).startswith(f)), None)
        if family is not None and _same_but_optimizer(choices, own.choices):
            rates[family].add(rate)
    warnings = []
    if rates["sgd"] == rates["adam"] and len(rates["sgd"]) == 1 and None not in rates["sgd"]:
        (rate,) = rates["sgd"]
        warnings.append(
            f"SGD and Adam are compared at the one learning rate {rate:g}, which suits at most "
            "one of them; tune it for each"
        )
    if len(runs) > 1 and len({seed for _, _, seed in runs}) == 1 and not folds:
        warnings.append(
            f"all {len(runs)} comparable runs of this folder have seed {own.seed}, so differences "
            "due to chance cannot be estimated; -m seed=0,1,2 repeats them"
        )
    return warnings


def probe(split: Split, batches: Batches) -> Tensor:
    """Return some images of a split as the model receives them, without augmentation."""
    part = dataclasses.replace(split, indices=split.indices[:_PROBED])
    normalisation: Normalisation = batches.normalisation
    chosen = in_order(
        part,
        batch_size=_PROBED,
        normalisation=normalisation,
        memory_format=batches.memory_format,
    )
    return next(iter(chosen))[0]


def sampled(batches: Batches) -> Tensor:
    """Return the official set's indices, (N,), in the order of the first epoch."""
    generator = torch.Generator().manual_seed(derive_seed(batches.seed, "data", 1))
    return batches.split.indices[batches.order(generator)]


def sum_to_one(outputs: Tensor) -> bool:
    """Whether outputs (B, C) are probabilities: none negative, each row's sum 1."""
    sums = outputs.sum(dim=1)
    return bool((outputs >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)


def _entropy(counts: Tensor) -> float:
    shares = counts / counts.sum().clamp(min=1e-300)
    return float(torch.special.entr(shares).sum())


def _loss_floor(num_classes: int) -> float:
    """Return the cross-entropy of softmax((1, 0, ..., 0)) when the first class is right."""
    logits = torch.zeros(num_classes, dtype=torch.float64)
    logits[0] = 1
    return float(torch.logsumexp(logits, 0) - 1)


def _same_but_optimizer(a: dict[str, str], b: dict[str, str]) -> bool:
    left, right = ({k: v for k, v in each.items() if k != "optimizer"} for each in (a, b))
    return left == right


def _read_choices(path: Path) -> tuple[dict[str, str], float | None, int] | None:
    """Return choices, learning rate and seed from a summary.json; None if it is damaged."""
    try:
        summary = summary_module.from_json(read_bytes(path))
    except (OSError, ValueError, UsageError, RunFailed, RecursionError):
        return None
    return summary.choices, summary.initial_learning_rate, summary.seed
