"""What summary.md, report.html and the console say about runs, groups and tests, in words."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cifar_lab.analysis import run_metrics, statistics
from cifar_lab.analysis.load_runs import FoundRun
from cifar_lab.analysis.seed_groups import RunCollection, SeedGroup
from cifar_lab.analysis.statistics import Interval, PairedTest
from cifar_lab.errors import shorten

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
    """Return what cannot be read: folder and reason."""
    damaged = [(run.run.path, text) for run in collection.runs for text in run.problems]
    texts = [*damaged, *collection.unreadable.items()]
    return [(folder_text(collection, path), shorten(text, 300)) for path, text in texts]


def best_text(collection: RunCollection, group: SeedGroup) -> str:
    """Return the best configuration of a dataset, its scores, and how many are as good."""
    found = group.interval(collection.metric)
    assert found is not None
    text = (
        f"{group.dataset}: {collection.label(group)} has the best "
        f"{run_metrics.in_words(collection.metric)}: "
        f"{run_metrics.show_interval(collection.metric, found)} ({_n(group, found)})"
    )
    tested = group.interval("test_accuracy")
    if tested is not None and collection.metric != "test_accuracy":
        text += f"; test accuracy {run_metrics.show_interval('test_accuracy', tested)}"
    beside = [one for one in collection.groups if one.dataset == group.dataset]
    ties = sum(one.tied_with_best for one in beside)
    if ties:
        others = "configurations are" if ties > 1 else "configuration is"
        text += f". {ties} other {others} not significantly different"
    return text + "."


def _n(group: SeedGroup, found: Interval) -> str:
    folds = len(group.finished_folds)
    runs = f"{found.n} run{'s' * (found.n > 1)}" + (f" over {folds} folds" if folds else "")
    if found.n == folds:
        runs = f"{folds} fold{'s' * (folds > 1)}"
    if found.low is None:
        return f"{runs}, too few for an interval"
    return f"mean of {runs} and its 95 % interval"


def has_verdicts(collection: RunCollection) -> bool:
    """Whether verdicts differ between the groups; if not, testing_text gives their reason."""
    if any(group.against_best for group in collection.groups):
        return True
    return any(group.not_tested.startswith("it ") for group in collection.groups)


def verdict(group: SeedGroup) -> tuple[str, str]:
    """Return what the paired test says of a configuration and the best one, and its numbers."""
    if group.chosen:
        return "best", ""
    if group.against_best is None or group.p_adjusted is None:
        return ("not tested", group.not_tested) if group.not_tested else ("", "")
    points = -100 * group.against_best.difference
    shown = f"{points:+.2f} points, {statistics.show_p(group.p_adjusted)}"
    if group.tied_with_best:
        return "not significantly different from the best", shown
    return f"significantly {'worse' if points < 0 else 'better'}", shown


def verdict_text(group: SeedGroup) -> str:
    """Return the verdict and its numbers as one text."""
    word, detail = verdict(group)
    return f"{word} ({detail})" if detail else word


def testing_text(collection: RunCollection) -> str:
    """Return how the configurations were compared with the best one, or why they were not."""
    tests = [group.against_best for group in collection.groups if group.against_best]
    if not tests and has_verdicts(collection):
        return ""
    if not tests:
        reasons = sorted({one.not_tested for one in collection.groups if one.not_tested})
        return f"The configurations are not compared with the best: {'; '.join(reasons)}." * bool(
            reasons
        )
    methods = sorted({test.method for test in tests})
    images = sorted({test.images for test in tests})
    which = "test" if run_metrics.is_test(collection.metric) else "validation"
    return (
        f"Against the best: difference in accuracy on {', '.join(f'{n:,}' for n in images)} "
        f"{which} images, tested by {' and '.join(methods)}; p values are adjusted for "
        f"{len(tests)} comparison{'s' * (len(tests) > 1)} (Holm). "
        f"A difference is called significant if p < {statistics.LEVEL:g}."
    )


def test_text(test: PairedTest, a: str, b: str) -> str:
    """Return a paired test in words."""
    if test.about_settings:
        counts = (
            f"On {test.images:,} images, {a} ({test.seeds[0]} runs) minus {b} ({test.seeds[1]} "
            f"runs): {100 * test.difference:+.2f} points"
        )
    else:
        counts = (
            f"{a} is right where {b} is wrong on {test.only_a:,} of {test.images:,} images, {b} "
            f"where {a} on {test.only_b:,}: {100 * test.difference:+.2f} points"
        )
    bounds = f"95 % interval {100 * test.low:+.2f} to {100 * test.high:+.2f}"
    if test.p >= statistics.LEVEL:
        verdict = "no significant difference"
    else:
        verdict = f"{'the configurations' if test.about_settings else 'these two networks'} differ"
    return f"{counts} ({bounds}); {test.method}: {statistics.show_p(test.p)}: {verdict}."
