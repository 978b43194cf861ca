"""The most confident mistakes of runs as one page of pictures that needs no network."""

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np

from cifar_lab.analysis.html_report import PARTS
from cifar_lab.analysis.mistakes import Mistake, confident_mistakes, label_errors
from cifar_lab.errors import shorten
from cifar_lab.runs.run_dir import RunDir

Image = np.ndarray[Any, np.dtype[np.uint8]]

_LONGEST = 112  # pixels of a picture's longer side, on the page

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
{sections}
</main>
</body>
</html>
"""


def error_page(runs: Sequence[RunDir], image_of: Callable[[int], Image], count: int) -> str:
    """Return the page: `count` mistakes of each run, and of several runs the likely label errors.

    `image_of` returns the image (C, H, W) uint8 with an index of the runs' test set.
    """
    each = [run.read_predictions() for run in runs]
    names = runs[0].class_names(each[0].logits.shape[1])
    sections = []
    if len(runs) > 1:
        suspects = label_errors(each)
        sections.append(_label_errors(suspects[:count], len(suspects), len(runs), names, image_of))
    for run, predictions in zip(runs, each, strict=True):
        wrong = int((predictions.predicted != predictions.labels).sum())
        lead = (
            f"{wrong:,} of {len(predictions):,} test images are classified wrongly "
            f"(test accuracy {predictions.accuracy:.2%})."
        )
        mistakes = confident_mistakes(predictions, count)
        title = f"Most confident mistakes of {shorten(run.path.name, 120)}"
        sections.append(_section(title, lead, mistakes, names, image_of))
    return _PAGE.format(
        title="Mistakes on the test images",
        style=(PARTS / "report.css").read_text(encoding="utf-8"),
        sections="\n".join(sections),
    )


def _label_errors(
    shown: Sequence[Mistake],
    total: int,
    runs: int,
    names: Sequence[str],
    image_of: Callable[[int], Image],
) -> str:
    lead = (
        f"{total:,} test image{'s are' if total != 1 else ' is'} taken for the same other class by "
        f"most of the {runs} runs, with a mean probability that is high for that class (confident "
        "learning, Northcutt, Jiang and Chuang 2021). The label may be wrong, or the image may be "
        "hard: look at the picture."
    )
    return _section("Likely label errors", lead, shown, names, image_of, runs=runs)


def _section(
    title: str,
    lead: str,
    mistakes: Sequence[Mistake],
    names: Sequence[str],
    image_of: Callable[[int], Image],
    *,
    runs: int = 1,
) -> str:
    items = "\n".join(_item(one, names, image_of(one.index), runs) for one in mistakes)
    pictures = f'<ul class="mistakes">\n{items}\n</ul>' if mistakes else "<p>None.</p>"
    return f"<section>\n<h2>{escape(title)}</h2>\n<p>{escape(lead)}</p>\n{pictures}\n</section>"


def _item(mistake: Mistake, names: Sequence[str], image: Image, runs: int) -> str:
    label, guess = (escape(shorten(names[i], 40)) for i in (mistake.label, mistake.guess))
    agree = f"<div>{mistake.runs} of {runs} runs</div>" if runs > 1 else ""
    return (
        f"<li>{_picture(image, f'{label}, taken for {guess}')}"
        f'<div><span class="muted">label: </span>{label} ({mistake.p_label:.1%})</div>'
        f'<div><span class="muted">predicted: </span><strong>{guess}</strong> '
        f"({mistake.p_guess:.1%})</div>{agree}"
        f'<div class="muted">test image {mistake.index:,}</div></li>'
    )


def _picture(image: Image, text: str) -> str:
    """Return an image (C, H, W) as an element that contains it."""
    from PIL import Image as Pictures

    plane = image.transpose(1, 2, 0) if len(image) == 3 else image[0]
    picture = Pictures.fromarray(np.ascontiguousarray(plane))
    picture.thumbnail((2 * _LONGEST, 2 * _LONGEST))
    scale = _LONGEST / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<img class="thumb" width="{width}" height="{height}" alt="{text}" '
        f'src="data:image/png;base64,{data}">'
    )
