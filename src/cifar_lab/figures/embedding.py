"""What the two-dimensional pictures of the features share: the sample, the panel, its numbers."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cifar_lab.figures import style
from cifar_lab.runs.metrics import Floats, Integers
from cifar_lab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = np.ndarray[Any, Any]
Projection = tuple[Array, str, str]
"""Points (n, 2) in the plane, and what the two axes are."""

LEGEND_ROWS = 30
NAMED_CLASSES = 20
"""Up to this many classes have their names among the points; more would hide them."""


def separation(points: Floats, labels: Integers) -> dict[str, float]:
    """Return how well classes keep apart among points (n, D): two numbers.

    `knn_accuracy`: share of points whose class is the most frequent one among their five nearest
    neighbours, themselves left out (a tie goes to the nearer); `silhouette`: mean over the points,
    from -1 to 1 (Rousseeuw 1987), nan with one class.
    """
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import NearestNeighbors

    classes, codes = np.unique(labels, return_inverse=True)
    k = min(5, len(points) - 1)
    nearest = NearestNeighbors(n_neighbors=k).fit(points).kneighbors(return_distance=False)
    votes = np.zeros((len(points), len(classes)))
    for rank in range(k):
        # A tie goes to the class of the nearest: a tenth more for it, half as much for each next
        # place, so that nothing outweighs a nearer neighbour, and no majority is overturned.
        votes[np.arange(len(points)), codes[nearest[:, rank]]] += 1 + 0.1 * 0.5**rank
    apart = 1 < len(classes) < len(points)
    return {
        "knn_accuracy": float((votes.argmax(axis=1) == codes).mean()),
        "silhouette": float(silhouette_score(points, codes)) if apart else math.nan,
    }


def read_sample(run: RunDir, sample_size: int, seed: int) -> tuple[Array, Array]:
    """Return features (n, D) and labels (n,) of at most `sample_size` images, drawn by `seed`."""
    features, labels = run.read_features()
    if len(features) > sample_size:
        chosen = np.random.default_rng(seed).choice(len(features), sample_size, replace=False)
        chosen.sort()
        features, labels = features[chosen], labels[chosen]
    return features, labels


def panels(
    runs: Sequence[RunDir],
    titles: Sequence[str],
    name: str,
    method: Callable[[Array, int], Projection],
    sample_size: int = 2000,
    seed: int = 0,
) -> "Figure":
    """Return one panel per run, with one legend; `method` takes the features and the seed."""
    configs = [run.read_config() for run in runs]
    samples = [read_sample(run, sample_size, seed) for run in runs]
    classes = [len(config.dataset.classes or []) for config in configs]
    num_classes = max(*classes, *(int(labels.max()) + 1 for _, labels in samples))
    names = style.plain_names(runs[0], num_classes)
    columns = -(-num_classes // LEGEND_ROWS)
    figure = style.new_figure(5.4 * len(runs) + 1.6 * columns, 5.6)
    grid = figure.subplots(1, len(runs), squeeze=False)[0]
    for axes, (features, labels), title in zip(grid, samples, titles, strict=True):
        points, x_label, y_label = np.zeros((len(features), 2)), "all features are the same", ""
        if np.ptp(features, axis=0).any():
            points, x_label, y_label = method(features, seed)
        style.dress(axes, "", x_label, y_label)
        _scatter(axes, points, labels, names)
        scores = separation(points, labels)
        said = f"5-nearest-neighbour accuracy {100 * scores['knn_accuracy']:.1f} %, silhouette "
        heading = [style.plain(title, 80)] * bool(title) + [f"{said}{scores['silhouette']:.2f}"]
        axes.set_title("\n".join(heading), fontsize=style.NORMAL, loc="left", color=style.INK)
    size = style.NORMAL if num_classes <= NAMED_CLASSES else 6
    look: dict[str, Any] = {"loc": "outside right center", "fontsize": size, "markerscale": 1.7}
    style.legend_outside(figure, grid[0], columns=columns, **look)
    what = style.run_title(configs[0]) if len(runs) == 1 else f"{len(runs)} runs"
    style.caption(figure, f"{name} of the features · {len(samples[0][1]):,} images · {what}")
    return figure


def _scatter(axes: "Axes", points: Array, labels: Array, names: list[str]) -> None:
    axes.tick_params(labelsize=style.SMALL)
    size = float(np.clip(30000 / max(len(labels), 1), 6, 26))
    for index, name in enumerate(names):
        colour, marker = style.class_style(index, len(names))
        look: dict[str, Any] = {"color": colour, "marker": marker, "alpha": 0.7, "linewidths": 0}
        x, y = points[labels == index].T
        axes.scatter(x, y, s=size, label=name, **look)
    if len(names) <= NAMED_CLASSES:
        _write_names(axes, points, labels, names)


def _write_names(axes: "Axes", points: Array, labels: Array, names: list[str]) -> None:
    """Write each class's name at the median of its points, or beside it where two would meet."""
    shown = [i for i in range(len(names)) if (labels == i).any()]
    medians = [np.median(points[labels == i], axis=0) for i in shown]
    axes.autoscale_view()  # else transData still has the limits before the last class was drawn
    places = (axes.transData + axes.transAxes.inverted()).transform(np.array(medians))
    from matplotlib.patheffects import withStroke

    character, line = 0.0185, 0.036  # as shares of the panel's width and height
    widths = np.array([character * len(names[i]) for i in shown])
    order = np.arange(len(shown))
    for _ in range(200):
        apart = places[:, None] - places[None]
        meet = np.abs(apart[:, :, 0]) < (widths[:, None] + widths[None]) / 2
        meet &= (np.abs(apart[:, :, 1]) < line) & (order[:, None] != order)
        if not meet.any():
            break
        direction = np.sign(apart[:, :, 1] + 1e-9 * (order[:, None] - order))
        places[:, 1] += (meet * direction).sum(axis=1) * line / 8
    room = np.column_stack([widths / 2, np.full(len(shown), 0.02)])  # names stay in the panel
    for i, place in zip(shown, np.clip(places, room, 1 - room), strict=True):
        halo = [withStroke(linewidth=2.5, foreground=style.PAPER)]
        look = {"fontsize": style.NORMAL, "fontweight": "bold", **style.CENTRED}
        look |= {"transform": axes.transAxes, "path_effects": halo}
        look["color"], _ = style.class_style(i, len(names))
        axes.text(place[0], place[1], names[i], **look)
