"""Text tables, durations and names of classes, as every command prints them."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any


def align(
    rows: Sequence[Sequence[str]], *, right: Collection[int] = (), separator: str = "  "
) -> list[str]:
    """Return one line per row, with columns as wide as their widest cell.

    `right` names the columns that are aligned to the right. All rows have the same length.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(separator.join(cells).rstrip())
    return lines


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are aligned in the source too.

    The cells are taken as they are: text with Markdown's own characters is escaped by the caller.
    """
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    padded = [
        [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        for row in (header, rule, *rows)
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def duration(seconds: float) -> str:
    """Return a duration as 4.2 s, 3:07 or 2:04:09."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def class_name(target_config: Mapping[str, Any] | None) -> str:
    """Return the name of a target's class, such as Adam; "none" without a target."""
    return str(target_config["_target_"]).rpartition(".")[2] if target_config else "none"
