"""Bars of a benchmark: images per second of each way to train and to read the images."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from cifar_lab.figures import style

_PANELS = {
    "Training step": ("bound", "epoch", "careful", "plain"),
    "Data alone": ("data", "plain_data"),
}
_COLOURS = {"epoch": style.BLUE, "data": style.BLUE, "bound": style.GREEN}


def draw_speeds(report: Mapping[str, Any]) -> Figure:
    """Draw what `cifar_lab.benchmark --json` wrote: medians, and quartiles as whiskers."""
    speeds = [s for s in report["speeds"] if s["images_per_second"]]
    panels = {
        title: chosen
        for title, groups in _PANELS.items()
        if (chosen := [s for s in speeds if s["group"] in groups])
    }
    heights = [len(chosen) + 1.5 for chosen in panels.values()]
    figure = style.new_figure(8.0, 0.8 + 0.3 * sum(heights))
    run = report["run"]
    style.caption(
        figure,
        f"{run.get('model', 'model')} on {run['dataset']} · batch {run['batch_size']} · "
        f"{run['precision']} · {report['machine']['device']} · {run['images']} images",
    )
    grid = figure.subplots(len(panels) or 1, 1, squeeze=False, height_ratios=heights or [1])
    for axes, (title, chosen) in zip(grid[:, 0], panels.items(), strict=False):
        medians = [s["images_per_second"] for s in chosen]
        spread = [
            [m - s["quartiles"][0] for m, s in zip(medians, chosen, strict=True)],
            [s["quartiles"][1] - m for m, s in zip(medians, chosen, strict=True)],
        ]
        colours = [_COLOURS.get(s["group"], style.VERMILLION) for s in chosen]
        axes.barh(
            range(len(chosen)), medians, xerr=spread, color=colours, ecolor=style.INK, height=0.7
        )
        axes.set_yticks(range(len(chosen)), [style.plain(s["label"], 60) for s in chosen])
        axes.invert_yaxis()
        for place, speed in enumerate(chosen):
            right = max(speed["quartiles"][1], speed["images_per_second"])
            text = f"  {speed['images_per_second']:,.0f}"
            look: dict[str, Any] = {"va": "center", "fontsize": style.SMALL, "color": style.INK}
            axes.annotate(text, (right, place), **look)
        style.dress(axes, title, "images per second")
        axes.margins(x=0.12)
    if not panels:
        style.note(grid[0, 0], "nothing was measured")
    return figure
