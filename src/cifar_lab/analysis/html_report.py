"""A collection of runs as report.html: one file that needs no network, and the data in it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from cifar_lab.analysis import report_details, run_metrics, texts
from cifar_lab.analysis.load_runs import FoundRun
from cifar_lab.analysis.report_details import rounded
from cifar_lab.analysis.seed_groups import RunCollection, SeedGroup
from cifar_lab.analysis.summary_tables import Claims, claims_table, shows
from cifar_lab.errors import shorten
from cifar_lab.runs.metrics import BY_CLASS
from cifar_lab.runs.templates import render

PAGES = Path(__file__).with_name("pages")
"""The pages' markup, style and script."""

SCORES = ("best_val_accuracy", "best_val_loss", "best_epoch", "test_accuracy")
CURVES = ("val_accuracy", "val_loss", "train_accuracy", "train_loss", *BY_CLASS)

MOST_POINTS = 20_000
"""Points of all lines of one kind, at most 200 and at least 30 of which one line has."""

MOST_PICTURES = 100
"""Settings, by rank, whose mistakes and calibration are shown: a page of thousands stays small."""

LOSSLESS_SETTINGS = 60
"""With more settings the thumbnails are JPEGs, so that the page stays small."""

LINKED = (
    ("curves", "figures/curves.png"),
    ("samples", "figures/samples.png"),
    ("confusion matrix", "figures/confusion_matrix.png"),
    ("reliability", "figures/reliability.png"),
    ("log", "train.log"),
    ("config", "config.yaml"),
)
"""Files of a run that the page links to where they are there."""


def report(collection: RunCollection, claims: Claims, *, test: bool) -> str:
    """Return the page, with the data in it that its script sorts, filters and draws."""
    ranking = collection.ranking
    places = {id(setting): place for place, setting in enumerate(ranking)}
    data = _data(collection, test=test)
    return render(
        PAGES / "report.html",
        title=shorten(collection.folder.resolve().name, 120),
        counts=texts.counts_text(collection),
        best=[texts.best_text(collection, setting) for setting in ranking if setting.chosen],
        notes=collection.notes,
        testing=texts.testing_text(collection),
        claims=claims_table(collection, claims),
        judged=[(places.get(id(setting)), judged.verdict) for _, setting, judged in claims],
        problems=texts.problems(collection),  # last: what `_data` could not read is among them
        data=data,
    )


def _data(collection: RunCollection, *, test: bool) -> dict[str, Any]:
    ranking = collection.ranking
    reference = {setting.dataset: setting for setting in reversed(ranking)}
    return {
        "metric": collection.metric,
        "words": {name: run_metrics.in_words(name) for name in (*SCORES, collection.metric)},
        "fraction": run_metrics.is_fraction(collection.metric),
        "higher": run_metrics.higher_is_better(collection.metric),
        "axes": collection.axes,
        "main": collection.main_axes,
        "values": [collection.values(axis) for axis in collection.axes],
        "settings": [
            _setting(collection, setting, reference[setting.dataset], place, test=test)
            for place, setting in enumerate(ranking)
        ],
    }


def _setting(
    collection: RunCollection, setting: SeedGroup, best: SeedGroup, place: int, *, test: bool
) -> dict[str, Any]:
    names = [n for n in (collection.metric, *SCORES) if shows(n, setting, test=test)]
    verdict, detail = texts.verdict(setting) if texts.has_verdicts(collection) else ("", "")
    few = len(collection.settings)
    lossless = few <= LOSSLESS_SETTINGS
    on_test, is_detailed = shows("test_", setting, test=test), place < MOST_PICTURES
    return {
        "key": setting.key,
        "label": collection.label(setting),
        "name": collection.short_label(setting),
        "dataset": setting.dataset,
        "rank": setting.rank,
        "chosen": setting.chosen,
        "verdict": verdict,
        "detail": detail,
        "n": len(setting.finished),
        "all": len(setting.runs),
        "status": ", ".join(f"{n} {s}" for s, n in texts.status_counts(setting).items()),
        "scores": {
            name: {"value": rounded(found.mean), "text": run_metrics.show_interval(name, found)}
            for name in names
            if (found := setting.interval(name)) is not None
        },
        "curves": _curves(setting, min(max(MOST_POINTS // few, 30), 200)),
        "difference": report_details.difference(setting, best),
        "confusion": report_details.confusion(setting, test=on_test),
        "reliability": report_details.reliability(setting, test=on_test) if is_detailed else None,
        "mistakes": report_details.mistakes(setting, lossless=lossless) if is_detailed else None,
        "runs": [_run(collection, run) for run in setting.runs],
    }


def _run(collection: RunCollection, run: FoundRun) -> dict[str, Any]:
    folder = run.run.path.relative_to(collection.folder)
    there = [(name, file) for name, file in LINKED if (run.run.path / file).is_file()]
    return {
        "folder": shorten(str(folder), 200),
        "links": [[name, _address(folder / file)] for name, file in [("folder", ""), *there]],
        "run": run.replicate_text,
        "status": run.summary.status,
        "epochs": texts.progress_text(run),
        "error": shorten(run.summary.error or "", 500),
        "warnings": [shorten(str(warning), 300) for warning in run.summary.warnings],
    }


def _address(path: Path) -> str:
    """Return a relative address: starting with a dot, it cannot be one of another scheme."""
    return "./" + quote(os.fsencode(path.as_posix()))


def _curves(setting: SeedGroup, most: int) -> dict[str, Any]:
    """Return each curve: the mean over the runs, and the lowest and highest run where many are.

    Curves end with the shortest run, so that n is the same all along.
    """
    histories = [run.history for run in setting.finished or setting.runs if run.history]
    length = min(map(len, histories), default=0)
    places = np.unique(np.linspace(0, length - 1, min(length, most)).astype(int)).tolist()
    curves: dict[str, Any] = {"epochs": [histories[0][i].epoch for i in places]}
    for name in CURVES:
        points = [[getattr(history[i], name) for history in histories] for i in places]
        whole = [all(v is not None and np.isfinite(v) for v in values) for values in points]
        if not any(whole):
            continue
        lines: list[Callable[[list[float]], float]] = [lambda values: sum(values) / len(values)]
        lines += [min, max] if len(histories) > 1 else []
        curves[name] = [
            [rounded(line(v)) if ok else None for v, ok in zip(points, whole, strict=True)]
            for line in lines
        ]
    return curves
