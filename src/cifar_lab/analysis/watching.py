"""How far the runs below a folder are, as their files say: for `watch`, which writes nothing."""

import dataclasses
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cifar_lab.errors import RunFailed, UsageError, shorten
from cifar_lab.runs.run_dir import RunDir, find_runs
from cifar_lab.runs.text import align, duration

HEADER = ("run", "state", "epoch", "validation", "best", "left")
_ORDER = ("running", "damaged", "failed", "interrupted", "finished", "queued")
_RECENT = 5  # epochs, whose mean duration says how long the others will take

# One setting of config.yaml: to parse and check 1,000 of these files would take six seconds.
_EPOCHS = re.compile(r"^training:\n(?:  .*\n)*?  epochs: (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class WatchedRun:
    """A run as it was last seen; accuracies are fractions, `epoch_seconds` None before the first.

    `stamp`: times and sizes of summary.json and metrics.csv as they were read.
    """

    path: Path
    status: str
    stamp: tuple[int, ...]
    epochs: int | None = None
    done: int = 0
    now: float | None = None
    best: float | None = None
    epoch_seconds: float | None = None

    @property
    def seconds_left(self) -> float | None:
        """About how long it will train, from the duration of its last epochs."""
        if self.epochs is None or self.epoch_seconds is None or self.status == "finished":
            return None
        begun = time.time() - self.stamp[2] / 1e9 if self.status == "running" else 0.0
        return max(0.0, (self.epochs - self.done) * self.epoch_seconds - begun)


class Watcher:
    """Reads the runs below a folder again and again; only what has changed is read anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs: dict[Path, WatchedRun] = {}

    def look(self) -> list[WatchedRun]:
        """Return the runs as they are now; UsageError if the folder is gone."""
        self._runs = {run.path: self._read(run) for run in find_runs(self.folder)}
        return sorted(
            self._runs.values(),
            key=lambda run: (_ORDER.index(run.status), -(run.best or 0.0), run.path),
        )

    def _read(self, run: RunDir) -> WatchedRun:
        stamp = _stamp(run.summary_file) + _stamp(run.metrics_file)
        known = self._runs.get(run.path)
        try:
            if known is not None and known.stamp == stamp:
                ended = known.status == "running" and not run.is_locked()
                return dataclasses.replace(known, status="interrupted") if ended else known
            rows = run.read_metrics()
            scores = [row.val_accuracy for row in rows if row.val_accuracy is not None]
            recent = [row.seconds for row in rows[-_RECENT:]]
            epochs = _EPOCHS.search(run.config_file.read_text(encoding="utf-8"))
            return WatchedRun(
                run.path,
                run.status,
                stamp,
                int(epochs[1]) if epochs else None,
                done=len(rows),
                now=scores[-1] if scores else None,
                best=max(scores, default=None),
                epoch_seconds=sum(recent) / len(recent) if recent else None,
            )
        except (RunFailed, UsageError, OSError, ValueError):  # it may be removed at any time
            return WatchedRun(run.path, "damaged", stamp)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def headline(runs: Sequence[WatchedRun]) -> str:
    """Return how many runs are in which state, the best so far, and about how long all will take.

    What is queued is expected to take as long as the others, as many at a time as run now.
    """
    counts = Counter(run.status for run in runs)
    parts = [f"{counts['finished']} of {len(runs)} finished"]
    parts += [f"{counts[s]} {s}" for s in _ORDER if counts[s] and s != "finished"]
    if (best := max(runs, key=lambda run: run.best or 0.0, default=None)) and best.best:
        name = names([run.path for run in runs])[best.path]
        parts.append(f"best validation accuracy {best.best:.2%}" + f" ({name})" * (len(runs) > 1))
    times = [run.epoch_seconds * run.epochs for run in runs if run.epoch_seconds and run.epochs]
    if counts["running"] and times:
        left = sum(run.seconds_left or 0.0 for run in runs if run.status == "running")
        left += counts["queued"] * sum(times) / len(times)
        parts.append(f"about {duration(left / counts['running'])} left")
    return " · ".join(parts)


def cells(run: WatchedRun, name: str) -> tuple[str, ...]:
    """Return a run's row of the table."""
    of = "" if run.epochs is None else f" of {run.epochs}"
    scores = ["–" if score is None else f"{score:.2%}" for score in (run.now, run.best)]
    left = run.seconds_left if run.status == "running" else None
    return (name, run.status, f"{run.done}{of}", *scores, "" if left is None else duration(left))


def table(runs: Sequence[WatchedRun], columns: int, most: int | None = None) -> str:
    """Return the headline and a line for each run, at most `most` of them and `columns` wide."""
    named = names([run.path for run in runs])
    shown = runs if most is None else runs[:most]
    longest = max(20, columns - 55)
    rows = [HEADER, *(cells(run, shorten_name(named[run.path], longest)) for run in shown)]
    lines = [headline(runs), "", *align(rows, right={2, 3, 4, 5})]
    if len(runs) > len(shown):
        lines.append(f"and {len(runs) - len(shown)} more")
    return "\n".join(lines)


def shorten_name(name: str, longest: int) -> str:
    """Return a name on one line, cut in the middle where it is longer."""
    line = shorten(name, 1000)
    return line if len(line) <= longest else f"{line[: longest // 2 - 1]}…{line[-longest // 2 :]}"


def names(paths: Sequence[Path]) -> dict[Path, str]:
    """Return a short name of each run: what differs in the names of the folders, where it can."""
    parts = [path.name.split("-")[:-1] for path in paths]
    same = set(parts[0]).intersection(*parts) if len(parts) > 1 else set()
    short = ["-".join(part for part in own if part not in same) for own in parts]
    common = os.path.commonpath([path.parent for path in paths]) if paths else ""
    full = [str(path.relative_to(common)) for path in paths]
    unique = len(set(short)) == len(paths) and all(short)
    return dict(zip(paths, short if unique else full, strict=True))
