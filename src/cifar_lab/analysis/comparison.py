"""Two runs or configurations side by side, or two halves of a sweep: configs, scores, tests."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from cifar_lab.analysis import run_metrics, texts
from cifar_lab.analysis.contrasts import CannotJudge, Difference, contrast, pooled, residual
from cifar_lab.analysis.grouping import collect, same_pictures
from cifar_lab.analysis.load_runs import MISSING, REPLICATES, FoundRun, show_value
from cifar_lab.analysis.seed_groups import SeedGroup
from cifar_lab.analysis.statistics import Family
from cifar_lab.errors import RunFailed, UsageError, listing
from cifar_lab.runs.text import Table

SCORES = (
    *("best_val_accuracy", "best_val_loss", "best_val_balanced_accuracy", "best_val_macro_f1"),
    *("best_epoch", "epochs", "final_train_accuracy"),
    *("test_accuracy", "test_accuracy_last", "test_loss", "parameters", "seconds_per_epoch"),
)
TESTED = {"test_accuracy": "test", "best_val_accuracy": "validation"}
"""The scores whose difference is judged, and the images that they are measured on."""

Cells = Sequence[Sequence[SeedGroup]]
"""The configurations of A, and those of B in the same order."""


@dataclass(frozen=True)
class Comparison:
    """What was compared, as tables and sentences; every difference is B - A.

    `cells`: the configurations of A, and those of B that have the same other values; `differences`:
    by metric, where something can be said.
    """

    cells: Cells
    configs: Table
    scores: Table
    sentences: Sequence[str]
    differences: dict[str, Difference]

    @property
    def table(self) -> list[dict[str, str]]:
        """The scores, a dict for each metric."""
        return [dict(zip(self.scores.header, row, strict=True)) for row in self.scores.rows]

    def text(self, width: int = 100) -> str:
        """Return it for a terminal of that width."""
        configs = self.configs.text(width) if self.configs.rows else "The configs are equal."
        return "\n\n".join([configs, self.scores.text(width), "\n".join(self.sentences)])

    __str__ = text

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in self.sentences)
        return self.configs.html() + self.scores.html() + sentences


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
    cells, left_out = _cells(a, b)
    differences: dict[str, Difference] = {}
    sentences = _which_runs(cells, left_out)
    for name, images in TESTED.items():
        try:
            differences[name] = _difference(cells, name)
            sentences.append(_basis(cells, name, differences[name]))
        except CannotJudge as error:
            sentences.append(f"No test on the {images} images: {error}.")
    one_each = len(a) == len(b) == 1
    first, other = (side[0].runs[0] for side in cells)
    keys = first.values | other.values
    configs = [[k, *(run.values.get(k, MISSING) for run in (first, other))] for k in keys]
    if one_each:
        own = ((*run.replicate, run.summary.threads) for run in (first, other))
        shown = zip((*REPLICATES, "threads"), *own, strict=True)
        configs += [[key, *map(show_value, pair)] for key, *pair in shown]
    configs = [row for row in configs if row[1] != row[2]]
    if one_each and {name for name, *_ in configs} - {"threads"} in ({"seed"}, {"split.fold"}):
        what = "fold" if a[0].config.seed == b[0].config.seed else "seed"
        sentences.append(f"They differ in their {what} alone: what differs between them is chance.")
    rows = [row for name in SCORES if any((row := _score(cells, name, differences))[1:3])]
    scores = Table(["metric", "A", "B", "B - A", "verdict"], rows)
    return Comparison(cells, Table(["key", "A", "B"], configs), scores, sentences, differences)


def _cells(a: Sequence[FoundRun], b: Sequence[FoundRun]) -> tuple[Cells, int]:
    """Return the configurations that both have, and how many runs those of one alone have."""
    folder = Path(os.path.commonpath([run.run.path.resolve().parent for run in (*a, *b)]))
    sides = [collect(folder, runs) for runs in (a, b)]
    axes = [axis for axis in sides[0].axes if axis in sides[1].axes]
    by_key: list[dict[tuple[str, ...], SeedGroup]] = []
    for name, side in zip("AB", sides, strict=True):
        places = [side.axes.index(axis) for axis in axes]
        by_key.append({tuple(group.key[i] for i in places): group for group in side.groups})
        if len(by_key[-1]) < len(side.groups):
            own = listing(axis for axis in side.axes if axis not in axes)
            raise UsageError(
                f"{name} is {len(side.groups)} configurations that differ in {own}, and the other "
                "has nothing to pair them with; name one of them"
            )
    shared = [key for key in by_key[0] if key in by_key[1]]
    if not shared:
        raise UsageError(f"A and B have no configuration with the same {listing(axes)}")
    left_out = sum(len(of[key].runs) for of in by_key for key in of if key not in shared)
    return [[groups[key] for key in shared] for groups in by_key], left_out


def _difference(cells: Cells, name: str) -> Difference:
    """Return the difference of a metric; CannotJudge with the reason where there is none."""
    a, b = ([group.sample(name) for group in side] for side in cells)
    runs = [run for side in cells for group in side for run in group.runs]
    for problem in (problem for run in runs for problem in run.problems if "damaged" in problem):
        raise RunFailed(problem)
    for label, side, samples in zip("AB", cells, (a, b), strict=True):
        if not all(sample.values for sample in samples):
            hint = f"; python -m cifar_lab.evaluate {side[0].runs[0].run.path} makes them"
            where = TESTED[name]
            raise CannotJudge(f"{label} has no {where} predictions{hint * (where == 'test')}")
    deviation = pooled([*a, *b]) if len(a) == 1 else residual([*a, *b])
    try:
        return contrast(b, a, deviation)
    except CannotJudge as error:
        if name == "test_accuracy" and "different images" in str(error):
            raise UsageError(
                f"{' and '.join(str(side[0].runs[0].run.path) for side in cells)} cannot be "
                f"compared: {error}; take runs of the same dataset and test split"
            ) from None
        raise


def _score(cells: Cells, name: str, differences: dict[str, Difference]) -> list[str]:
    """Return a row of the table: a score of A and of B, the difference, what it is worth."""
    shown, means = [], []
    for side in cells:
        values = [mean for group in side if (mean := group.mean(name)) is not None]
        means.append(sum(values) / len(values) if len(values) == len(side) else None)
        alone = run_metrics.show_interval(name, side[0].interval(name))
        text = alone if len(side) == 1 else run_metrics.show(name, means[-1])
        shown.append("" if means[-1] is None else text)
    row = [run_metrics.in_words(name), *shown]
    if found := differences.get(name):
        said = texts.say(name, found)
        return [*row, said.difference, said.judgement]
    a, b = means
    off = None if a is None or b is None else b - a
    return [*row, run_metrics.show_difference(name, off), ""]


def _which_runs(cells: Cells, left_out: int) -> list[str]:
    """Return what the means are over and leave out, and which seeds and folds one side lacks."""
    lines = []
    if (count := len(cells[0])) > 1:
        lines.append(f"Means over the {count} configurations that both have, with equal weights.")
    if left_out:
        lines.append(f"Runs of configurations that only one of them has are left out: {left_out}.")
    single = all(len(side[0].runs) == 1 for side in cells)
    for label, side, others in zip("AB", cells, reversed(cells), strict=True):
        missing = {
            run.replicate_text
            for group, other in zip(side, others, strict=True)
            for run in other.finished
            if run.replicate not in [own.replicate for own in group.finished]
        }
        if missing and not single:
            lines.append(f"{label} lacks what the other has: {listing(sorted(missing))}.")
    return lines


def _basis(cells: Cells, name: str, found: Difference) -> str:
    """Return what a difference rests on, and what would be needed where it shows nothing."""
    title = run_metrics.in_words(name).capitalize()
    text = f"{title}: 95 % interval {texts.basis(name, found)}."
    if found.alone is not None:
        b, a = found.alone
        text += f" A alone is right on {a:,} of them, B alone on {b:,}."
    elif not found.told_apart and found.covers != "folds" and len(cells[0]) == 1:
        samples = [group.sample(name) for side in cells for group in side]
        deviation, gap = pooled(samples), abs(found.value)
        text += f" {texts.seeds_text(name, gap, deviation, found.over_images, Family())}"
    return text
