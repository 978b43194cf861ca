"""Send finished runs to a tracker: tracker=tensorboard, mlflow, wandb or trackio.

A run that the tracker has already is not sent again.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_lab import cli
from cifar_lab.errors import RunFailed, Unavailable, UsageError, listing, shorten, shorten_path

if TYPE_CHECKING:
    from cifar_lab.config.schema import TargetConfig
    from cifar_lab.runs.run_dir import RunDir
    from cifar_lab.trackers.process import TrackerProcess


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m cifar_lab.track FOLDER tracker=OPTION [tracker.KEY=VALUE ...]`."""
    return cli.run(_track, argv)


def _track(argv: list[str]) -> int:
    parser = cli.Parser("track", __doc__)
    parser.usage = "%(prog)s FOLDER tracker=OPTION [tracker.KEY=VALUE ...] [options]"
    parser.add_argument("words", nargs="*", help="a run folder, or a folder of them; the tracker")
    parser.add_argument(
        "--again", action="store_true", help="send as new runs what the tracker has lost"
    )
    parser.add_trust()
    arguments = parser.parse_args(argv)
    folders = [word for word in arguments.words if "=" not in word]
    overrides = [word for word in arguments.words if "=" in word]
    if len(folders) != 1:
        raise UsageError(
            f"track takes one folder, and {len(folders)} are named: python -m cifar_lab.track "
            "FOLDER tracker=mlflow"
        )
    from cifar_lab.config import targets

    targets.trust(arguments.trust)
    target_config = _tracker(overrides)

    from cifar_lab.runs.run_dir import find_runs
    from cifar_lab.trackers import build_tracker

    tracker = build_tracker(target_config)
    runs, problems = _finished(find_runs(Path(folders[0])))
    if not runs:
        raise UsageError(f"{shorten_path(Path(folders[0]))} has no finished run")
    if arguments.again:
        from cifar_lab.trackers.record import forget

        for run in runs:
            with run.lock():
                forget(run, tracker.destination(run.read_config().name))
    failed = problems + _send(target_config, runs, tracker.wait_seconds)
    if failed:
        raise RunFailed(f"{len(failed)} of the runs were not sent, the first: {failed[0]}")
    return 0


def _tracker(overrides: Sequence[str]) -> "TargetConfig":
    """Return the tracker that the overrides choose; UsageError for anything else."""
    for word in overrides:
        if word.partition("=")[0].split(".")[0].lstrip("+~") != "tracker":
            raise UsageError(
                f"{shorten(word)} is not for track: settings are those of the runs; it takes "
                "tracker=OPTION and tracker.KEY=VALUE"
            )
    from cifar_lab.config.compose import compose

    config = compose(overrides).runs[0].config
    if config.tracker is None:
        raise UsageError("track needs a tracker: add tracker=tensorboard, mlflow, wandb or trackio")
    return config.tracker


def _finished(runs: "Sequence[RunDir]") -> "tuple[list[RunDir], list[str]]":
    """Return the finished runs, and what is wrong with those that cannot be read."""
    finished: list[RunDir] = []
    others: list[RunDir] = []
    problems: list[str] = []
    for run in runs:
        try:
            (finished if run.status == "finished" else others).append(run)
        except (UsageError, RunFailed) as error:
            problems.append(str(error))
            print(f"left out: {error}", file=sys.stderr)
    if others:
        print(f"left out, not finished: {listing([run.path.name for run in others])}")
    return finished, problems


def _send(target_config: "TargetConfig", runs: "Sequence[RunDir]", patience: float) -> list[str]:
    """Send runs one after the other; return what went wrong with some.

    Raises Unavailable if the first that is tried fails, since the others will fail as well, or if
    the tracker does not answer.
    """
    from cifar_lab.trackers.process import TrackerProcess

    debug = os.environ.get("CIFAR_LAB_DEBUG") == "1"
    process = TrackerProcess(target_config, live=False, output=2 if debug else subprocess.DEVNULL)
    problems = []
    try:
        for run in runs:
            with run.lock():
                problem = _send_one(process, run, patience)
            if problem is not None and run is runs[0]:
                raise Unavailable(problem)
            problems += [problem] if problem is not None else []
    finally:
        process.end(1)
    return problems


def _send_one(process: "TrackerProcess", run: "RunDir", patience: float) -> str | None:
    """Send one run and say so; return what went wrong."""
    process.ask(run.path)
    report = process.report(patience)
    if report is None:
        raise Unavailable(
            f"{shorten_path(run.path)} was not sent: the tracker gave no answer within "
            f"{patience:g} seconds (tracker.wait_seconds); what was sent stays there"
        )
    if report.problem is not None:
        return f"{shorten_path(run.path)} was not sent: {report.problem}"
    how = "sent" if report.is_new else "was there already"
    print(f"{run.path}: {how}" + (f", {report.link}" if report.link else ""), flush=True)
    return None


if __name__ == "__main__":
    sys.exit(main())
