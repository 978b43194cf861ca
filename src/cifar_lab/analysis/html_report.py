"""A collection of runs as report.html: one file that needs no network, and the data in it."""

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from cifar_lab.analysis import report_details, run_metrics, texts
from cifar_lab.analysis.claims import JudgedClaim, reported, show_where
from cifar_lab.analysis.load_runs import FoundRun
from cifar_lab.analysis.report_details import rounded
from cifar_lab.analysis.seed_groups import RunCollection, SeedGroup
from cifar_lab.analysis.statistics import Interval
from cifar_lab.analysis.summary_tables import Claims, shows
from cifar_lab.errors import shorten
from cifar_lab.runs.metrics import BY_CLASS

PARTS = Path(__file__).with_name("report_page")
"""The page's markup, style and script."""

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
    """Return the page, with the collection's data in it."""
    text = json.dumps(_data(collection, claims, test=test), ensure_ascii=False, allow_nan=False)
    # Inside a script element only "<" could end it; json.loads reads the escape back.
    safe = text.replace("<", "\\u003c").encode("utf-8", "replace").decode("utf-8")
    page = (PARTS / "report.html").read_text(encoding="utf-8")
    for mark, name in (("/*STYLE*/", "report.css"), ("/*SCRIPT*/", "report.js")):
        page = page.replace(mark, (PARTS / name).read_text(encoding="utf-8"), 1)
    return page.replace("/*DATA*/null", safe, 1)


def _data(collection: RunCollection, claims: Claims, *, test: bool) -> dict[str, Any]:
    ranking = collection.ranking
    reference = {setting.dataset: setting for setting in reversed(ranking)}
    places = {id(setting): place for place, setting in enumerate(ranking)}
    return {
        "title": shorten(collection.folder.resolve().name, 120),
        "counts": texts.counts_text(collection),
        "notes": collection.notes,
        "best": [texts.best_text(collection, one) for one in ranking if one.chosen],
        "testing": texts.testing_text(collection),
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
        "claims": [
            _claim(tag, None if setting is None else places[id(setting)], judged)
            for tag, setting, judged in claims
        ],
        "problems": _problems(collection),
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
            name: _interval(name, found)
            for name in dict.fromkeys(names)
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
        "links": [["folder", _address(folder)]]
        + [[name, _address(folder / file)] for name, file in there],
        "run": run.replicate_text,
        "status": run.summary.status,
        "epochs": texts.progress_text(run),
        "error": shorten(run.summary.error or "", 500),
        "warnings": [shorten(str(warning), 300) for warning in run.summary.warnings],
    }


def _address(path: Path) -> str:
    """Return a relative address: starting with a dot, it cannot be one of another scheme."""
    return "./" + quote(os.fsencode(path.as_posix()))


def _interval(name: str, found: Interval) -> dict[str, Any]:
    return {"value": rounded(found.mean), "text": run_metrics.show_interval(name, found)}


def _curves(setting: SeedGroup, most: int) -> dict[str, Any]:
    """Return each curve: the mean over the runs, and the lowest and highest run where many are.

    Curves end with the shortest run, so that n is the same all along.
    """
    histories = [run.history for run in setting.finished or setting.runs if run.history]
    length = min(map(len, histories), default=0)
    spread = np.linspace(0, length - 1, min(length, most)).astype(int) if length else np.arange(0)
    places = np.unique(spread).tolist()
    curves: dict[str, Any] = {"epochs": [histories[0][i].epoch for i in places]}
    for name in CURVES:
        found = [[getattr(history[i], name) for history in histories] for i in places]
        whole = [all(v is not None and np.isfinite(v) for v in values) for values in found]
        if not any(whole):
            continue
        pairs = list(zip(found, whole, strict=True))
        lines = [[rounded(sum(v) / len(v)) if ok else None for v, ok in pairs]]
        if len(histories) > 1:
            lines += [[rounded(end(v)) if ok else None for v, ok in pairs] for end in (min, max)]
        curves[name] = lines
    return curves


def _claim(tag: str, place: int | None, judged: JudgedClaim) -> dict[str, Any]:
    claim, found = judged.claim, judged.interval
    return {
        "id": claim.id or tag,
        "metric": judged.metric,
        "where": show_where(claim.where),
        "setting": place,
        "reported": reported(claim),
        "measured": run_metrics.show_interval(claim.metric, found),
        "n": 0 if found is None else found.n,
        "off": run_metrics.show_difference(claim.metric, judged.off),
        "verdict": judged.verdict.word,
        "reason": judged.verdict.reason,
        "source": judged.source,
    }


def _problems(collection: RunCollection) -> list[list[str]]:
    found = [[texts.folder_text(collection, u.path), u.reason] for u in collection.unreadable]
    for run in collection.runs:
        folder = texts.folder_text(collection, run.run.path)
        found += [[folder, shorten(problem, 300)] for problem in run.problems]
    return found
