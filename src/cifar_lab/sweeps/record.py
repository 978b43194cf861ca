"""The sweep's own record, `.sweeps/<id>/sweep.json` beside its cells."""

import json
import os
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cifar_lab.runs.atomic_io import write_text
from cifar_lab.sweeps.cell import Cell
from cifar_lab.sweeps.outcome import Outcome


class Record:
    """The command of a sweep, its cells, and what became of each.

    `parent` is the folder of the run folders.
    """

    def __init__(self, parent: Path, command: Sequence[str]) -> None:
        started = datetime.now(UTC)
        self.folder = parent / ".sweeps" / f"{started:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
        self._parent = parent
        self._cells: dict[Path, dict[str, Any]] = {}
        self._content: dict[str, Any] = {
            "command": list(command),
            "started": started.isoformat(timespec="seconds"),
            "cells": [],
        }

    def add(self, cells: Sequence[Cell]) -> None:
        """Note cells; those that it has already stay as they are."""
        new = [cell for cell in cells if cell.run.path not in self._cells]
        for cell in new:
            folder = os.path.relpath(cell.run.path, self._parent)
            self._cells[cell.run.path] = {"folder": folder, "axes": dict(cell.axes)}
        if new:
            self._write()

    def close(self, outcomes: Sequence[Outcome]) -> None:
        """Note what became of each cell."""
        self._content["ended"] = datetime.now(UTC).isoformat(timespec="seconds")
        for outcome in outcomes:
            self._cells[outcome.cell.run.path] |= {
                "before": outcome.before,
                "after": outcome.after,
                "seconds": round(outcome.seconds, 3),
                "error": outcome.error,
            }
        self._write()

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._content["cells"] = list(self._cells.values())
        text = json.dumps(self._content, indent=1, ensure_ascii=False) + "\n"
        write_text(self.folder / "sweep.json", text)
