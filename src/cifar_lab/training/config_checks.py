"""Sanity checks of the settings alone: mistakes of the reproduced reports and other pitfalls.

docs/reports.md lists the reports' mistakes by the numbers that are given here.
"""

from collections.abc import Callable

from cifar_lab.config.reports import reported_of
from cifar_lab.config.run_config import RunConfig, flatten, to_plain

_FEATURES_KEPT = 2000  # images whose features the evaluation keeps
_DIGITS = ("cifar_lab.datasets.digits.load", "cifar_lab.datasets.mnist.load")


def check_config(settings: RunConfig, *, test_size: int) -> list[str]:
    """Return the warnings that follow from the settings alone."""
    checks: list[Callable[[], str | None]] = [
        lambda: _random_crop(settings),
        lambda: _selection_on_test(settings),
        lambda: _no_validation(settings),
        lambda: _no_normalisation(settings),
        lambda: _mirrored_digits(settings),
        lambda: _no_claim(settings),
        lambda: _few_features(settings, test_size),
    ]
    return [warning for check in checks if (warning := check()) is not None]


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
        "images are not normalised (dataset.mean and dataset.std are null); dataset.mean=auto "
        "dataset.std=auto computes them from the training images"
    )


def _mirrored_digits(settings: RunConfig) -> str | None:
    dataset = settings.dataset
    of_digits = dataset.source["_target_"] in _DIGITS
    if not of_digits or not settings.augmentation.horizontal_flip:
        return None
    return (
        f"training images of {dataset.name} are mirrored (augmentation.horizontal_flip=true): a "
        "mirrored digit is not that digit, and the accuracy is lower; augmentation=none leaves "
        "them as they are"
    )


def _no_claim(settings: RunConfig) -> str | None:
    """Settings of a reproduced study for which its report gives no figure (10, 39)."""
    claims = reported_of(settings).claims
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
        f"{settings.study.report} gives no figure for these settings ({stated}); its figures are "
        f"for {'; '.join(wanted)}"
    )


def _few_features(settings: RunConfig, test_size: int) -> str | None:
    """PCA or t-SNE settings that need more images than there are (mistake 36: not stated)."""
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
        return f"pca and tsne show {kept:,} test images instead of the requested {asked:,}"
    return None
