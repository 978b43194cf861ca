"""What summary.md, report.html and the console say about runs, settings and tests, in words."""

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
    """Return how many runs and settings there are, and in which state."""
    counts = status_counts(collection.runs)
    if collection.unreadable:
        counts["not readable"] = len(collection.unreadable)
    states = ", ".join(f"{number} {status}" for status, number in counts.items())
    runs, settings = sum(counts.values()), len(collection.settings)
    return f"{runs} run{'s' * (runs != 1)} of {settings} setting{'s' * (settings != 1)}: {states}."


def status_counts(runs: Sequence[FoundRun]) -> dict[str, int]:
    """Return how many runs are in which state."""
    counts = Counter[str](run.summary.status for run in runs)
    return {status: counts[status] for status in _STATUSES if counts[status]}


def runs_text(setting: SeedGroup) -> str:
    """Return how many runs are finished, and of how many where some are not."""
    done, every = len(setting.finished), len(setting.runs)
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


def best_text(collection: RunCollection, setting: SeedGroup) -> str:
    """Return the best setting of a dataset, its scores, and how many are as good."""
    found = setting.interval(collection.metric)
    assert found is not None
    text = (
        f"{setting.dataset}: {collection.label(setting)} has the best "
        f"{run_metrics.in_words(collection.metric)}: "
        f"{run_metrics.show_interval(collection.metric, found)} ({_n(setting, found)})"
    )
    tested = setting.interval("test_accuracy")
    if tested is not None and collection.metric != "test_accuracy":
        text += f"; test accuracy {run_metrics.show_interval('test_accuracy', tested)}"
    beside = [one for one in collection.settings if one.dataset == setting.dataset]
    ties = sum(one.tied_with_best for one in beside)
    if ties:
        text += (
            f". {ties} other setting{'s are' if ties > 1 else ' is'} not significantly different"
        )
    return text + "."


def _n(setting: SeedGroup, found: Interval) -> str:
    folds = len(setting.finished_folds)
    runs = f"{found.n} run{'s' * (found.n > 1)}" + (f" over {folds} folds" if folds else "")
    if found.n == folds:
        runs = f"{folds} fold{'s' * (folds > 1)}"
    if found.low is None:
        return f"{runs}, too few for an interval"
    return f"mean of {runs} and its 95 % interval"


def has_verdicts(collection: RunCollection) -> bool:
    """Whether verdicts differ between the settings; if not, testing_text gives their reason."""
    if any(setting.against_best for setting in collection.settings):
        return True
    return any(setting.not_tested.startswith("it ") for setting in collection.settings)


def verdict(setting: SeedGroup) -> tuple[str, str]:
    """Return what the paired test says of a setting and the best one, and its numbers."""
    if setting.chosen:
        return "best", ""
    if setting.against_best is None or setting.p_adjusted is None:
        return ("not tested", setting.not_tested) if setting.not_tested else ("", "")
    points = -100 * setting.against_best.difference
    shown = f"{points:+.2f} points, {statistics.show_p(setting.p_adjusted)}"
    if setting.tied_with_best:
        return "not significantly different from the best", shown
    return f"significantly {'worse' if points < 0 else 'better'}", shown


def verdict_text(setting: SeedGroup) -> str:
    """Return the verdict and its numbers as one text."""
    word, detail = verdict(setting)
    return f"{word} ({detail})" if detail else word


def testing_text(collection: RunCollection) -> str:
    """Return how the settings were compared with the best one, or why they were not."""
    tests = [setting.against_best for setting in collection.settings if setting.against_best]
    if not tests and has_verdicts(collection):
        return ""
    if not tests:
        reasons = sorted({one.not_tested for one in collection.settings if one.not_tested})
        return f"The settings are not compared with the best: {'; '.join(reasons)}." * bool(reasons)
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
        verdict = f"{'the settings' if test.about_settings else 'these two networks'} differ"
    return f"{counts} ({bounds}); {test.method}: {statistics.show_p(test.p)}: {verdict}."
