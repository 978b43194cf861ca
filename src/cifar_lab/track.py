"""Send finished runs to a tracker: tracker=tensorboard, mlflow, wandb or trackio.

A run that the tracker has already is not sent again.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cifar_lab import cli
from cifar_lab.config.schema import TargetConfig
from cifar_lab.errors import RunFailed, Unavailable, UsageError, listing, shorten_path
from cifar_lab.runs.run_dir import RunDir, find_runs


@cli.command
def main(argv: list[str]) -> int:
    """Run `python -m cifar_lab.track FOLDER tracker=OPTION [tracker.KEY=VALUE ...]`."""
    parser = cli.Parser("track", __doc__)
    parser.usage = "%(prog)s FOLDER tracker=OPTION [tracker.KEY=VALUE ...] [options]"
    parser.add("words", "a run folder, or a folder of them; the tracker", nargs="*")
    follow = "send one run, also while it trains; without tracker=OPTION to that of its config"
    parser.add_flag("--follow", follow)
    arguments = parser.parse_intermixed_args(argv)
    takes = "tracker=OPTION and tracker.KEY=VALUE"
    folders, overrides = cli.folders_and_settings(arguments.words, "track", "tracker[.=]", takes)
    if len(folders) != 1:
        words = "python -m cifar_lab.track FOLDER tracker=mlflow"
        raise UsageError(f"track takes one folder, and {len(folders)} are named: {words}")

    target_config = None
    if overrides:
        from cifar_lab.config.compose import compose

        target_config = compose(overrides).runs[0].config.tracker
    if arguments.follow:  # a run that trains starts this as a process of its own
        target_config = target_config or RunDir(folders[0]).read_config().tracker
    if target_config is None:  # before a lock is written
        raise UsageError("track needs a tracker: add tracker=tensorboard, mlflow, wandb or trackio")
    if arguments.follow:
        _send(RunDir(folders[0]), target_config)
        return 0
    runs, problems = finished_runs(folders)
    for run in runs:
        try:
            with run.lock():
                _send(run, target_config, quiet=os.environ.get("CIFAR_LAB_DEBUG") != "1")
        except RunFailed as error:
            if run is runs[0]:
                raise Unavailable(str(error)) from None  # the others would fail as well
            problems.append(str(error))
    if problems:
        raise RunFailed(f"{len(problems)} of the runs were not sent, the first: {problems[0]}")
    return 0


def _send(run: RunDir, target_config: TargetConfig, *, quiet: bool = False) -> None:
    """Send a run, until it has ended, and say so; RunFailed if the tracker fails.

    `quiet` drops what the tracker's client prints.
    """
    from cifar_lab.trackers import build_tracker
    from cifar_lab.trackers.sending import follow, read_entry, redacted_output

    tracker = build_tracker(target_config)
    destination = tracker.destination(run.read_config().name)
    was_there = read_entry(run, destination).complete

    def give_up() -> None:
        restore()  # else the thread that passes on what is printed would end before it does
        print(
            f"cifar_lab: {shorten_path(run.path)} was not sent: the tracker gave no answer within "
            f"{tracker.wait_seconds:g} seconds (tracker.wait_seconds); what was sent stays there",
            file=sys.__stderr__,
            flush=True,
        )
        os._exit(Unavailable.exit_code)  # the client's threads would keep the process alive

    with contextlib.ExitStack() as stack:
        if quiet:
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        restore = stack.enter_context(redacted_output())
        entry = follow(run, tracker, give_up)
    if entry.problem is not None:
        raise RunFailed(f"{shorten_path(run.path)} was not sent: {entry.problem}")
    how = "was there already" if was_there else "sent"
    print(f"{run.path}: {how}" + (f", {entry.link}" if entry.link else ""), flush=True)


def finished_runs(folders: Sequence[Path]) -> tuple[list[RunDir], list[str]]:
    """Return the finished runs at and below folders, and what is wrong with those that are damaged.

    What is left out is printed. UsageError if there is none.
    """
    finished: list[RunDir] = []
    others: list[RunDir] = []
    problems: list[str] = []
    for run in (run for folder in folders for run in find_runs(folder)):
        try:
            (finished if run.status == "finished" else others).append(run)
        except (UsageError, RunFailed) as error:
            problems.append(str(error))
            print(f"left out: {error}", file=sys.stderr)
    if others:
        print(f"left out, not finished: {listing([run.path.name for run in others])}")
    if not finished:
        raise UsageError(f"{shorten_path(folders[0])} has no finished run")
    return finished, problems


if __name__ == "__main__":
    raise SystemExit(main())
