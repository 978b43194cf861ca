"""MLflow: a tracking server, a database or Databricks."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from cifar_lab.config.schema import wrong
from cifar_lab.errors import redact
from cifar_lab.runs.metrics import EpochMetrics
from cifar_lab.runs.summary import Status
from cifar_lab.trackers import Session, TrackedRun, Tracker, values_of

_KEY = "run_key"
_LONGEST_VALUE = 500  # characters of a parameter that every server of the last years takes
# The client waits 120 s for an answer and tries again 7 times, four minutes in all.
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_STATUS: dict[Status, str] = {"finished": "FINISHED", "failed": "FAILED"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLflow(Tracker):
    """Sends settings as parameters, epochs and scores as metrics, figures as artifacts.

    `uri`: the tracking server; None: MLFLOW_TRACKING_URI, else MLflow's default, ./mlflow.db.
    `experiment`: None: the run's `name`. `group`: a tag; None: the settings without the seed.
    """

    uri: str | None = None
    experiment: str | None = None
    group: str | None = None

    title: ClassVar[str] = "MLflow"
    package: ClassVar[str] = "mlflow"

    def __post_init__(self) -> None:
        """Refuse an address that MLflow would take for the name of a folder."""
        super().__post_init__()
        uri = self.uri
        if uri is not None and "://" not in uri and not uri.startswith(("file:", "databricks")):
            right = "an address such as http://localhost:5000 or sqlite:///mlflow.db"
            raise wrong("tracker.uri", uri, right)

    def destination(self, project: str) -> str:
        """Return the server and the experiment."""
        server = self.uri or os.environ.get("MLFLOW_TRACKING_URI") or "default store"
        return f"mlflow {server} {self.experiment or project}"

    def open(self, run: TrackedRun) -> Session:
        """Find the run by its key, else create it."""
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        return _Session(self, run)


class _Session(Session):
    def __init__(self, tracker: MLflow, run: TrackedRun) -> None:
        import mlflow
        from mlflow.entities import Param

        self._run = run
        if tracker.uri is not None:
            mlflow.set_tracking_uri(tracker.uri)
        # Made if it is not there; another run of the sweep may do so at the same moment.
        experiment = mlflow.set_experiment(tracker.experiment or run.project).experiment_id
        self._client = mlflow.MlflowClient()
        earlier = self._client.search_runs([experiment], f"tags.`{_KEY}` = '{run.key}'")
        group = tracker.group or run.group
        tags = {_KEY: run.key, "group": group, "mlflow.source.name": "cifar_lab", **run.about}
        create = self._client.create_run
        mine = earlier[0] if earlier else create(experiment, tags=tags, run_name=run.name)
        self._id = mine.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        self._client.set_tag(self._id, "folder", run.about["folder"])
        history = self._client.get_metric_history(self._id, "train_loss") if earlier else []
        self.epochs = max((metric.step for metric in history), default=0)
        sent = mine.data.params  # MLflow refuses another value for one that is there
        new = {k: str(v)[:_LONGEST_VALUE] for k, v in run.settings.items() if k not in sent}
        self._client.log_batch(self._id, params=[Param(k, text) for k, text in new.items()])
        server = tracker.uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
        if server.startswith("http"):
            page = f"{redact(server).rstrip('/')}/#/experiments/{experiment}"
            self.link = f"{page}/runs/{self._id}"

    def log_epochs(self, rows: Sequence[EpochMetrics]) -> None:
        """Send the columns of metrics.csv as metrics, timed by the ends of the epochs."""
        from mlflow.entities import Metric

        ended = (self._run.folder / "metrics.csv").stat().st_mtime
        metrics = []
        for row in reversed(rows):
            when = int(1000 * ended)
            metrics += [Metric(name, n, when, row.epoch) for name, n in values_of(row).items()]
            ended -= row.seconds
        self._client.log_batch(self._id, metrics=metrics)

    def log_result(self, scores: Mapping[str, float], figures: Mapping[str, Path]) -> None:
        """Send the scores as metrics and the figures as artifacts."""
        from mlflow.entities import Metric

        when = int(1000 * (self._run.folder / "summary.json").stat().st_mtime)
        metrics = [Metric(name, number, when, self.epochs) for name, number in scores.items()]
        self._client.log_batch(self._id, metrics=metrics)
        for path in figures.values():
            self._client.log_artifact(self._id, str(path), "figures")

    def close(self, status: Status) -> None:
        self._client.set_terminated(self._id, _STATUS.get(status, "KILLED"))
