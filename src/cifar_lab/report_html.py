"""A study as one HTML file that needs no network: what report.html shows, as data for its page."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cifar_lab import measures, tables
from cifar_lab.cells import Cell, FoundRun, Study, check_arrays, show_value
from cifar_lab.claims import Measured, reported, show_settings
from cifar_lab.errors import RequestError, RunFailed
from cifar_lab.metrics import Predictions
from cifar_lab.schema import shorten
from cifar_lab.significance import Interval

PAGE = Path(__file__).with_name("report.html")

CURVES = ("val_accuracy", "val_loss", "train_accuracy", "train_loss")
MOST_POINTS = 200
"""Points of a curve at most."""

MOST_CLASSES = 25
"""A confusion matrix of more classes is shown by its largest errors alone."""

MOST_MISTAKES = 8
LARGEST_THUMBNAIL = 64
"""Pixels of a thumbnail's longer side at most."""

LOSSLESS_CELLS = 60
"""With more cells the thumbnails are JPEGs, so that the page stays small."""


def report(study: Study, claims: Sequence[Measured], *, test: bool) -> str:
    """Return the page, with the study's data in it."""
    text = json.dumps(_data(study, claims, test=test), ensure_ascii=False, allow_nan=False)
    # Inside a script element only "<" could end it; json.loads reads the escape back.
    safe = text.replace("<", "\\u003c").encode("utf-8", "replace").decode("utf-8")
    return PAGE.read_text(encoding="utf-8").replace("/*DATA*/null", safe, 1)


def _data(study: Study, claims: Sequence[Measured], *, test: bool) -> dict[str, Any]:
    reference = {cell.dataset: cell for cell in reversed(study.ranking)}
    return {
        "title": shorten(study.folder.resolve().name, 120),
        "counts": tables.counts_text(study),
        "notes": study.notes,
        "best": [tables.best_text(study, cell) for cell in study.ranking if cell.chosen],
        "testing": tables.testing_text(study),
        "metric": study.metric,
        "fraction": measures.is_fraction(study.metric),
        "higher": measures.higher_is_better(study.metric),
        "axes": study.axes,
        "values": [study.values(axis) for axis in study.axes],
        "cells": [_cell(study, cell, reference[cell.dataset], test=test) for cell in study.ranking],
        "claims": [_claim(study, row) for row in claims],
        "problems": _problems(study),
    }


def _cell(study: Study, cell: Cell, reference: Cell, *, test: bool) -> dict[str, Any]:
    shown = {
        name: _interval(name, cell.interval(name))
        for name in dict.fromkeys([study.metric, "best_val_accuracy", "best_val_loss"])
    }
    if tables.shows("test_accuracy", cell, test=test):
        shown["test_accuracy"] = _interval("test_accuracy", cell.interval("test_accuracy"))
    return {
        "key": cell.key,
        "label": study.label(cell),
        "dataset": cell.dataset,
        "rank": cell.rank,
        "chosen": cell.chosen,
        "tied": cell.tied_with_best,
        "n": len(cell.finished),
        "all": len(cell.runs),
        "status": ", ".join(f"{n} {status}" for status, n in tables.status_counts(cell).items()),
        "scores": shown,
        "epoch": _number(cell.mean("best_epoch")),
        "against": tables.against_best_text(cell),
        "curves": _curves(cell),
        "difference": _difference(cell, reference),
        "confusion": _confusion(cell, test=test),
        "mistakes": _mistakes(cell, lossless=len(study.cells) <= LOSSLESS_CELLS),
        "runs": [
            {
                "folder": tables.folder_text(study, run.run.path),
                "seed": run.config.seed,
                "status": run.summary.status,
                "epochs": tables.progress_text(run),
                "error": shorten(run.summary.error or "", 500),
                "warnings": [shorten(str(warning), 300) for warning in run.summary.warnings],
            }
            for run in cell.runs
        ],
    }


def _interval(name: str, found: Interval | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"value": _number(found.mean), "text": tables.score_text(name, found)}


def _curves(cell: Cell) -> dict[str, Any]:
    """Return the mean over the runs of each curve, up to the end of the shortest run."""
    histories = [run.history for run in cell.finished or cell.runs if run.history]
    length = min(map(len, histories), default=0)
    places = np.unique(np.linspace(0, length - 1, min(length, MOST_POINTS)).astype(int))
    curves: dict[str, Any] = {"epochs": [histories[0][i].epoch for i in places] if length else []}
    for name in CURVES:
        means = []
        for i in places if length else []:
            values = [getattr(history[i], name) for history in histories]
            known = [v for v in values if v is not None and np.isfinite(v)]
            means.append(_number(sum(known) / len(known)) if len(known) == len(values) else None)
        curves[name] = means
    return curves


def _difference(cell: Cell, reference: Cell) -> list[list[str]]:
    """Return the settings in which a cell and the best one differ: name, its value, the best's."""
    here, there = cell.runs[0], reference.runs[0]
    rows = []
    for mine, best in ((here.choices, there.choices), (here.settings, there.settings)):
        for key in dict.fromkeys([*mine, *best]):
            a = show_value(mine[key]) if key in mine else "–"
            b = show_value(best[key]) if key in best else "–"
            if a != b:
                rows.append([shorten(key, 80), a, b])
    return rows


def _confusion(cell: Cell, *, test: bool) -> dict[str, Any] | None:
    """Return the counts over the cell's seeds: of test images for the chosen cell, else validation.

    A matrix of test images tells the test score.
    """
    split = "test" if tables.shows("test_accuracy", cell, test=test) else "validation"
    read = (run.confusion(split) for run in cell.finished)
    found = [counts for counts in read if counts is not None]
    if not found or len({len(counts) for counts in found}) != 1:
        return None
    counts = np.sum(found, axis=0)
    names = class_names(cell.finished[0], len(counts))
    return {
        "split": split,
        "images": int(counts.sum()),
        "classes": names if len(names) <= MOST_CLASSES else None,
        "counts": counts.tolist() if len(names) <= MOST_CLASSES else None,
        "most": _most_confused(counts, names),
    }


def _most_confused(counts: np.ndarray[Any, Any], names: Sequence[str]) -> list[list[Any]]:
    errors = counts.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:5]
    pairs = [divmod(int(i), len(counts)) for i in order]
    return [[names[a], names[b], int(errors[a, b])] for a, b in pairs if errors[a, b]]


def class_names(run: FoundRun, num_classes: int) -> list[str]:
    """Return the names of a run's classes, numbers where it has none."""
    dataset = run.config.dataset
    names = dataset.display_names or dataset.classes or list(run.summary.per_class_accuracy)
    return [shorten(names[i], 40) if i < len(names) else str(i) for i in range(num_classes)]


def _mistakes(cell: Cell, *, lossless: bool) -> dict[str, Any] | None:
    """Return the most confident mistakes of the first run that kept them: one picture in a row."""
    for run in cell.finished:
        path = run.run.samples_file
        if not path.exists():
            continue
        try:
            check_arrays(path)
            arrays = run.run.read_arrays(path)
            chosen = np.flatnonzero(arrays["kind"] == "worst")[:MOST_MISTAKES]
            images = arrays["images"][chosen]
            labels, logits = arrays["labels"][chosen], arrays["logits"][chosen]
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
                raise RunFailed(f"{path} is damaged: its images are {images.dtype}{images.shape}")
            guessed = Predictions(logits.astype(np.float32), labels, labels)
            names = class_names(run, logits.shape[1])
            items = [
                {
                    "label": names[int(label)],
                    "guess": names[int(guess)],
                    "p": _number(float(probability)),
                }
                for label, guess, probability in zip(
                    labels, guessed.predicted, guessed.probabilities.max(axis=1), strict=True
                )
            ]
        except (RequestError, RunFailed) as error:
            run.note(str(error))
            continue
        except (KeyError, IndexError, ValueError, TypeError) as error:
            run.note(f"{path} is damaged: {type(error).__name__}: {error}")
            continue
        if len(chosen):
            return {"items": items, "seed": run.config.seed, **_strip(images, lossless=lossless)}
    return None


def _strip(images: np.ndarray[Any, Any], *, lossless: bool) -> dict[str, Any]:
    """Return images (n, C, H, W) side by side as one picture in a data address."""
    from PIL import Image

    pictures = []
    for image in images:
        plane = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        picture = Image.fromarray(np.ascontiguousarray(plane)).convert("RGB")
        picture.thumbnail((LARGEST_THUMBNAIL, LARGEST_THUMBNAIL))
        pictures.append(picture)
    width, height = pictures[0].size
    strip = Image.new("RGB", (width * len(pictures), height))
    for place, picture in enumerate(pictures):
        strip.paste(picture, (place * width, 0))
    buffer = io.BytesIO()
    if lossless:
        strip.save(buffer, "PNG", optimize=True)
    else:
        strip.save(buffer, "JPEG", quality=88, subsampling=0)
    kind = "png" if lossless else "jpeg"
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"strip": f"data:image/{kind};base64,{text}", "width": width, "height": height}


def _claim(study: Study, row: Measured) -> dict[str, Any]:
    claim, found = row.claim, row.interval
    return {
        "id": claim.id or row.report,
        "metric": claim.metric,
        "where": show_settings(claim.where),
        "cell": None if row.cell is None else study.ranking.index(row.cell),
        "reported": reported(claim),
        "measured": tables.score_text(claim.metric, found),
        "n": 0 if found is None else found.n,
        "off": measures.show_difference(claim.metric, row.off),
        "verdict": row.verdict,
        "source": "; ".join(filter(None, [claim.says, claim.source, claim.note])),
    }


def _problems(study: Study) -> list[list[str]]:
    found = [[tables.folder_text(study, u.path), u.reason] for u in study.unreadable]
    for run in study.runs:
        folder = tables.folder_text(study, run.run.path)
        found += [[folder, shorten(problem, 300)] for problem in run.problems]
    return found


def _number(value: float | None) -> float | None:
    """Return a number with six digits: enough to draw, and short."""
    return None if value is None else float(f"{value:.6g}")
