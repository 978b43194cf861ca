"""The Python API: what the commands do, as functions that return runs and raise errors."""

import base64
import contextlib
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_lab.analysis.comparison import Comparison, compare
from cifar_lab.analysis.grouping import collect_folders
from cifar_lab.analysis.seed_groups import RunCollection
from cifar_lab.analysis.summary import Summary, summary_of
from cifar_lab.config import targets
from cifar_lab.config.launch import Request, check_launch, launched
from cifar_lab.config.run_config import RunConfig
from cifar_lab.datasets.pictures import Pictures
from cifar_lab.errors import Damaged, Stopped, UsageError, printable, shorten
from cifar_lab.runs.metrics import Probabilities, epoch_columns
from cifar_lab.runs.run_dir import RunDir, find_runs
from cifar_lab.runs.summary import RunSummary, Status
from cifar_lab.runs.text import Table
from cifar_lab.training.ambient import as_in_a_fresh_process

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from cifar_lab.training.loop import Stop


@dataclass(frozen=True)
class Run:
    """A run's folder. What it returns is read from the files anew each time, finished or not."""

    path: Path

    def __init__(self, path: Path | str) -> None:
        try:
            object.__setattr__(self, "path", Path(path).absolute())  # after os.chdir too
        except TypeError:
            raise UsageError(f"{shorten(repr(path), 60)} is wrong: it must be a path") from None

    def __repr__(self) -> str:
        return f"<Run {printable(self.path.name)}: {self._state()}>"

    def _state(self) -> str:
        try:
            summary = self.summary
        except (Damaged, UsageError):
            return "its summary.json cannot be read"
        text: str = summary.status
        if summary.epochs:
            text += f", {summary.epochs} epochs"
        if summary.best_val_accuracy is not None:
            text += f", best validation accuracy {summary.best_val_accuracy:.2%}"
        if summary.test_accuracy is not None:
            text += f", test accuracy {summary.test_accuracy:.2%}"
        return text

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the state and the curves."""
        shown = f"<b>{escape(self.path.name)}</b>: {escape(self._state())}"
        picture = RunDir(self.path).figures / "curves.png"
        if picture.is_file():
            data = base64.b64encode(picture.read_bytes()).decode("ascii")
            shown += f'<br><img alt="curves" width="100%" src="data:image/png;base64,{data}">'
        return shown

    @property
    def figures(self) -> "dict[str, Figure]":
        """The figures that the config names, drawn anew by matplotlib from the files."""
        run = RunDir(self.path)
        return {
            name: targets.build(figure, f"figures.{name}", run=run)
            for name, figure in run.read_config().figures.items()
            if figure
        }

    @property
    def status(self) -> Status:
        """queued, running, interrupted, failed or finished."""
        return self.summary.status

    @property
    def config(self) -> RunConfig:
        """All settings: config.yaml."""
        return RunDir(self.path).read_config()

    @property
    def summary(self) -> RunSummary:
        """The result: summary.json. Accuracies are fractions, losses means per image."""
        return RunDir(self.path).read_summary()

    @property
    def metrics(self) -> dict[str, list[float | None]]:
        """The columns of metrics.csv, one value per epoch, None where there is none."""
        rows = RunDir(self.path).read_metrics()
        return {name: [getattr(row, name) for row in rows] for name in epoch_columns(rows)}

    @as_in_a_fresh_process()
    def load_model(self, *, device: str = "cpu") -> "nn.Module":
        """Return the model in evaluation mode, with the weights that the run was scored with.

        It takes images that are normalised with the dataset's mean and std; `predict` does that
        itself. UsageError if there are no weights yet.
        """
        from cifar_lab.training import scoring
        from cifar_lab.training.device import select_device

        return scoring.load_model(RunDir(self.path), device=select_device(str(device)))

    @as_in_a_fresh_process()
    def predict(self, images: Pictures, *, device: str = "auto") -> Probabilities:
        """Return the probability of each class for each image, (N, classes).

        `images` are paths, PIL images and uint8 arrays of any size, or one array of them all: (N,
        H, W) or (N, H, W, C). They are fitted to the model's image size as in dataset=image_folder.
        UsageError for the first image that cannot be used.
        """
        from cifar_lab.training.scoring import probabilities

        return probabilities(RunDir(self.path), images, device=str(device))


class Runs(list[Run]):
    """Runs in a list, with what `summarize` and `compare` say of them; nothing is written.

    Those of the same classes, such as the seeds or folds of a setting, are one classifier together:
    the mean of their probabilities.
    """

    @property
    def test_accuracy(self) -> float:
        """The accuracy of their mean probabilities, from the predictions that they stored.

        UsageError for runs that were tested on different images.
        """
        from cifar_lab.analysis import ensembles

        members = [RunDir(run.path) for run in self]
        ensembles.check_members(members, same_test_set=True)
        return ensembles.mean_predictions(members).accuracy

    @as_in_a_fresh_process()
    def predict(self, images: Pictures, *, device: str = "auto") -> Probabilities:
        """Return the mean probability of each class for each image, (N, classes): `Run.predict`."""
        from cifar_lab.analysis.ensembles import mean_probabilities

        members = [RunDir(run.path) for run in self]
        return mean_probabilities(members, images, device=str(device))

    def summarize(
        self, *, metric: str | None = None, baseline: str | None = None, test: bool = False
    ) -> Summary:
        """Return the ranking with its intervals and effects: `.table`, `.figure("effects")`.

        `metric` ranks instead of the monitored score, `baseline` ("optimizer=sgd") stands in place
        of the best, and `test` shows the test score of every configuration.
        """
        metric, baseline = (text and str(text) for text in (metric, baseline))
        return summary_of(self._collect(), metric=metric, baseline=baseline, test=test)

    def compare(self, a: str, b: str) -> Comparison:
        """Return two configurations, or halves of a sweep, side by side: `.table`, `.differences`.

        `a` and `b` choose runs, as "optimizer=adam" and "optimizer=sgd"; differences are b - a.
        """
        collection = self._collect()
        sides = [[run for g in collection.select(str(x)) for run in g.runs] for x in (a, b)]
        return compare(*sides)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: a row for each run."""
        return Table(("run", "state"), [(run.path.name, run._state()) for run in self]).html()

    def _collect(self) -> RunCollection:
        if not self:
            raise UsageError("there are no runs to compare")
        return collect_folders([run.path for run in self])


@as_in_a_fresh_process()
def run(*overrides: str, **settings: Any) -> Run:
    """Train and evaluate one run, resume it, or find it finished; return it.

    `overrides` are the words of `python -m cifar_lab.train`, `settings` the same as keyword
    arguments: `epochs=5, lr=0.01, optimizer="sgd", training__patience=3`. `model` may also be an
    nn.Module class, of a notebook too, or an instance, which is built anew with the run's own
    weights; its arguments are `model__width=64`. `dataset` may also be (images, labels), with
    (test_images, test_labels) behind them, or a torch Dataset, or two.

    A kernel interrupt (Ctrl-C) saves the run and raises KeyboardInterrupt; the same call resumes
    it. Raises UsageError, Unavailable or RunFailed where the command ends with exit code 2, 3 or 1.
    What a program has set in torch (autocast, default dtype, ...) changes no result; of two threads
    that call it, one waits.
    """
    if settings:
        from cifar_lab.objects import check_instance, keep_source, words_of

        overrides = (*overrides, *words_of(settings))
    request = _compose(overrides, "run")
    if settings:
        check_instance(settings.get("model"), request.runs[0].config)
    from cifar_lab.training.run import open_run, run_experiment

    with _stopping() as stop:
        if request.runs_elsewhere:  # one job of a cluster
            return _run_many(request, stop)[0]
        opened, options = open_run(request), request.options
        if settings:
            keep_source(overrides, opened.path)
        run_experiment(opened, stop=stop, rerun=options.rerun, accept_code=options.accept_code)
        return Run(opened.path)


def sweep(*overrides: str) -> Runs:
    """Run all combinations of the listed values, each in its own process; return their runs.

    It is `python -m cifar_lab.train -m` with these words. All runs are tried before an error is
    raised; those that succeeded are in their folders, and the same call runs the others.
    """
    request = _compose(("-m", *overrides), "sweep")
    with _stopping() as stop:
        return _run_many(request, stop)


def _run_many(request: Request, stop: "Stop") -> Runs:
    from cifar_lab.sweeps.outcome import raise_for
    from cifar_lab.sweeps.search import start_many

    outcomes = start_many(request, stop)
    raise_for(outcomes, stop)
    return Runs(Run(outcome.cell.run.path) for outcome in outcomes)


def compose(*overrides: str) -> RunConfig:
    """Return the complete, checked config of one run, and run nothing."""
    return _compose(overrides, "compose").runs[0].config


def load_run(path: Path | str, *, trust: str | Sequence[str] = ()) -> Run:
    """Return the run in a folder; `trust` names modules of your own that its config uses.

    UsageError if the folder is not a run's.
    """
    targets.trust(trust)
    run = Run(path)
    RunDir(run.path).read_summary()
    return run


def load_runs(folder: Path | str, *, trust: str | Sequence[str] = ()) -> Runs:
    """Return the runs at and below a folder, sorted by path; UsageError if it is not a folder."""
    targets.trust(trust)
    return Runs(Run(run_dir.path) for run_dir in find_runs(Run(folder).path))


@as_in_a_fresh_process()
def _compose(words: Sequence[str], function: str) -> Request:
    """Return the checked request of a call; refuse what is for the command line only."""
    for word in words:
        if not isinstance(word, str):
            raise UsageError(
                f"cifar_lab.{function} takes words such as 'optimizer.lr=0.1', and "
                f"{shorten(repr(word), 40)} is of type {type(word).__name__}"
            )
    asked = {"-h", "--help", "--version", "-sc", "--shell-completion", "--cfg", "-c"} & set(words)
    if asked:
        raise UsageError(f"{asked.pop()} is for the command line: python -m cifar_lab.train")
    if function != "compose" and launched() is not None:
        raise UsageError(f"cifar_lab.{function} is for one process; torchrun is for the command")
    from cifar_lab.training.preflight import compose_checked

    request = compose_checked(words)
    if request.options.plan:
        raise UsageError("plan=true is for the command line; cifar_lab.compose runs nothing either")
    if function != "sweep" and (len(request.runs) != 1 or request.space):
        raise UsageError(
            f"cifar_lab.{function} is for one run, and these are {len(request.runs)}; "
            "use cifar_lab.sweep"
        )
    check_launch(request)
    return request


@contextlib.contextmanager
def _stopping() -> "Iterator[Stop]":
    """Save what runs on a signal; then do with the signal what Python would have done."""
    from cifar_lab.training.loop import Stop

    try:
        with Stop().installed() as stop:
            yield stop
    except Stopped as stopped:
        if stopped.signal == signal.SIGINT:
            raise KeyboardInterrupt(str(stopped)) from None
        signal.raise_signal(stopped.signal)  # to the handler that was there before
        raise
