"""The order of the settings of a collection, and which differ significantly from the best."""

from cifar_lab.analysis import run_metrics, statistics
from cifar_lab.analysis.seed_groups import RunCollection, SeedGroup
from cifar_lab.config.reports import reported_of
from cifar_lab.errors import UsageError
from cifar_lab.runs.metrics import Predictions


def rank(collection: RunCollection, metric: str | None, *, compare: bool = True) -> None:
    """Rank the settings of each dataset and choose the best; if `compare`, test the others by it.

    By the mean of the best value of the score that the runs monitor, or by `metric`. Runs that
    monitor different scores are ranked by best_val_accuracy. Where no validation images were held
    out and no metric was asked for, nothing is ranked and a note gives the reason.
    """
    monitors = sorted({run.config.training.monitor for run in collection.runs})
    monitored = monitors[0] if len(monitors) == 1 else "val_accuracy"
    collection.metric = metric or f"best_{monitored}"
    run_metrics.check(collection.metric)
    sign = -1 if run_metrics.higher_is_better(collection.metric) else 1
    for dataset in sorted({setting.dataset for setting in collection.settings}):
        settings = [setting for setting in collection.settings if setting.dataset == dataset]
        scored = [setting for setting in settings if setting.mean(collection.metric) is not None]
        if not scored:
            if any(setting.finished for setting in settings):
                collection.notes.append(_why_unranked(collection, dataset, settings))
            continue
        collection.ranked = True
        scored.sort(
            key=lambda setting: (sign * (setting.mean(collection.metric) or 0.0), setting.key)
        )
        for place, setting in enumerate(scored, start=1):
            setting.rank = place
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
    """Compare the best setting with each other one; p values are adjusted by Holm's method."""
    if "accuracy" not in collection.metric or "balanced" in collection.metric:
        for setting in ranking[1:]:
            setting.not_tested = f"paired tests compare accuracies, not {collection.metric}"
        return
    test = run_metrics.is_test(collection.metric)
    split = "test" if test else "validation"
    weights = "last" if collection.metric == "test_accuracy_last" else "scored"
    best = ranking[0].predictions(split, weights)
    for setting in ranking[1:]:
        other = setting.predictions(split, weights)
        if not best or not other:
            lacking = "it" if best else "the best setting"
            setting.not_tested = f"{lacking} has no {split} predictions"
            continue
        try:
            images = _training_images(setting, other)
            setting.against_best = statistics.compare(best, other, images)
        except UsageError as error:
            setting.not_tested = str(error)
    tests = [(setting, setting.against_best) for setting in ranking if setting.against_best]
    adjusted = statistics.holm([test.p for _, test in tests])
    for (setting, _), p in zip(tests, adjusted, strict=True):
        setting.p_adjusted = p


def _training_images(setting: SeedGroup, held_out: list[Predictions]) -> int | None:
    """Return the images that a run of a setting trains on; None if they are not known.

    `held_out` are the predictions of its runs, from whose size that of all folds follows.
    """
    config = setting.runs[0].config
    if config.split.folds is not None:
        return round((config.split.folds - 1) * sum(map(len, held_out)) / len(held_out))
    size = config.dataset.train_size
    if size is None or config.split.source != "train":
        return size
    return size - config.split.held_out(size)


def _why_unranked(collection: RunCollection, dataset: str, settings: list[SeedGroup]) -> str:
    if collection.metric.startswith("best_val_") and all(
        run.config.split.validation == 0 for setting in settings for run in setting.finished
    ):
        named = {
            claim.metric
            for setting in settings
            for run in setting.runs
            for claim in reported_of(run.config).claims
            if "accuracy" in claim.metric
        }
        hint = f", or by a metric of the claims: {', '.join(sorted(named))}" if named else ""
        return (
            f"{dataset}: no validation images were held out (protocol "
            f"{settings[0].runs[0].config.protocol}), so the settings are not ranked and none is "
            "chosen: choosing by the test score would make that score worthless. --metric ranks by "
            f"another metric if you want to{hint}."
        )
    return f"{dataset}: no finished run has a {collection.metric}, so its settings are not ranked."


def _warnings(collection: RunCollection) -> list[str]:
    found = []
    configs = [run.config for run in collection.runs if run.finished]
    if run_metrics.is_test(collection.metric):
        found.append(
            f"Ranked by {collection.metric}, as requested: the best setting is chosen on the test "
            "images, so its score is optimistic."
        )
    elif any(c.split.source == "test" and c.split.validation > 0 for c in configs):
        found.append(
            "Some runs take their validation images from the test set (split.source=test): a test "
            "score that counts these images is optimistic."
        )
    scored = [setting for setting in collection.settings if setting.rank is not None]
    if scored and all(len(setting.finished) == 1 for setting in scored) and len(scored) > 1:
        found.append(
            "Each ranked setting has one run: a difference is one between these networks; how much "
            "other seeds vary is not known."
        )
    return found
