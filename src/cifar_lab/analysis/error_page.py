"""The most confident mistakes of runs as one page of pictures that needs no network."""

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cifar_lab.analysis.html_report import PAGES
from cifar_lab.analysis.mistakes import Mistake, confident_mistakes, label_errors
from cifar_lab.errors import shorten
from cifar_lab.runs.metrics import Predictions
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.templates import render

Pixels = npt.NDArray[np.uint8]

_LONGEST = 112  # pixels of a picture's longer side, on the page


def error_page(
    runs: Sequence[RunDir],
    image_of: Callable[[int], Pixels],
    count: int,
    files: Sequence[str] = (),
) -> str:
    """Return the page: `count` mistakes of each run, and of several runs the likely label errors.

    `image_of` returns the image (C, H, W) uint8 with an index of the runs' test set. `files` are
    the names of the files of that set, if its images came from files.
    """
    predictions = [run.read_predictions() for run in runs]
    names = runs[0].class_names(predictions[0].logits.shape[1])
    sections = [_label_errors(predictions, count)] * (len(runs) > 1)
    for run, stored in zip(runs, predictions, strict=True):
        wrong = int((stored.predicted != stored.labels).sum())
        sections.append(
            {
                "title": f"Most confident mistakes of {shorten(run.path.name, 120)}",
                "lead": f"{wrong:,} of {len(stored):,} test images are classified wrongly "
                f"(test accuracy {stored.accuracy:.2%}).",
                "mistakes": confident_mistakes(stored, count),
                "runs": 1,
            }
        )

    def picture_of(mistake: Mistake) -> dict[str, Any]:
        pixels = image_of(mistake.index)
        plane = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
        picture = Image.fromarray(np.ascontiguousarray(plane))
        picture.thumbnail((2 * _LONGEST, 2 * _LONGEST))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        scale = _LONGEST / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        return {"address": f"data:image/png;base64,{data}", "width": width, "height": height}

    def name_of(mistake: Mistake) -> str:
        return shorten(files[mistake.index], 60) if files else f"test image {mistake.index:,}"

    shown = [shorten(name, 40) for name in names]
    template = PAGES / "errors.html"
    return render(template, sections=sections, names=shown, picture_of=picture_of, name_of=name_of)


def _label_errors(predictions: Sequence[Predictions], count: int) -> dict[str, Any]:
    """Return the section; models that are nearer to chance than to perfect doubt no label."""
    section = {"title": "Likely label errors", "runs": len(predictions)}
    right = float(np.mean([stored.accuracy for stored in predictions]))
    chance = np.bincount(predictions[0].labels).max() / len(predictions[0])
    if right < (1 + chance) / 2:
        lead = f"Not looked for: the runs are right on {right:.0%} of the images only, too few to "
        return section | {"lead": f"{lead}doubt a label.", "mistakes": None}
    suspects = label_errors(predictions)
    total = len(suspects)
    lead = (
        f"{total:,} test image{'s are' if total != 1 else ' is'} taken for the same other class by "
        f"most of the {len(predictions)} runs, with a mean probability that is high for that class "
        "(confident learning, Northcutt, Jiang and Chuang 2021). The label may be wrong, or the "
        "image may be hard: look at the picture."
    )
    return section | {"lead": lead, "mistakes": suspects[:count]}
