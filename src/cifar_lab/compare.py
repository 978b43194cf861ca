"""Two runs or configurations side by side: configs, scores, and what their difference is worth."""

import shutil
import sys
from pathlib import Path

from cifar_lab import cli
from cifar_lab.analysis.comparison import compare
from cifar_lab.analysis.grouping import read_collection
from cifar_lab.analysis.load_runs import FoundRun
from cifar_lab.analysis.seed_groups import RunCollection
from cifar_lab.errors import UsageError, shorten_path
from cifar_lab.runs.run_dir import RunDir, find_runs, without_summaries


@cli.command
def main(argv: list[str]) -> int:
    """Run `python -m cifar_lab.compare A B`."""
    parser = cli.Parser("compare", __doc__)
    what = "a run folder, a folder of a configuration's runs, or KEY=VALUE,..."
    parser.add("a", what, metavar="A", type=cli.path)
    parser.add("b", "the same; differences are B - A", metavar="B", type=cli.path)
    where = "the folder in which KEY=VALUE chooses runs (default: the current one)"
    parser.add("--in", where, dest="folder", metavar="FOLDER", type=cli.path)
    arguments = parser.parse_args(without_summaries(argv))

    words = (str(arguments.a), str(arguments.b))
    chosen = any(map(_is_choice, words))
    if arguments.folder is not None and not chosen:
        raise UsageError("--in is for KEY=VALUE, and A and B are folders")
    sweep = read_collection(arguments.folder or Path()) if chosen else None
    sides = [_runs(word, sweep) for word in words]
    found = compare(*sides)
    for run in (*sides[0], *sides[1]):
        for problem in run.problems:
            print(f"warning: {run.run.path}: {problem}", file=sys.stderr)
    width = shutil.get_terminal_size((160, 24)).columns
    for name, word, runs in zip("AB", words, sides, strict=True):
        states = sorted({run.summary.status for run in runs})
        count = f"{len(runs)} runs, " * (len(runs) > 1)
        print(f"{name}: {shorten_path(Path(word))} ({count}{' and '.join(states)})")
    print(f"\n{found.text(width)}")
    return 0


def _is_choice(word: str) -> bool:
    return "=" in word and not Path(word).exists()


def _runs(word: str, sweep: RunCollection | None) -> list[FoundRun]:
    """Return the runs that a word names; UsageError if there are none."""
    if sweep is not None and _is_choice(word):
        return [run for group in sweep.select(word) for run in group.runs]
    folder = Path(word)
    runs = find_runs(folder) if folder.is_dir() else [RunDir(folder)]
    return [FoundRun(run) for run in runs or [RunDir(folder)]]


if __name__ == "__main__":
    raise SystemExit(main())
