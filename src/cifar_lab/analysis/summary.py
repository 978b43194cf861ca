"""What `summarize` says of runs: as a value, as pictures, and as a page that needs no network."""

import base64
import math
import os
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from cifar_lab.analysis import forest, run_metrics, texts
from cifar_lab.analysis.load_runs import FoundRun
from cifar_lab.analysis.ranking import MainEffects, main_effects, rank
from cifar_lab.analysis.seed_groups import RunCollection, SeedGroup, short_names
from cifar_lab.analysis.summary_tables import Section, as_text, ranking_table, sections, shows
from cifar_lab.errors import UsageError, listing, shorten
from cifar_lab.runs.metrics import BY_CLASS
from cifar_lab.runs.text import duration, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORES = ("best_val_accuracy", "best_val_loss", "best_epoch", "test_accuracy")
CURVES = ("val_accuracy", "val_loss", "train_accuracy", "train_loss", *BY_CLASS)

MOST_POINTS = 20_000
"""Points of all lines of one kind, at most 200 and at least 30 of which one line has."""

LINKED = (
    ("curves", "figures/curves.png"),
    ("samples", "figures/samples.png"),
    ("confusion matrix", "figures/confusion_matrix.png"),
    ("reliability", "figures/reliability.png"),
    ("log", "train.log"),
    ("config", "config.yaml"),
)
"""Files of a run that the page links to where they are there."""

MOST_CURVES = 24
"""Cells in curves.png, the best ones; report.html has them all."""


@dataclass(frozen=True)
class Summary:
    """Ranked runs, what separates them, and their main effects.

    `test`: test scores are shown for all configurations, not for the best alone.
    """

    collection: RunCollection
    effects: Sequence[MainEffects]
    test: bool = False

    @property
    def table(self) -> list[dict[str, str]]:
        """The ranking, a dict for each configuration: `pandas.DataFrame(summary.table)` works."""
        table = ranking_table(self.collection, test=self.test)
        return [dict(zip(table.header, row, strict=True)) for row in table.rows]

    @property
    def sections(self) -> list[Section]:
        """The document, which summary.md and the console show: the folder's name comes first."""
        return sections(self.collection, self.effects, test=self.test)

    def __str__(self) -> str:
        return as_text(self.sections, 100)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: which configuration is the best, and the ranking."""
        lines = texts.conclusion(self.collection)
        table = ranking_table(self.collection, test=self.test)
        return "".join(f"<p>{escape(line)}</p>" for line in lines) + table.html()

    def seeds_needed(self, points: float) -> list[str]:
        """Return how many seeds would show a difference of so many points, for each dataset."""
        return texts.seeds_lines(self.collection, points)

    def figure(
        self, name: str, *, width: float | None = None, font_size: float | None = None
    ) -> "Figure":
        """Return the picture `grid`, `curves` or `effects`.

        For a paper's column, `width=3.3` (inches) and `font_size=8` (points): longer lines of text
        are broken, and panels stand below each other.
        """
        if name not in PICTURES:
            right = listing(PICTURES)
            raise UsageError(f"there is no picture {shorten(repr(name))}; there are {right}")
        picture = PICTURES[name](self.collection)
        if width is not None or font_size is not None:
            from cifar_lab.figures.style import Look

            Look(width=width, font_size=font_size).apply(picture)
        return picture


def summary_of(
    collection: RunCollection,
    *,
    metric: str | None = None,
    baseline: str | None = None,
    test: bool = False,
) -> Summary:
    """Rank a collection that was read, and return what there is to say of it."""
    rank(collection, metric, baseline)
    effects = (main_effects(collection, dataset) for dataset in collection.datasets)
    return Summary(collection, list(filter(None, effects)), test)


def grid_of(collection: RunCollection) -> "Figure":
    """Return the heat map of the groups' means over their main axes."""
    from cifar_lab.figures import grid

    metric = collection.metric
    axes = [collection.axes[i] for i in collection.main_axes]
    unit = run_metrics.factor(metric)
    squares = []
    for group in collection.groups:
        key = tuple(group.key[i] for i in collection.main_axes)
        interval = group.interval(metric)
        score, ends, count = None, None, 0
        if interval is not None:
            score, count = unit * interval.mean, interval.n
            if interval.low is not None or count == 2:  # equal runs and two folds have no interval
                ends = unit * interval.ends[0], unit * interval.ends[1]
        squares.append(grid.Square(key, score, ends, count, group.chosen))
    label = run_metrics.in_words(metric) + " (%)" * run_metrics.is_fraction(metric)
    order = [collection.values(axis) for axis in axes]
    return grid.draw(grid.Sweep(axes, order, squares, label, run_metrics.higher_is_better(metric)))


def curves_of(collection: RunCollection) -> "Figure":
    """Return the curves of the best groups, each with a band for its runs."""
    from cifar_lab.figures import curves

    ranked = collection.ranking
    runs: dict[str, Any] = {}
    for group in ranked[:MOST_CURVES]:
        runs[collection.short_label(group)] = [run.run for run in group.finished or group.runs]
    note = f" · the first {MOST_CURVES} of {len(ranked)} configurations" * (
        len(ranked) > MOST_CURVES
    )
    return curves.bands(runs, note)


PICTURES = {"grid": grid_of, "curves": curves_of, "effects": forest.draw}
"""What draws each picture of a collection, by the picture's name."""


def report(summary: Summary, template: str = "report.html", **more: Any) -> str:
    """Return the page, with the data in it that its script sorts, filters and draws.

    `template` may be one that extends that of the page, and `more` what it needs besides.
    """
    collection, test = summary.collection, summary.test
    ranking = collection.ranking
    # First: what cannot be read for it becomes a problem.
    settings = [_group_data(collection, group, test=test) for group in ranking]
    data = {
        "metric": collection.metric,
        "reference": texts.reference_name(collection),
        "words": {name: run_metrics.in_words(name) for name in (*SCORES, collection.metric)},
        "fraction": run_metrics.is_fraction(collection.metric),
        "higher": run_metrics.higher_is_better(collection.metric),
        "axes": collection.axes,
        "short": short_names(collection.axes),
        "main": collection.main_axes,
        "values": [collection.values(axis) for axis in collection.axes],
        "settings": settings,
    }
    forest, effects = None, collection.folder / "effects.png"
    if effects.is_file() and any(group.difference for group in collection.groups):
        forest = "data:image/png;base64," + base64.b64encode(effects.read_bytes()).decode("ascii")
    return render(
        Path(__file__).parent / "pages" / template,
        title=shorten(collection.folder.resolve().name, 120),
        summary=summary,
        collection=collection,
        texts=texts,
        made=_made(collection),
        command=f"python -m cifar_lab.summarize {shlex.quote(str(collection.folder))}",
        forest=forest,
        data=data,
        **more,
    )


def _made(collection: RunCollection) -> str:
    """Return when, on what and how long the runs trained."""
    runs = [run for run in collection.runs if run.summary.seconds]
    if not runs:
        return ""
    ended = max(run.run.summary_file.stat().st_mtime for run in runs)
    seconds = [run.summary.seconds for run in runs]
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(ended))
    machines = sorted({run.summary.device_name or run.summary.device for run in runs})
    lengths = " to ".join(dict.fromkeys(map(duration, (min(seconds), max(seconds)))))
    whole = f", {duration(sum(seconds))} in all" * (len(seconds) > 1)
    return f"Trained until {date} on {listing(machines, 120)}: {lengths}{whole}."


def _group_data(collection: RunCollection, group: SeedGroup, *, test: bool) -> dict[str, Any]:
    names = [n for n in (collection.metric, *SCORES) if shows(n, group, test=test)]
    said = texts.say_of(collection, group)
    return {
        "key": group.key,
        "label": collection.label(group),
        "name": collection.short_label(group),
        "dataset": group.dataset,
        "rank": group.rank,
        "chosen": group.chosen,
        "verdict": said.verdict,
        "detail": f"{said.difference}, {said.p}" * bool(said.difference),
        "n": len(group.finished),
        "all": len(group.runs),
        "status": texts.states_text(group.runs),
        "scores": {
            name: {"value": rounded(score.mean), "text": run_metrics.show_interval(name, score)}
            for name in names
            if (score := group.interval(name)) is not None
        },
        "curves": _curves(group, min(max(MOST_POINTS // len(collection.groups), 30), 200)),
        "warnings": _warnings(group),
        "runs": [_run(collection, run) for run in group.runs],
    }


def _warnings(group: SeedGroup) -> list[str]:
    """Return the warnings of its runs, once each: those of seeds differ in numbers alone."""
    kinds: dict[str, list[str]] = {}
    for warning in (warning for run in group.runs for warning in run.summary.warnings):
        kinds.setdefault(re.sub(r"[\d.,]+", "", warning), []).append(shorten(warning, 300))
    runs = len(group.runs)
    return [f"{w[0]}{f' ({len(w)} of {runs} runs)' * (runs > 1)}" for w in kinds.values()]


def _run(collection: RunCollection, run: FoundRun) -> dict[str, Any]:
    folder = run.run.path.relative_to(collection.folder)
    there = [(name, file) for name, file in LINKED if (run.run.path / file).is_file()]
    return {
        "folder": shorten(str(folder), 200),
        # relative, and starting with a dot: an address that cannot be one of another scheme
        "links": [
            [name, "./" + quote(os.fsencode((folder / file).as_posix()))]
            for name, file in [("folder", ""), *there]
        ],
        "run": run.replicate_text,
        "status": run.summary.status,
        "epochs": run.progress_text,
        "error": shorten(run.summary.error or "", 500),
        "seconds": duration(run.summary.seconds) if run.summary.seconds else "",
        "command": f"python -m cifar_lab.train {shlex.quote(str(run.run.config_file))}",
    }


def _curves(group: SeedGroup, most: int) -> dict[str, Any]:
    """Return each curve: the mean over the runs, and the lowest and highest run where many are.

    Curves end with the shortest run, so that n is the same all along.
    """
    histories = [run.history for run in group.finished or group.runs if run.history]
    length = min(map(len, histories), default=0)
    places = np.unique(np.linspace(0, length - 1, min(length, most)).astype(int)).tolist()
    curves: dict[str, Any] = {"epochs": [histories[0][i].epoch for i in places]}
    for name in CURVES if histories else ():
        rows = [[getattr(history[i], name) for i in places] for history in histories]
        values = np.array(rows, dtype=float)  # None becomes nan
        values[:, ~np.isfinite(values).all(axis=0)] = math.nan
        if np.isfinite(values).any():
            lines = [values.mean(axis=0)]
            lines += [values.min(axis=0), values.max(axis=0)] if len(histories) > 1 else []
            curves[name] = [list(map(rounded, line.tolist())) for line in lines]
    return curves


def rounded(value: float) -> float | None:
    """Return a number with six digits, enough to draw and short; None if it is no number."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
