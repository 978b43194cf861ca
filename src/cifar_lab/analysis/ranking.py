"""The order of the configurations of a collection, and which differ significantly from the best."""

from cifar_lab.analysis import run_metrics, statistics
from cifar_lab.analysis.seed_groups import RunCollection, SeedGroup
from cifar_lab.config.reports import reported_of
from cifar_lab.errors import UsageError
from cifar_lab.runs.metrics import Predictions


def rank(collection: RunCollection, metric: str | None, *, compare: bool = True) -> None:
    """Rank the groups of each dataset and choose the best; if `compare`, test the others by it.

    By the mean of the best value of the score that the runs monitor, or by `metric`. Runs that
    monitor different scores are ranked by best_val_accuracy. Where no validation images were held
    out and no metric was asked for, nothing is ranked and a note gives the reason.
    """
    monitors = sorted({run.config.training.monitor for run in collection.runs})
    monitored = monitors[0] if len(monitors) == 1 else "val_accuracy"
    collection.metric = metric or f"best_{monitored}"
    run_metrics.check(collection.metric)
    sign = -1 if run_metrics.higher_is_better(collection.metric) else 1
    for dataset in sorted({group.dataset for group in collection.groups}):
        groups = [group for group in collection.groups if group.dataset == dataset]
        scored = [group for group in groups if group.mean(collection.metric) is not None]
        if not scored:
            if any(group.finished for group in groups):
                collection.notes.append(_why_unranked(collection, dataset, groups))
            continue
        collection.ranked = True
        scored.sort(key=lambda group: (sign * (group.mean(collection.metric) or 0.0), group.key))
        for place, group in enumerate(scored, start=1):
            group.rank = place
        scored[0].chosen = True
        if compare:
            _test_against_best(collection, scored)
    if collection.ranked:
        if metric is None and len(monitors) > 1:
            collection.notes.append(
                f"The runs monitor different scores ({', '.join(monitors)}), so they are ranked by "
                f"{collection.metric}; --metric ranks by another."
            )
        collection.notes += _warnings(collection)


def _test_against_best(collection: RunCollection, ranking: list[SeedGroup]) -> None:
    """Compare the best group with each other one; p values are adjusted by Holm's method."""
    if "accuracy" not in collection.metric or "balanced" in collection.metric:
        for group in ranking[1:]:
            group.not_tested = f"paired tests compare accuracies, not {collection.metric}"
        return
    test = run_metrics.is_test(collection.metric)
    split = "test" if test else "validation"
    weights = "last" if collection.metric == "test_accuracy_last" else "scored"
    best = ranking[0].predictions(split, weights)
    for group in ranking[1:]:
        other = group.predictions(split, weights)
        if not best or not other:
            lacking = "it" if best else "the best configuration"
            group.not_tested = f"{lacking} has no {split} predictions"
            continue
        try:
            images = _training_images(group, other)
            group.against_best = statistics.compare(best, other, images)
        except UsageError as error:
            group.not_tested = str(error)
    tests = [(group, group.against_best) for group in ranking if group.against_best]
    adjusted = statistics.holm([test.p for _, test in tests])
    for (group, _), p in zip(tests, adjusted, strict=True):
        group.p_adjusted = p


def _training_images(group: SeedGroup, held_out: list[Predictions]) -> int | None:
    """Return the images that a run of a configuration trains on; None if they are not known.

    `held_out` are the predictions of its runs, from whose size that of all folds follows.
    """
    config = group.runs[0].config
    if config.split.folds is not None:
        return round((config.split.folds - 1) * sum(map(len, held_out)) / len(held_out))
    size = config.dataset.train_size
    if size is None or config.split.source != "train":
        return size
    return size - config.split.held_out(size)


def _why_unranked(collection: RunCollection, dataset: str, groups: list[SeedGroup]) -> str:
    if collection.metric.startswith("best_val_") and all(
        run.config.split.validation == 0 for group in groups for run in group.finished
    ):
        named = {
            claim.metric
            for group in groups
            for run in group.runs
            for claim in reported_of(run.config).claims
            if "accuracy" in claim.metric
        }
        hint = f", or by a metric of the claims: {', '.join(sorted(named))}" if named else ""
        return (
            f"{dataset}: no validation images were held out (protocol "
            f"{groups[0].runs[0].config.protocol}), so the configurations are not ranked and "
            "none is chosen: choosing by the test score would make that score worthless. --metric "
            f"ranks by another metric if you want to{hint}."
        )
    return (
        f"{dataset}: no finished run has a {collection.metric}, so its configurations are not "
        "ranked."
    )


def _warnings(collection: RunCollection) -> list[str]:
    found = []
    configs = [run.config for run in collection.runs if run.finished]
    if run_metrics.is_test(collection.metric):
        found.append(
            f"Ranked by {collection.metric}, as requested: the best configuration is chosen on the "
            "test images, so its score is optimistic."
        )
    elif any(c.split.source == "test" and c.split.validation > 0 for c in configs):
        found.append(
            "Some runs take their validation images from the test set (split.source=test): a test "
            "score that counts these images is optimistic."
        )
    scored = [group for group in collection.groups if group.rank is not None]
    if scored and all(len(group.finished) == 1 for group in scored) and len(scored) > 1:
        found.append(
            "Each ranked configuration has one run: a difference is one between these networks; "
            "how much other seeds vary is not known."
        )
    return found
