"""Two runs or configurations side by side, or two halves of a sweep: configs, scores, tests."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cifar_lab.analysis import run_metrics, texts
from cifar_lab.analysis.contrasts import CannotJudge, Difference, Sample, contrast, pooled, residual
from cifar_lab.analysis.grouping import collect, same_pictures
from cifar_lab.analysis.load_runs import FoundRun
from cifar_lab.analysis.power import Family
from cifar_lab.analysis.run_differences import config_differences
from cifar_lab.analysis.seed_groups import SeedGroup, pooled_in
from cifar_lab.errors import RunFailed, UsageError, listing
from cifar_lab.runs.metrics import wilson_interval
from cifar_lab.runs.text import Table

SCORES = (
    *("best_val_accuracy", "best_val_loss", "best_val_balanced_accuracy", "best_val_macro_f1"),
    *("best_epoch", "epochs", "final_train_accuracy"),
    *("test_accuracy", "test_accuracy_last", "test_loss", "parameters", "seconds_per_epoch"),
)
TESTED = ("test_accuracy", "best_val_accuracy")


@dataclass(frozen=True)
class Comparison:
    """What was compared, as tables and sentences; every difference is B - A.

    `cells`: the configurations of A and B, in pairs that share all other values; `differences`: by
    metric, where something can be said.
    """

    cells: Sequence[tuple[SeedGroup, SeedGroup]]
    configs: Table
    scores: Table
    sentences: Sequence[str]
    differences: dict[str, Difference]

    @property
    def table(self) -> list[dict[str, str]]:
        """The scores, a dict for each metric."""
        return [dict(zip(self.scores.header, row, strict=True)) for row in self.scores.rows]


def compare(a: Sequence[FoundRun], b: Sequence[FoundRun]) -> Comparison:
    """Return two groups of runs side by side; UsageError where they cannot be compared.

    Each is a run, the runs of a configuration, or of several. Of several, those are compared which
    both have, with equal weights.
    """
    shared = {run.run.path.resolve() for run in a} & {run.run.path.resolve() for run in b}
    if shared and len(a) + len(b) > 2:  # a run beside itself is a plain way to look at it
        raise UsageError(
            f"A and B overlap: {len(shared)} of their runs are in both, such as "
            f"{listing(sorted(path.name for path in shared)[:1])}"
        )
    if not same_pictures(a[0], b[0]):
        raise UsageError(
            f"{a[0].run.path} and {b[0].run.path} cannot be compared: they were made on different "
            "pictures, as the checksums in their summary.json show"
        )
    cells = _cells(a, b)
    differences: dict[str, Difference] = {}
    reasons = {name: why for name in TESTED if (why := _judge(cells, name, differences))}
    one_each = len(a) == len(b) == 1
    configs = config_differences(cells[0][0].runs[0], cells[0][1].runs[0], replicates=one_each)
    rows = [_score(cells, name, differences) for name in SCORES]
    scores = Table(["metric", "A", "B", "B - A", "verdict"], [row for row in rows if any(row[1:3])])
    sentences = [*_sentences(cells, differences, reasons)]
    if one_each:
        names = {name for name, *_ in configs} - {"threads"}
        if names == {"seed"}:
            sentences.append(
                "They differ in their seed alone: what differs between them is chance."
            )
        elif names == {"split.fold"}:
            sentences.append("They are folds of one configuration: what differs is chance.")
    return Comparison(cells, Table(["key", "A", "B"], configs), scores, sentences, differences)


def _cells(a: Sequence[FoundRun], b: Sequence[FoundRun]) -> list[tuple[SeedGroup, SeedGroup]]:
    """Pair the configurations of both that have the same values of what varies within each."""
    folder = Path(os.path.commonpath([run.run.path.resolve().parent for run in (*a, *b)]))
    sides = [collect(folder, runs) for runs in (a, b)]
    axes = [axis for axis in sides[0].axes if axis in sides[1].axes]
    by_key: list[dict[tuple[str, ...], SeedGroup]] = []
    for name, side in zip("AB", sides, strict=True):
        places = [side.axes.index(axis) for axis in axes]
        groups = {tuple(group.key[i] for i in places): group for group in side.groups}
        if len(groups) < len(side.groups):
            own = listing(axis for axis in side.axes if axis not in axes)
            raise UsageError(
                f"{name} is {len(side.groups)} configurations that differ in {own}, and the other "
                "has nothing to pair them with; name one of them"
            )
        by_key.append(groups)
    pairs = [(group, by_key[1][key]) for key, group in by_key[0].items() if key in by_key[1]]
    if not pairs:
        raise UsageError(f"A and B have no configuration with the same {listing(axes)}")
    return pairs


def _judge(
    cells: Sequence[tuple[SeedGroup, SeedGroup]], name: str, differences: dict[str, Difference]
) -> str:
    """Add the difference of a metric; return the reason where there is none."""
    split = "test" if run_metrics.is_test(name) else "validation"
    samples: list[list[Sample]] = [[], []]
    for label, of_side, place in zip("AB", samples, (0, 1), strict=True):
        for group in (pair[place] for pair in cells):
            sample = group.sample(name)
            damaged = [text for run in group.runs for text in run.problems if "damaged" in text]
            if damaged:
                raise RunFailed(damaged[0])
            if sample is None:
                hint = f"; python -m cifar_lab.evaluate {group.runs[0].run.path} makes them"
                return f"{label} has no {split} predictions{hint * (split == 'test')}"
            of_side.append(sample)
    a, b = samples
    try:
        deviation = pooled([*a, *b]) if len(cells) == 1 else residual([*a, *b])
        differences[name] = contrast(b, a, deviation)
    except CannotJudge as error:
        if split == "test" and "different images" in str(error):
            raise UsageError(
                f"{' and '.join(str(group.runs[0].run.path) for group in cells[0])} cannot be "
                f"compared: {error}; take runs of the same dataset and test split"
            ) from None
        return str(error)
    return ""


def _score(
    cells: Sequence[tuple[SeedGroup, SeedGroup]], name: str, differences: dict[str, Difference]
) -> list[str]:
    """Return a row of the table: a score of A and of B, the difference, what it is worth."""
    shown, means = [], []
    for side in ([pair[0] for pair in cells], [pair[1] for pair in cells]):
        values = [mean for group in side if (mean := group.mean(name)) is not None]
        whole = len(values) == len(side)
        means.append(sum(values) / len(values) if whole else None)
        if whole and len(side) == 1:
            shown.append(_interval_text(side[0], name))
        else:
            shown.append(run_metrics.show(name, means[-1]) if whole else "")
    found = differences.get(name)
    if found is not None:
        said = texts.say(name, found)
        would_show = f"; {said.would_show} would show" * bool(said.would_show)
        verdict = f"{said.verdict} ({said.p}){would_show}"
        return [run_metrics.in_words(name), *shown, said.difference, verdict]
    a, b = means
    off = None if a is None or b is None else b - a
    return [run_metrics.in_words(name), *shown, run_metrics.show_difference(name, off), ""]


def _interval_text(group: SeedGroup, name: str) -> str:
    """Return a score with its interval: over the runs, or of one run over the test images."""
    interval = group.interval(name)
    assert interval is not None
    images = group.finished[0].summary.test_size if group.finished else None
    if interval.n == 1 and run_metrics.is_test(name) and "accuracy" in name and images:
        return run_metrics.show_within(name, interval.mean, wilson_interval(interval.mean, images))
    return run_metrics.show_interval(name, interval)


def _sentences(
    cells: Sequence[tuple[SeedGroup, SeedGroup]],
    differences: dict[str, Difference],
    reasons: dict[str, str],
) -> list[str]:
    lines = []
    if len(cells) > 1:
        lines.append(
            f"Means over the {len(cells)} configurations that both have, with equal weights."
        )
    for index, label in enumerate("AB" if any(len(g.runs) > 1 for g in cells[0]) else ""):
        missing = {
            run.replicate_text
            for pair in cells
            for run in pair[1 - index].finished
            if run.replicate not in [own.replicate for own in pair[index].finished]
        }
        if missing:
            lines.append(f"{label} lacks what the other has: {listing(sorted(missing))}.")
    for name in TESTED:
        words = "test" if run_metrics.is_test(name) else "validation"
        if name in reasons:
            lines.append(f"No test on the {words} images: {reasons[name]}.")
        if name in differences:
            lines.append(_of_difference(cells, name, differences[name]))
    return lines


def _of_difference(
    cells: Sequence[tuple[SeedGroup, SeedGroup]], name: str, found: Difference
) -> str:
    """Return what a difference rests on, and what would be needed where it shows nothing."""
    title = run_metrics.in_words(name).capitalize()
    text = f"{title}: 95 % interval {texts.basis(name, found)}."
    if found.covers == "images":
        a, b = (group.sample(name) for group in cells[0])
        if a is not None and b is not None and a.right is not None and b.right is not None:
            only_a, only_b = int((a.right & ~b.right).sum()), int((b.right & ~a.right).sum())
            text += f" A alone is right on {only_a:,} of them, B alone on {only_b:,}."
    elif not found.told_apart and found.covers != "folds" and len(cells) == 1:
        deviation = pooled_in(cells[0], name)
        gap = abs(found.value)
        text += f" {texts.seeds_text(name, gap, deviation, found.over_images, Family())}"
    return text
