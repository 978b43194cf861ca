"""What summary.md, report.html and the console say about runs, groups and tests, in words."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from cifar_lab.analysis import run_metrics
from cifar_lab.analysis.contrasts import Deviation, Difference, seeds_needed
from cifar_lab.analysis.effects import MainEffects
from cifar_lab.analysis.load_runs import FoundRun
from cifar_lab.analysis.power import Family, detectable
from cifar_lab.analysis.seed_groups import RunCollection, SeedGroup, pooled_in
from cifar_lab.analysis.statistics import Interval, show_p
from cifar_lab.errors import listing, shorten

_STATUSES = ("finished", "running", "interrupted", "queued", "failed")


def counts_text(collection: RunCollection) -> str:
    """Return how many runs and configurations there are, and in which state."""
    counts = status_counts(collection.runs)
    if collection.unreadable:
        counts["not readable"] = len(collection.unreadable)
    states = ", ".join(f"{number} {status}" for status, number in counts.items())
    runs, groups = sum(counts.values()), len(collection.groups)
    return (
        f"{runs} run{'s' * (runs != 1)} of {groups} configuration{'s' * (groups != 1)}: {states}."
    )


def status_counts(runs: Sequence[FoundRun]) -> dict[str, int]:
    """Return how many runs are in which state."""
    counts = Counter[str](run.summary.status for run in runs)
    return {status: counts[status] for status in _STATUSES if counts[status]}


def runs_text(group: SeedGroup) -> str:
    """Return how many runs are finished, and of how many where some are not."""
    done, every = len(group.finished), len(group.runs)
    return str(done) if done == every else f"{done} of {every}"


def progress_text(run: FoundRun) -> str:
    """Return how many epochs a run has finished, and of how many."""
    return f"{len(run.history)} of {run.config.training.epochs}"


def folder_text(collection: RunCollection, path: Path) -> str:
    """Return a run's folder, relative to that of the collection."""
    return shorten(str(path.relative_to(collection.folder)), 200)


def problems(collection: RunCollection) -> list[tuple[str, str]]:
    """Return what cannot be read, or contradicts itself: folder and reason."""
    damaged = [(run.run.path, text) for run in collection.runs for text in run.problems]
    texts = [*damaged, *collection.unreadable.items()]
    return [(folder_text(collection, path), shorten(text, 300)) for path, text in texts]


def best_text(collection: RunCollection, group: SeedGroup) -> str:
    """Return the best configuration of a dataset, its scores, and which are as good."""
    scores = group.interval(collection.metric)
    assert scores is not None
    text = (
        f"{group.dataset}: {collection.label(group)} has the best "
        f"{run_metrics.in_words(collection.metric)}: "
        f"{run_metrics.show_interval(collection.metric, scores)} ({_n(group, scores)})"
    )
    tested = group.interval("test_accuracy")
    if tested is not None and collection.metric != "test_accuracy":
        text += f"; test accuracy {run_metrics.show_interval('test_accuracy', tested)}"
    others = [g for g in collection.ranking if g.dataset == group.dataset and g.rank and g.rank > 1]
    if collection.baseline or not others:
        return text + "."
    tied = [collection.label(other) for other in others if other.is_tied]
    if tied:
        return f"{text}. It is not told apart from {listing(tied, 160)}."
    unjudged = [other for other in others if other.difference is None]
    if unjudged:
        known = len(others) - len(unjudged)
        rest = f"the other {len(unjudged)}" if known else "the others"
        return f"{text}. Whether it differs from {rest} cannot be judged: {unjudged[0].not_judged}."
    if any(other.difference and other.difference.covers == "images" for other in others):
        return (
            f"{text}. As a network it differs from all others; how other seeds vary is not known."
        )
    return f"{text}. It is told apart from all others."


def _n(group: SeedGroup, scores: Interval) -> str:
    folds = len(group.finished_folds)
    runs = f"{scores.n} run{'s' * (scores.n > 1)}" + (f" over {folds} folds" if folds else "")
    if scores.n == folds:
        runs = f"{folds} fold{'s' * (folds > 1)}"
    if scores.low is not None:
        return f"mean of {runs} and its 95 % interval"
    if scores.std == 0:
        return f"mean of {runs}, all the same"
    return f"{runs}, too few for an interval"


def reference_name(collection: RunCollection) -> str:
    """Return what the configurations are set against: the best, or the baseline."""
    return "the baseline" if collection.baseline else "the best"


def difference_text(metric: str, difference: Difference) -> str:
    """Return a difference and its interval: `-1.30 ± 0.60 points`."""
    half = run_metrics.show_width(metric, difference.half)
    return (
        f"{run_metrics.show_difference(metric, difference.value).removesuffix(' points')} ± {half}"
    )


def verdict(collection: RunCollection, group: SeedGroup) -> str:
    """Return what is known of a group's difference to the reference, "" where nothing was asked."""
    if group.is_reference:
        return "baseline" if collection.baseline else "best"
    if group.difference is None:
        return f"cannot be judged: {group.not_judged}" if group.not_judged else ""
    return word_of(collection.metric, group.difference)


def word_of(metric: str, difference: Difference) -> str:
    """Return `worse`, `better` or `not told apart`; of two networks, that it is about these."""
    if not difference.told_apart:
        return "not told apart"
    better = (difference.value > 0) == run_metrics.higher_is_better(metric)
    as_network = " as a network" * (difference.covers == "images")
    return f"{'better' if better else 'worse'}{as_network}"


def smallest_text(metric: str, difference: Difference) -> str:
    """Return the smallest difference that would be shown, "" where one was."""
    return "" if difference.told_apart else run_metrics.show_width(metric, difference.smallest)


def detail(metric: str, difference: Difference) -> str:
    """Return the numbers of a verdict: `-0.80 ± 0.60 points, p = 0.31; 1.20 points would show`."""
    smallest = smallest_text(metric, difference)
    shows = f"; {smallest} would show" if smallest else ""
    return f"{difference_text(metric, difference)}, {show_p(difference.p)}{shows}"


def verdict_of(metric: str, difference: Difference) -> str:
    """Return `worse (p = 0.012)`, or `not told apart (p = 0.31); 1.20 points would show`."""
    smallest = smallest_text(metric, difference)
    shows = f"; {smallest} would show" if smallest else ""
    return f"{word_of(metric, difference)} ({show_p(difference.p)}){shows}"


def testing_text(collection: RunCollection) -> str:
    """Return what the differences and their intervals are, or why there are none."""
    differences = [group.difference for group in collection.groups if group.difference]
    if not differences:
        reasons = sorted({group.not_judged for group in collection.groups if group.not_judged})
        if not reasons:
            return ""
        against = reference_name(collection)
        return f"The configurations are not compared with {against}: {'; '.join(reasons)}."
    where = run_metrics.measured_on(collection.metric)
    most = max(differences, key=lambda difference: difference.images)
    split = f"{most.images:,} {where[0]} images" if where else ""
    covers = {difference.covers for difference in differences}
    speaks = [
        words
        for kind, words in (
            ("seeds and images", f"over seeds and the {split} together"),
            ("seeds", "over seeds alone, on the same images"),
            ("folds", "over the folds (Nadeau and Bengio 2003)"),
            ("images", f"over the {split} alone, between two networks of one run each"),
        )
        if kind in covers
    ]
    count = most.family.comparisons
    together = ""
    if count > 1:
        together = f" The intervals and p values hold for all {count} differences together" + (
            " (Bonferroni)."
            if collection.baseline
            else ", although the same runs chose the best (Games and Howell 1976)."
        )
    pooled = ""
    if covers & {"seeds", "seeds and images"} and any(
        not (sample := group.sample(collection.metric)) or not sample.variance
        for group in collection.groups
        if group.difference or group.is_reference
    ):
        pooled = (
            " A configuration of one run, or of runs with the same score, takes the deviation "
            "between the seeds of the others (pooled)."
        )
    return (
        f"Difference to {reference_name(collection)}: that of the means, with its 95 % interval, "
        f"{' or '.join(speaks)}.{together}{pooled} Not told apart: the interval holds 0. Would "
        "show: the smallest true difference that such runs would show in four cases of five."
    )


def selection_text(collection: RunCollection) -> str:
    """Return what was chosen by what, and what that does to the scores that are shown."""
    if not collection.ranked or not collection.metric.startswith("best_val_"):
        return ""
    ranked = [group for group in collection.groups if group.rank is not None]
    most = max(len(run.history) for group in ranked for run in group.finished)
    best = "loss" if collection.metric.endswith("loss") else "score"
    chosen = f", and the best configuration is chosen among {len(ranked)}" * (len(ranked) > 1)
    return (
        f"The validation {best} is that of each run's best epoch, of up to {most} epochs{chosen}: "
        f"{'both make' if chosen else 'that makes'} it optimistic. The test score has no part in "
        "it."
    )


def closest_text(collection: RunCollection, dataset: str) -> str:
    """Return how many seeds would tell the best two apart; "" where they are, or are not judged."""
    second = next((g for g in collection.groups if g.dataset == dataset and g.rank == 2), None)
    if second is None or collection.baseline or not second.is_tied or second.difference is None:
        return ""
    gap = abs(second.difference.value)
    if gap == 0:
        return "The best two are equal."
    size = run_metrics.show_width(collection.metric, gap)
    best = next(g for g in collection.groups if g.dataset == dataset and g.rank == 1)
    needed = seeds_text(collection, [best, second], gap)
    return f"{dataset}: the best two are {size} apart. {needed}"


def detect_text(collection: RunCollection, points: float) -> list[str]:
    """Return, for each dataset, how many seeds show a difference of so many points."""
    unit = 0.01 if run_metrics.is_fraction(collection.metric) else 1.0
    lines = []
    for dataset in collection.datasets:
        ranked = [g for g in collection.groups if g.dataset == dataset and g.rank is not None]
        lines.append(f"{dataset}: {seeds_text(collection, ranked, unit * points)}")
    return lines


def seeds_text(collection: RunCollection, groups: Sequence[SeedGroup], gap: float) -> str:
    """Return how many seeds per configuration show a difference, and what that rests on.

    The deviation is that of these groups, or of all of their dataset where they have none.
    """
    beside = [g for g in collection.groups if g.dataset == groups[0].dataset] if groups else []
    deviation = pooled_in(groups, collection.metric) or pooled_in(beside, collection.metric)
    if deviation is None:
        return "How many seeds are needed is not known before two runs differ in their seed alone."
    parts = [g.difference.over_images for g in groups if g.difference and g.difference.over_images]
    images = None
    if parts:
        images = median(part for part, _ in parts), parts[0][1]
    ranked = sum(g.rank is not None for g in beside)
    family = Family(max(ranked - 1, 1), chosen=collection.baseline is None)
    return needed_text(collection.metric, gap, deviation, images, family)


def needed_text(
    metric: str,
    gap: float,
    deviation: Deviation,
    images: tuple[float, int] | None,
    family: Family,
) -> str:
    """Return how many seeds per configuration show a difference, in words."""
    size = run_metrics.show_width(metric, gap)
    among = f" among {family.comparisons + 1} configurations" * (family.comparisons > 1)
    needed = seeds_needed(gap, deviation, images, family)
    if needed is None and images is not None:
        floor = images[0] ** 0.5 * detectable(family.critical(images[1]), images[1])
        least = run_metrics.show_width(metric, floor)
        return (
            f"No number of seeds would show {size}{among} on these {images[1] + 1:,} images, on "
            f"which differences show from {least} on; more images would."
        )
    counts = [
        seeds_needed(gap, Deviation(std, deviation.degrees), images, family)
        for std in deviation.ends()
    ]
    span = " to ".join("more than 10,000" if n is None else f"{n:,}" for n in counts)
    seeds = "more than 10,000" if needed is None else f"about {needed:,}"
    std = run_metrics.show_width(metric, deviation.std)
    freedom = f"{deviation.degrees:.0f} degree{'s' * (deviation.degrees != 1)} of freedom"
    return (
        f"{seeds[0].upper() + seeds[1:]} seeds per configuration would show {size}{among} in four "
        f"cases of five ({span} within the 95 % interval of the deviation between seeds, {std} "
        f"with {freedom})."
    )


def effects_lines(collection: RunCollection, effects: MainEffects) -> list[str]:
    """Return each main effect and each interaction of a full factorial sweep, in words."""
    metric = collection.metric
    lines = [
        f"{effect.axis}: {effect.best} - {effect.other}: "
        f"{difference_text(metric, effect.difference)}, "
        f"{verdict_of(metric, effect.difference)}"
        for effect in effects.effects
    ]
    for interaction in effects.interactions:
        a, b = interaction.axes
        seen = "depends on" if interaction.p < 0.05 else "is not seen to depend on"
        lines.append(f"the effect of {a} {seen} {b} (interaction, {show_p(interaction.p)})")
    return lines


def effects_basis(effects: MainEffects) -> str:
    """Return what the main effects are."""
    paired = (
        "paired by seed, since all have the same seeds"
        if effects.deviation.paired
        else "with the deviation between seeds pooled over all"
    )
    return (
        "Mean over all values of the other axes, the best value of an axis minus each other one, "
        f"with its 95 % interval, {paired} ({effects.deviation.degrees:.0f} degrees of freedom)."
    )
