"""What summary.md, report.html and the console say about runs, groups and tests, in words."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from cifar_lab.analysis import run_metrics
from cifar_lab.analysis.contrasts import Deviation, Difference, pooled, seeds_needed
from cifar_lab.analysis.load_runs import FoundRun
from cifar_lab.analysis.ranking import MainEffects
from cifar_lab.analysis.seed_groups import RunCollection, SeedGroup
from cifar_lab.analysis.statistics import LEVEL, Family, Interval, detectable, show_p
from cifar_lab.errors import listing, shorten

_STATUSES = ("finished", "running", "interrupted", "queued", "failed")


def counts_text(collection: RunCollection) -> str:
    """Return how many runs and configurations there are, and in which state."""
    unreadable = f"{len(collection.unreadable)} not readable" * bool(collection.unreadable)
    states = filter(None, [states_text(collection.runs), unreadable])
    runs, groups = len(collection.runs) + len(collection.unreadable), len(collection.groups)
    counted = f"{runs} run{'s' * (runs != 1)} of {groups} configuration{'s' * (groups != 1)}"
    return f"{counted}: {', '.join(states)}."


def states_text(runs: Sequence[FoundRun]) -> str:
    """Return how many runs are in which state."""
    counts = Counter[str](run.summary.status for run in runs)
    return ", ".join(f"{counts[status]} {status}" for status in _STATUSES if counts[status])


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
    others = [g for g in collection.ranking if g.dataset == group.dataset and g.rank and g.rank > 1]
    name = run_metrics.in_words(collection.metric)
    best = f"{collection.label(group)} has the {'best ' * (name != 'best epoch')}" if others else ""
    shown = run_metrics.show_interval(collection.metric, scores)
    text = f"{group.dataset}: {best}{name}: {shown} ({_n(group, scores)})"
    tested = group.interval("test_accuracy")
    if tested is not None and collection.metric != "test_accuracy":
        text += f"; test accuracy {run_metrics.show_interval('test_accuracy', tested)}"
    if not others:
        return text + "."
    if collection.baseline:
        d = group.difference
        return f"{text}." + (f" To the baseline: {say(collection.metric, d)}." if d else "")
    text += "."
    labels = [collection.label(other) for other in others if other.is_tied]
    unjudged = [other.not_judged for other in others if other.difference is None]
    if labels:
        tied = [f"({label})" if "," in label else label for label in labels]
        text += f" It is not told apart from {listing(tied, 160)}."
    if unjudged:
        count = f"{len(unjudged)} other{'s' * (len(unjudged) > 1)}"
        text += f" {count} cannot be judged: {'; '.join(dict.fromkeys(unjudged))}."
    elif not labels and any(d.covers == "images" for g in others if (d := g.difference)):
        text += " As a network it differs from all others; other seeds may not."
    elif not labels:
        text += " It is told apart from all others."
    return text


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


@dataclass(frozen=True)
class Said:
    """A difference in words, as tables, pages and sentences say it.

    `-0.80 ± 0.60 points`, `p = 0.31`, `not told apart`, `1.20 points` (that would show).
    """

    difference: str
    p: str
    verdict: str
    would_show: str

    @property
    def judgement(self) -> str:
        """The verdict with what it rests on."""
        shows = f"; {self.would_show} would show" * bool(self.would_show)
        return f"{self.verdict} ({self.p}){shows}"

    def __str__(self) -> str:
        return f"{self.difference}, {self.judgement}"


def say(metric: str, found: Difference) -> Said:
    """Return a difference of a metric in words."""
    value = run_metrics.show_difference(metric, found.value).removesuffix(" points")
    difference = f"{value} ± {run_metrics.show_width(metric, found.half)}"
    better = is_better(metric, found)
    if better is None:
        smallest = run_metrics.show_width(metric, found.smallest)
        return Said(difference, show_p(found.p), "not told apart", smallest)
    as_network = " as a network" * (found.covers == "images")
    return Said(difference, show_p(found.p), ("better" if better else "worse") + as_network, "")


def is_better(metric: str, found: Difference) -> bool | None:
    """Whether a difference is one for the better; None if it is not told from none."""
    better = (found.value > 0) == run_metrics.higher_is_better(metric)
    return better if found.told_apart else None


def say_of(collection: RunCollection, group: SeedGroup) -> Said:
    """Return a group's difference to the reference in words, or what stands in its place."""
    if group.difference is not None:
        return say(collection.metric, group.difference)
    if group.is_reference:
        return Said("", "", "baseline" if collection.baseline else "best", "")
    return Said("", "", f"cannot be judged: {group.not_judged}" * bool(group.not_judged), "")


def reference_name(collection: RunCollection) -> str:
    """Return what the configurations are set against: the best, or the baseline."""
    return "the baseline" if collection.baseline else "the best"


def basis(metric: str, found: Difference) -> str:
    """Return what an interval covers."""
    where, count = run_metrics.measured_on(metric), (found.over_images or (0.0, -1))[1] + 1
    images = f"{count:,} {where[0]} images" if where else ""
    return {
        "seeds and images": f"over seeds and the {images} together",
        "seeds": "over seeds alone, not over images",
        "folds": "over the folds (Nadeau and Bengio 2003)",
        "images": f"over the {images} alone: of two networks, not of other seeds",
    }[found.covers]


def testing_text(collection: RunCollection) -> str:
    """Return what the differences and their intervals are, or why there are none."""
    differences = [group.difference for group in collection.groups if group.difference]
    against = reference_name(collection)
    if not differences:
        reasons = sorted({group.not_judged for group in collection.groups if group.not_judged})
        text = f"The configurations are not compared with {against}: {'; '.join(reasons)}."
        return text * bool(reasons)
    covered = sorted({basis(collection.metric, difference) for difference in differences})
    counts = sorted({difference.family.comparisons for difference in differences})
    all_of = f"{' or '.join(map(str, counts))} differences{' of a dataset' * (len(counts) > 1)}"
    together = f" The intervals and p values hold for all {all_of} together" + (
        " (Bonferroni)."
        if collection.baseline
        else ", although the same runs chose the best (Games and Howell 1976)."
    )
    ranked = [group for group in collection.groups if group.rank]
    alike = {g.dataset for g in ranked if not g.sample(collection.metric).variance}
    pooled = (
        " Beside a configuration of one run, or of runs with the same score, both take the "
        "deviation between the seeds of all (pooled)."
    ) * any("seeds" in d.covers for g in ranked if g.dataset in alike and (d := g.difference))
    return (
        f"Difference to {against}: that of the means, with its 95 % interval, "
        f"{' or '.join(covered)}.{together * (counts[-1] > 1)}{pooled} Not told apart: the "
        "interval holds 0. Would show: the smallest true difference that such runs would show in "
        "four cases of five."
    )


def selection_text(collection: RunCollection) -> str:
    """Return what choosing by the validation score does to it."""
    if not collection.ranked or not collection.metric.startswith("best_val_"):
        return ""
    ranked = Counter(group.dataset for group in collection.groups if group.rank is not None)
    best = "loss" if collection.metric.endswith("loss") else "score"
    among = " or ".join(str(count) for count in sorted(set(ranked.values())) if count > 1)
    chosen = f", and the best configuration is chosen among {among}: both make" * bool(among)
    return (
        f"The validation {best} is that of each run's best epoch{chosen or ', which makes'} it "
        "optimistic. The test score has no part in it."
    )


def seeds_lines(collection: RunCollection, points: float | None = None) -> list[str]:
    """Return, for each dataset, how many seeds per configuration would show a difference.

    One of so many points, from the deviation of all configurations; without `points` that of the
    best two, from theirs, where these are not told apart.
    """
    metric, lines = collection.metric, []
    for dataset in collection.datasets:
        ranked = [g for g in collection.ranking if g.dataset == dataset and g.rank]
        groups, start = ranked if points is not None else ranked[:2], f"{dataset}: "
        gap = (points or 0) / run_metrics.factor(metric)
        if points is None:
            if collection.baseline or len(groups) < 2 or not groups[1].is_tied:
                continue
            gap = abs(groups[1].difference.value if groups[1].difference else 0.0)
            start += f"the best two are {run_metrics.show_width(metric, gap)} apart. "
        parts = [d.over_images for g in groups if (d := g.difference) and d.over_images]
        images = (median(part for part, _ in parts), parts[0][1]) if parts else None
        family = Family(max(len(ranked) - 1, 1), chosen=collection.baseline is None)
        deviation = pooled([group.sample(metric) for group in groups if group.folds is None])
        lines.append(start + seeds_text(metric, gap, deviation, images, family))
    return lines


def seeds_text(
    metric: str,
    gap: float,
    deviation: Deviation | None,
    images: tuple[float, int] | None,
    family: Family,
) -> str:
    """Return how many seeds per configuration show a difference, and what that rests on."""
    if deviation is None:
        needs = "that takes runs that differ in their seed alone, and in their score"
        return f"How many seeds are needed is not known: {needs}."
    if gap == 0:
        return "No number of seeds shows a difference of 0."
    size = run_metrics.show_width(metric, gap)
    among = f" among {family.comparisons + 1} configurations" * (family.comparisons > 1)
    ends = (Deviation(std, deviation.degrees) for std in deviation.ends())
    counts = [seeds_needed(gap, d, images, family) for d in (deviation, *ends)]
    floor = images[0] ** 0.5 * detectable(family.critical(images[1]), images[1]) if images else 0.0
    if images and gap <= floor:
        return (
            f"No number of seeds would show {size}{among} on these {images[1] + 1:,} images, on "
            f"which differences show from {run_metrics.show_width(metric, floor)} on; more images "
            "would."
        )
    about, low, high = ("more than 10,000" if n is None else f"{n:,}" for n in counts)
    about = f"About {about}" if counts[0] else about.capitalize()
    same = " on the same images" * (images is None and run_metrics.measured_on(metric) is not None)
    freedom = f"{deviation.degrees:.0f} degree{'s' * (deviation.degrees != 1)} of freedom"
    return (
        f"{about} seeds per configuration would show {size}{among}{same} in four cases of five "
        f"({low} to {high} within the 95 % interval of the deviation between seeds, "
        f"{run_metrics.show_width(metric, deviation.std)} with {freedom})."
    )


def effects_lines(collection: RunCollection, effects: MainEffects) -> list[str]:
    """Return each main effect and each interaction of a full factorial sweep, and what they are."""
    lines = [
        f"{effect.axis}: {effect.best} - {effect.other}: "
        f"{say(collection.metric, effect.difference)}"
        for effect in effects.effects
    ]
    for a, b, p in effects.interactions:
        start = "the" if p < LEVEL else "no sign that the"
        lines.append(f"{start} effect of {a} depends on {b} (interaction, {show_p(p)})")
    paired = "paired by seed" if effects.deviation.paired else "with the deviation of all, pooled"
    lines.append(
        "each effect is a mean over all values of the other axes: the best value minus another, "
        f"with its 95 % interval, {paired} ({effects.deviation.degrees:.0f} degrees of freedom)"
    )
    return lines


def conclusion(collection: RunCollection) -> list[str]:
    """Return what is said of the best configuration of each dataset, after ranking.

    Which ones it is not told apart from, and how many seeds would tell the best two apart.
    """
    best = [best_text(collection, group) for group in collection.ranking if group.chosen]
    return [*best, *seeds_lines(collection)]
