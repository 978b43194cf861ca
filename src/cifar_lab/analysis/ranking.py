"""The order of the groups of a collection, and what separates each from the best or a baseline."""

from collections.abc import Sequence

from cifar_lab.analysis import run_metrics, texts
from cifar_lab.analysis.contrasts import CannotJudge, contrast
from cifar_lab.analysis.power import Family
from cifar_lab.analysis.seed_groups import RunCollection, SeedGroup, pooled_in
from cifar_lab.errors import UsageError, listing, shorten


def rank(collection: RunCollection, metric: str | None = None, baseline: str | None = None) -> None:
    """Rank the groups of each dataset, choose the best, and set the others against it.

    By the mean of the best value of the score that the runs monitor, or by `metric`. Runs that
    monitor different scores are ranked by best_val_accuracy. Where no validation images were held
    out and no metric was asked for, nothing is ranked and a note gives the reason. `baseline`
    (`optimizer=sgd`) names the group of each dataset that takes the place of the best.
    """
    monitors = sorted({run.config.training.monitor for run in collection.runs})
    monitored = monitors[0] if len(monitors) == 1 else "val_accuracy"
    collection.metric = metric or f"best_{monitored}"
    run_metrics.check(collection.metric)
    collection.baseline = baseline
    named = collection.select(baseline) if baseline else []
    sign = -1 if run_metrics.higher_is_better(collection.metric) else 1
    for dataset in collection.datasets:
        groups = [group for group in collection.groups if group.dataset == dataset]
        means = {id(group): group.mean(collection.metric) for group in groups}
        scored = [group for group in groups if means[id(group)] is not None]
        if not scored:
            if any(group.finished for group in groups):
                collection.notes.append(_why_unranked(collection, dataset, groups))
            continue
        collection.ranked = True
        scored.sort(key=lambda group: (sign * (means[id(group)] or 0.0), group.key))
        for place, group in enumerate(scored, start=1):
            group.rank = place
        scored[0].chosen = True
        reference = scored[0] if not baseline else _one_baseline(collection, scored, named)
        if reference is not None:
            set_against(collection, scored, reference)
    if baseline and not any(group.is_reference for group in collection.groups):
        raise UsageError(f"--baseline {shorten(baseline)}: it has no {collection.metric} yet")
    if collection.ranked:
        if metric is None and len(monitors) > 1:
            collection.notes.append(
                f"The runs monitor different scores ({', '.join(monitors)}), so they are ranked by "
                f"{collection.metric}; --metric ranks by another."
            )
        collection.notes += _warnings(collection)


def conclusion(collection: RunCollection) -> list[str]:
    """Rank the runs of a sweep; return what `summarize` says of the best, of each dataset.

    Which configuration has the best score, which ones it is not told apart from, and how many seeds
    would tell the best two apart.
    """
    rank(collection)
    best = [texts.best_text(collection, group) for group in collection.ranking if group.chosen]
    return [*best, *texts.seeds_lines(collection)]


def _one_baseline(
    collection: RunCollection, scored: Sequence[SeedGroup], named: Sequence[SeedGroup]
) -> SeedGroup | None:
    """Return the group of a dataset that the baseline names; UsageError if there are several."""
    fitting = [group for group in scored if any(group is one for one in named)]
    if len(fitting) > 1:
        raise UsageError(
            f"--baseline {shorten(collection.baseline or '')} fits {len(fitting)} configurations "
            f"({listing(map(collection.label, fitting), 120)}); name one by more of their values, "
            "as in --baseline optimizer=sgd,activation=relu"
        )
    return fitting[0] if fitting else None


def set_against(
    collection: RunCollection, scored: Sequence[SeedGroup], reference: SeedGroup
) -> None:
    """Set each group's difference to the reference, or the reason why there is none."""
    reference.is_reference = True
    samples = {id(group): group.sample(collection.metric) for group in scored}
    deviation = pooled_in(scored, collection.metric)
    family = Family(max(len(scored) - 1, 1), chosen=collection.baseline is None)
    best = samples[id(reference)]
    for group in scored:
        sample = samples[id(group)]
        if group is reference or sample is None or best is None:
            continue
        try:
            group.difference = contrast([sample], [best], deviation, family)
        except CannotJudge as error:
            group.not_judged = str(error)


def _why_unranked(collection: RunCollection, dataset: str, groups: list[SeedGroup]) -> str:
    if collection.metric.startswith("best_val_") and all(
        run.config.split.validation == 0 for group in groups for run in group.finished
    ):
        return (
            f"{dataset}: no validation images were held out (protocol "
            f"{groups[0].runs[0].config.protocol}), so the configurations are not ranked and "
            "none is chosen: choosing by the test score would make that score worthless. --metric "
            "test_accuracy_last ranks by it all the same."
        )
    return (
        f"{dataset}: no finished run has a {collection.metric}, so its configurations are not "
        "ranked."
    )


def _warnings(collection: RunCollection) -> list[str]:
    warnings = []
    configs = [run.config for run in collection.runs if run.finished]
    if run_metrics.is_test(collection.metric):
        warnings.append(
            f"Ranked by {collection.metric}, as requested: the best configuration is chosen on the "
            "test images, so its score is optimistic."
        )
    elif any(c.split.source == "test" and c.split.validation > 0 for c in configs):
        warnings.append(
            "Some runs take their validation images from the test set (split.source=test): a test "
            "score that counts these images is optimistic."
        )
    return warnings
