"""TensorBoard: event files in the run's folder, shown by `tensorboard --logdir FOLDER`."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from cifar_lab.runs.metrics import EpochMetrics
from cifar_lab.runs.summary import Status
from cifar_lab.trackers import Session, TrackedRun, Tracker, values_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorBoard(Tracker):
    """Writes scalars, the settings (as text and as hyperparameters) and figures as events."""

    title: ClassVar[str] = "TensorBoard"
    package: ClassVar[str] = "tensorboard"

    def destination(self, project: str) -> str:
        """Return the name of the one place: the run's own folder."""
        return "tensorboard"

    def open(self, run: TrackedRun) -> Session:
        """Start an event file; several in one folder are one run."""
        return _Session(run)


class _Session(Session):
    def __init__(self, run: TrackedRun) -> None:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = run.folder / "tensorboard"
        files = sorted(folder.glob("events.out.tfevents.*")) if folder.is_dir() else []
        # A torn one is read as far as it goes.
        events = (event for path in files for event in EventFileLoader(str(path)).Load())
        self.epochs = max((event.step for event in events), default=0)
        self._event = Event
        self._writer = EventFileWriter(str(folder))
        if self.epochs == 0:
            kinds = bool | int | float | str  # that a hyperparameter can be
            settings = run.settings.items()
            plain = {k: v if isinstance(v, kinds) else json.dumps(v) for k, v in settings}
            lines = [f"| {key} | {value} |" for key, value in {**run.about, **plain}.items()]
            table = "\n".join(["| setting | value |", "|---|---|", *lines])
            self._write(text_pb("settings", table))
            self._write(hparams_pb(plain, trial_id=run.group))

    def log_epochs(self, rows: Sequence[EpochMetrics]) -> None:
        for row in rows:
            self._scalars(values_of(row), row.epoch)
        self._writer.flush()

    def log_result(self, scores: Mapping[str, float], figures: Mapping[str, Path]) -> None:
        """Write the scores as scalars, and the pictures as they are."""
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._scalars(scores, self.epochs)
        for name, path in figures.items():
            with Image.open(path) as picture:
                width, height = picture.size
            image = Summary.Image(
                width=width, height=height, colorspace=3, encoded_image_string=path.read_bytes()
            )
            value = Summary.Value(tag=f"figures/{name}", image=image)
            self._write(Summary(value=[value]), self.epochs)

    def close(self, status: Status) -> None:
        self._writer.close()

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=number) for name, number in values.items()]
        self._write(Summary(value=scalars), step)

    def _write(self, summary: Any, step: int = 0) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))
