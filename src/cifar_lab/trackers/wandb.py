"""Weights & Biases, online or offline."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from cifar_lab.runs.metrics import EpochMetrics
from cifar_lab.runs.summary import Status
from cifar_lab.trackers import Session, TrackedRun, Tracker, values_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class WandB(Tracker):
    """Sends settings as config, epochs as history, scores as summary, figures as images.

    `project`: None: WANDB_PROJECT, else the run's `name`. `entity`: None: the account's default.
    `group`: None: the settings without the seed. `mode`: None: WANDB_MODE, else online. `folder`:
    where the client keeps its files; None: WANDB_DIR, else ./wandb.
    """

    project: str | None = None
    entity: str | None = None
    group: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = None
    folder: str | None = None

    title: ClassVar[str] = "Weights & Biases"
    package: ClassVar[str] = "wandb"

    def project_of(self, name: str) -> str:
        """Return the project; W&B refuses some characters."""
        project = self.project or os.environ.get("WANDB_PROJECT") or name
        return re.sub(r"[/\\#?%:]", "-", project)

    def destination(self, project: str) -> str:
        """Return entity and project; what was written offline can be sent to them later."""
        return f"wandb {self.entity or 'default entity'} {self.project_of(project)}"

    def open(self, run: TrackedRun) -> Session:
        """Start or continue the run whose id is the key."""
        return _Session(self, run)


class _Session(Session):
    def __init__(self, tracker: WandB, run: TrackedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=tracker.project_of(run.project),
            entity=tracker.entity,
            id=run.key,
            name=run.name,
            group=tracker.group or run.group,
            dir=tracker.folder,
            mode=tracker.mode,
            config={**run.settings, **run.about},
            resume="allow",
            reinit="create_new",
            allow_val_change=True,
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                init_timeout=tracker.wait_seconds,
                finish_timeout=tracker.wait_seconds,
                finish_timeout_raises=True,
                x_disable_stats=not run.live,  # the load now is not that of a past run
                x_stats_pid=os.getppid(),  # the process that trains
            ),
        )
        # Online, the server knows best; offline, nothing but the folder knows.
        self.epochs = self._run.step - 1 if self._run.resumed else run.epochs
        self.link = self._run.url

    def log_epochs(self, rows: Sequence[EpochMetrics]) -> None:
        for row in rows:
            self._run.log(values_of(row), step=row.epoch, commit=True)

    def log_result(self, scores: Mapping[str, float], figures: Mapping[str, Path]) -> None:
        """Set the summary, and add the figures to the history after the last epoch."""
        import wandb

        self._run.summary.update(dict(scores))
        if figures:
            images = {f"figures/{name}": wandb.Image(str(path)) for name, path in figures.items()}
            self._run.log(images, step=self.epochs + 1, commit=True)

    def close(self, status: Status) -> None:
        """Wait until all is sent, for a limited time."""
        self._run.finish(exit_code=0 if status == "finished" else 1)
