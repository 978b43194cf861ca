"""How long training takes on which device (S4-21)."""

from collections.abc import Iterable

from cifar_lab.metrics import EpochMetrics
from cifar_lab.run_dir import RunDir, RunSummary

COLUMNS = (
    *("device", "device name", "precision", "threads", "model", "dataset", "batch size", "runs"),
    *("epochs", "seconds per epoch", "images per second", "total"),
)
"""`total`: training time of all epochs of the row's runs, hours:minutes:seconds."""


def timing_table(runs: Iterable[RunDir]) -> str:
    """Return a Markdown table of training times, a row for each device, precision and model.

    Runs that share what decides the time are one row: seconds per epoch is their mean over all
    epochs, images per second all images by all seconds. Runs without an epoch are left out.
    """
    groups: dict[tuple[str, ...], list[list[EpochMetrics]]] = {}
    for run in runs:
        rows = run.read_metrics()
        if rows:
            groups.setdefault(_key(run, run.read_summary()), []).append(rows)
    lines = [_line(COLUMNS), _line("---" for _ in COLUMNS)]
    for key in sorted(groups):
        epochs = [row for rows in groups[key] for row in rows]
        seconds = sum(row.seconds for row in epochs)
        images = sum(row.seconds * row.images_per_second for row in epochs)
        rate = f"{images / seconds:,.0f}" if seconds > 0 else "–"
        per_epoch = f"{seconds / len(epochs):.1f}"
        counts = (str(len(groups[key])), str(len(epochs)))
        lines.append(_line([*key, *counts, per_epoch, rate, _clock(seconds)]))
    return "\n".join(lines) + "\n"


def _key(run: RunDir, summary: RunSummary) -> tuple[str, ...]:
    config = run.config
    return (
        summary.device,
        summary.device_name or "–",
        summary.precision,
        "–" if summary.threads is None else str(summary.threads),
        str(summary.choices.get("model", config.model["_target_"])),
        config.dataset.name,
        str(config.training.batch_size),
    )


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
