"""Warnings that follow from a config alone: mistakes of the reproduced reports, other pitfalls.

docs/reports.md lists the reports' mistakes with what is done about each.
"""

from collections.abc import Iterator

from cifar_lab.config.reports import reported_of
from cifar_lab.config.run_config import RunConfig, flatten, to_plain

_FEATURES_KEPT = 2000  # images whose features the evaluation keeps
_DIGITS = ("cifar_lab.datasets.digits.load", "cifar_lab.datasets.mnist.load")


def check_config(config: RunConfig, *, test_size: int) -> list[str]:
    """Return the warnings that follow from the config alone."""
    return list(_warnings(config, test_size))


def _warnings(config: RunConfig, test_size: int) -> Iterator[str]:
    dataset, split, evaluation = config.dataset, config.split, config.evaluation
    if evaluation.crop_padding:
        yield (
            f"evaluated images are cropped at random (evaluation.crop_padding="
            f"{evaluation.crop_padding}): scores are noisy and too low"
        )
    if split.source == "test" and split.validation:
        yield (
            "the validation images come from the official test set (split.source=test): the best "
            "epoch is chosen on test images, and a test score that includes them is too high"
        )
    if not split.validation:
        seen = "; the test set is watched each epoch" if evaluation.watch_test else ""
        yield (
            f"no validation images (split.validation=0){seen}: an epoch or a learning rate chosen "
            "by these scores is chosen on the test set"
        )
    if dataset.mean is None and dataset.std is None:
        yield (
            "images are not normalised (dataset.mean and dataset.std are null); dataset.mean=auto "
            "dataset.std=auto computes them from the training images"
        )
    if dataset.source["_target_"] in _DIGITS and config.augmentation.horizontal_flip:
        yield (
            f"training images of {dataset.name} are mirrored (augmentation.horizontal_flip=true): "
            "a mirrored digit is not that digit, and the accuracy is lower; augmentation=none "
            "leaves them as they are"
        )
    yield from _no_claim(config)
    yield from _few_features(config, test_size)


def _no_claim(config: RunConfig) -> Iterator[str]:
    """Settings of a reproduced study for which its report gives no figure (S1, S3)."""
    claims = reported_of(config).claims
    known = flatten(to_plain(config))
    keys = sorted({key for claim in claims for key in claim.where})
    if claims and not any(
        all(known.get(k) == v for k, v in claim.where.items()) for claim in claims
    ):
        stated = ", ".join(f"{key}={known.get(key)}" for key in keys)
        settings = [", ".join(f"{k}={v}" for k, v in claim.where.items()) for claim in claims]
        yield (
            f"{config.study.report} gives no figure for these settings ({stated}); its figures are "
            f"for {'; '.join(dict.fromkeys(settings))}"
        )


def _few_features(config: RunConfig, test_size: int) -> Iterator[str]:
    """PCA or t-SNE settings that need more images than there are; S2 does not state its own."""
    kept = min(_FEATURES_KEPT, test_size)
    tsne, pca = config.figures.get("tsne") or {}, config.figures.get("pca") or {}
    asked = max(int(figure.get("sample_size") or 0) for figure in (tsne, pca))
    perplexity = float(tsne.get("perplexity") or 0)
    count = min(kept, int(tsne.get("sample_size") or kept))
    if tsne and perplexity >= count:
        yield (
            f"figures.tsne.perplexity={perplexity:g} is too large for {count} images; it must be "
            "less"
        )
    elif asked > kept:
        yield f"pca and tsne show {kept:,} test images instead of the requested {asked:,}"
