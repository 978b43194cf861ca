"""What reports did wrong or left unsaid, found in a run and said in plain words.

Each guard returns warnings, none where all is well; execute logs them and keeps them in
summary.json. docs/reports.md lists them by the numbers of the reports' mistakes.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cifar_lab import device
from cifar_lab.config import RunConfig, flatten, to_plain
from cifar_lab.data import Batches, Normalisation, Split, Splits, in_order
from cifar_lab.metrics import EpochMetrics, Predictions, binomial_half_width
from cifar_lab.run_dir import RunDir
from cifar_lab.training import TrainState

_PROBED = 64  # images on which a model's outputs and gates are looked at
_WIDE = 0.02  # a half width of the validation accuracy's interval that is worth a word
_FEATURES_KEPT = 2000  # images whose features evaluation keeps
_LEARNT = 0.995  # a loss below this share of a constant answer's is not chance


def before(
    settings: RunConfig, splits: Splits, state: TrainState, batches: Batches, run: RunDir
) -> list[str]:
    """Return what can be said before training: of the config, the batches and the model."""
    images = probe(splits.train, batches)
    return [
        *check_config(settings, test_size=len(splits.test)),
        *check_order(sampled(batches), splits),
        *check_learning_rate(settings, state.learning_rate, state.epoch),
        *check_outputs(state.model, images),
        *check_gates(state.model, images),
        *check_siblings(run),
    ]


def after(run: RunDir, splits: Splits, state: TrainState, batches: Batches) -> list[str]:
    """Return what can be said after evaluation: of the losses, predictions, scores and gates."""
    settings = run.config
    official = settings.evaluation.test == "official"
    labels = splits.train.labels.cpu().index_select(0, splits.train.indices)
    warnings = check_learning(state.history, labels)
    warnings += check_predictions(
        run.read_predictions(), splits.official_test if official else splits.test, splits.test
    )
    if splits.validation is not None:
        scored = run.read_predictions("validation")
        warnings += check_predictions(scored, splits.validation, splits.validation)
        warnings += check_interval(scored.accuracy, len(scored))
    return warnings + check_gates(state.model, probe(splits.train, batches))


def check_config(settings: RunConfig, *, test_size: int) -> list[str]:
    """Return what the settings alone give away."""
    checks: list[Callable[[], str | None]] = [
        lambda: _random_crop(settings),
        lambda: _selection_on_test(settings),
        lambda: _no_validation(settings),
        lambda: _no_normalisation(settings),
        lambda: _no_claim(settings),
        lambda: _few_features(settings, test_size),
    ]
    return [warning for check in checks if (warning := check()) is not None]


def check_order(indices: Tensor, splits: Splits) -> list[str]:
    """Look at the order in which an epoch visits images: (N,) indices of the official set.

    Mistake 19: two samplers over the whole set, whose draws overlap.
    """
    warnings = []
    repeated = len(indices) - len(set(indices.tolist()))
    if repeated:
        warnings.append(f"an epoch draws {repeated:,} training images more than once")
    allowed = torch.isin(indices, splits.train.indices)
    if not bool(allowed.all()):
        outside = int((~allowed).sum())
        warnings.append(f"an epoch draws {outside:,} images that are not in the training split")
    # held-out images of the test set have indices of their own
    same_set = splits.validation is not None and splits.validation.images is splits.train.images
    if same_set and splits.validation is not None:
        leaked = int(torch.isin(splits.validation.indices, indices).sum())
        if leaked:
            warnings.append(
                f"the sampler leaks: {leaked:,} of {len(splits.validation):,} validation images "
                "are trained on"
            )
    return warnings


def check_learning_rate(settings: RunConfig, actual: float, epoch: int) -> list[str]:
    """Compare the optimizer's rate with the config's (mistake 10: text and code differ).

    A scheduler may change it; without one they are the same, unless the optimizer came from
    another run (continue_from).
    """
    stated = settings.optimizer.get("lr")
    if stated is None or settings.scheduler is not None or actual == stated:
        return []
    return [
        f"the optimizer's learning rate is {actual:g} after epoch {epoch}, but optimizer.lr says "
        f"{stated:g}: the rate came with the checkpoint"
    ]


def check_outputs(model: nn.Module, images: Tensor) -> list[str]:
    """Whether the outputs already sum to 1 under cross-entropy (mistake 46)."""
    model.eval()
    with device.seeded(0), torch.no_grad():
        outputs = model(images).float()
    if sum_to_one(outputs):
        return [
            "the model's outputs already sum to 1, and cross-entropy takes a softmax of them "
            f"again: the loss cannot fall below {_loss_floor(outputs.shape[1]):.4f} and gradients "
            "are damped; let the model return logits (mixed_kernel: model.softmax_output=false)"
        ]
    return []


def check_gates(model: nn.Module, images: Tensor) -> list[str]:
    """Say which blocks' gates are zero for every image of a batch: they pass nothing on."""
    gates: Callable[[Tensor], list[Tensor]] | None = getattr(model, "gates", None)
    if gates is None:
        return []
    model.eval()
    with device.seeded(0), torch.no_grad():
        weights = gates(images)
    dead = [str(number) for number, gate in enumerate(weights, start=1) if not gate.any()]
    if not dead:
        return []
    where = "block " + dead[0] if len(dead) == 1 else "blocks " + ", ".join(dead)
    return [
        f"the gate of {where} is zero for all of {len(images)} images: nothing passes; take "
        "another seed, or model.gate=softmax"
    ]


def check_learning(history: Sequence[EpochMetrics], labels: Tensor) -> list[str]:
    """Say where a network ends no better than one that does not look at the image.

    `labels` (N,) are the training images'; the best answer that is the same for every image is
    their frequencies, and its cross-entropy is their entropy. S1's printed rate ends there. Of a
    single epoch nothing is said.
    """
    shares = labels.bincount().double() / max(len(labels), 1)
    constant = float(torch.special.entr(shares).sum())

    def learnt(row: EpochMetrics) -> bool:
        losses = [row.train_loss, row.train_loss if row.val_loss is None else row.val_loss]
        return min(losses) < _LEARNT * constant

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
    """Compare the images that were scored with those that had to be.

    Mistake 48: a last batch left out. Mistake 3: supports that are not the split's size.
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
    """Say how little a small validation split tells (mistake 16)."""
    half = binomial_half_width(accuracy, images)
    if not half > _WIDE:
        return []
    return [
        f"the validation accuracy {accuracy:.2%} is of {images:,} images, 95 % interval "
        f"±{100 * half:.1f} points: epochs and runs closer than that cannot be told apart"
    ]


def check_siblings(run: RunDir) -> list[str]:
    """Look at the runs beside this one: one rate for SGD and Adam (7), one seed for all (43)."""
    runs = [s for path in sorted(run.path.parent.glob("*/summary.json")) if (s := _glance(path))]
    own = run.read_summary()
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
            "one of them; give each its own, or several"
        )
    if len(runs) > 1 and len({seed for _, _, seed in runs}) == 1:
        warnings.append(
            f"all {len(runs)} runs of this folder have seed {own.seed}: how much of a difference "
            "is chance is unknown; -m seed=0,1,2 repeats them"
        )
    return warnings


def probe(split: Split, batches: Batches) -> Tensor:
    """Return some images of a split as the model gets them, without augmentation."""
    part = Split(split.name, split.images, split.labels, split.indices[:_PROBED])
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
    generator = torch.Generator().manual_seed(device.derive_seed(batches.seed, "data", 1))
    return batches.split.indices[batches._order(generator)]


def sum_to_one(outputs: Tensor) -> bool:
    """Whether outputs (B, C) are probabilities: none negative, each row's sum 1."""
    sums = outputs.sum(dim=1)
    return bool((outputs >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)


def _random_crop(settings: RunConfig) -> str | None:
    padding = settings.evaluation.crop_padding
    if not padding:
        return None
    return (
        f"evaluated images are cropped at random (evaluation.crop_padding={padding}): scores are "
        "noisy and too low"
    )


def _selection_on_test(settings: RunConfig) -> str | None:
    if settings.split.source != "test" or not settings.split.validation:
        return None
    return (
        "the validation images come from the official test set (split.source=test): the best "
        "epoch is chosen on test images, and a test score that includes them is too high"
    )


def _no_validation(settings: RunConfig) -> str | None:
    if settings.split.validation:
        return None
    seen = "; the test set is watched each epoch" if settings.evaluation.watch_test else ""
    return (
        f"no validation images (split.validation=0){seen}: an epoch or a learning rate chosen by "
        "these scores is chosen on the test set"
    )


def _no_normalisation(settings: RunConfig) -> str | None:
    if settings.dataset.mean is not None or settings.dataset.std is not None:
        return None
    return (
        "images are not normalised (dataset.mean and dataset.std are null); describe prints the "
        "computed ones"
    )


def _no_claim(settings: RunConfig) -> str | None:
    """Settings of a reproduced study for which its report prints no figure (10, 39)."""
    claims = settings.study.claims
    known = flatten(to_plain(settings))
    keys = sorted({key for claim in claims for key in claim.where})
    fits = [all(known.get(k) == v for k, v in claim.where.items()) for claim in claims]
    if not claims or any(fits):
        return None
    stated = ", ".join(f"{key}={known.get(key)}" for key in keys)
    wanted = {
        ", ".join(f"{key}={value}" for key, value in claim.where.items()): None for claim in claims
    }
    return (
        f"{settings.study.report} prints no figure for these settings ({stated}); its figures are "
        f"for {'; '.join(wanted)}"
    )


def _few_features(settings: RunConfig, test_size: int) -> str | None:
    """PCA or t-SNE settings that the images cannot meet (mistake 36: they were left unsaid)."""
    kept = min(_FEATURES_KEPT, test_size)
    tsne, pca = settings.figures.get("tsne") or {}, settings.figures.get("pca") or {}
    asked = max([int(f.get("sample_size") or 0) for f in (tsne, pca)])
    perplexity = float(tsne.get("perplexity") or 0)
    count = min(kept, int(tsne.get("sample_size") or kept))
    if tsne and perplexity >= count:
        return (
            f"figures.tsne.perplexity={perplexity:g} is too large for {count} images; it must be "
            "less"
        )
    if asked > kept:
        return f"pca and tsne show {kept:,} test images, not the {asked:,} that are asked for"
    return None


def _loss_floor(num_classes: int) -> float:
    """Return the cross-entropy of softmax((1, 0, ..., 0)) when the first class is right."""
    logits = torch.zeros(num_classes, dtype=torch.float64)
    logits[0] = 1
    return float(torch.logsumexp(logits, 0) - 1)


def _same_but_optimizer(a: dict[str, str], b: dict[str, str]) -> bool:
    left, right = ({k: v for k, v in each.items() if k != "optimizer"} for each in (a, b))
    return left == right


def _glance(path: Any) -> tuple[dict[str, str], float | None, int] | None:
    """Return choices, learning rate and seed from a summary.json; None where it is not whole."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return dict(data["choices"]), data.get("initial_learning_rate"), int(data["seed"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
