"""trackio: a store on this machine, a Space of Hugging Face, or a server of one's own."""

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from cifar_lab.config.schema import wrong
from cifar_lab.errors import UsageError
from cifar_lab.runs.metrics import EpochMetrics
from cifar_lab.runs.summary import Status
from cifar_lab.trackers import Session, TrackedRun, Tracker, values_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trackio(Tracker):
    """Sends settings as the config, epochs and scores as metrics, figures as images.

    `project`: None: the run's `name`. `space`: a Space, as USER/NAME; None: TRACKIO_SPACE_ID.
    `server`: the address of a server of one's own; None: TRACKIO_SERVER_URL. With neither, the runs
    are in the local store, which TRACKIO_DIR names. `group`: None: the settings without the seed.
    """

    project: str | None = None
    space: str | None = None
    server: str | None = None
    group: str | None = None

    title: ClassVar[str] = "trackio"
    package: ClassVar[str] = "trackio"

    def __post_init__(self) -> None:
        """Refuse two places at once, and an address that is none."""
        super().__post_init__()
        if self.space is not None and self.server is not None:
            raise UsageError("tracker.space and tracker.server are two places; leave one out")
        server = self.server
        if server is not None and not server.startswith(("http://", "https://")):
            raise wrong("tracker.server", server, "an address such as http://localhost:7860")

    def destination(self, project: str) -> str:
        """Return the place and the project."""
        place = self.space or self.server or os.environ.get("TRACKIO_SPACE_ID") or "local store"
        return f"trackio {place} {self.project or project}"

    def open(self, run: TrackedRun) -> Session:
        """Start the run, or continue the one of this name, which has the key in it."""
        return _Session(self, run)


class _Session(Session):
    def __init__(self, tracker: Trackio, run: TrackedRun) -> None:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        self._problems: list[str] = []
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = self._note
        project, name = tracker.project or run.project, f"{run.name}-{run.key[:6]}"
        self.epochs = run.epochs
        variables = map(os.environ.get, ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"))
        if not any((tracker.space, tracker.server, *variables)):  # it is on this machine
            self.epochs = SQLiteStorage.get_max_step_for_run(project, name) or 0
        self._run = trackio.init(
            project,
            name=name,
            group=tracker.group or run.group,
            space_id=tracker.space,
            server_url=tracker.server,
            config={**run.settings, **run.about},
            resume="allow",
            embed=False,
            auto_log_gpu=None if run.live else False,
            auto_log_cpu=None if run.live else False,
        )
        self._check()

    def log_epochs(self, rows: Sequence[EpochMetrics]) -> None:
        for row in rows:
            self._run.log(values_of(row), step=row.epoch)
        self._check()

    def log_result(self, scores: Mapping[str, float], figures: Mapping[str, Path]) -> None:
        """Add the scores and the figures to the last epoch."""
        import trackio

        images = {f"figures/{name}": trackio.Image(str(path)) for name, path in figures.items()}
        self._run.log({**scores, **images}, step=self.epochs)

    def close(self, status: Status) -> None:
        """Wait until all is stored, for a limited time."""
        self._run.finish()
        self._check()

    def _note(self, message: Warning | str, *_: Any, **__: Any) -> None:
        self._problems.append(str(message))

    def _check(self) -> None:
        """Raise what trackio only warns of: data that it could not store or send."""
        failed = [p for p in self._problems if "could not" in p.lower() or "failed" in p.lower()]
        if failed:
            raise RuntimeError(failed[0])
