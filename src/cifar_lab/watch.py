"""Follow the runs below a folder while they train: how far, the best so far, the time left.

Only files are read, so that it works for runs of any terminal and of a cluster alike.
"""

import shutil
import sys
import time
from pathlib import Path

from cifar_lab import cli
from cifar_lab.analysis.watching import LiveServer, Watcher, table
from cifar_lab.errors import UsageError, is_terminal, shorten_path

_SECONDS = 2.0


@cli.command
def main(argv: list[str]) -> int:
    """Run `python -m cifar_lab.watch FOLDER [--serve PORT] [--once]`."""
    parser = cli.Parser("watch", __doc__)
    parser.add("folder", "a run folder, or a folder of them", type=cli.path)
    parser.add_flag("--once", "print the table, and end")
    parser.add_number("--serve", "show the summary page at this port (0: any)", 0, 65535)
    parser.add("--host", "0.0.0.0 lets other machines read it, too", default="127.0.0.1")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder

    watcher = Watcher(folder)
    if not watcher.look():
        raise UsageError(f"{shorten_path(folder)} holds no run yet")
    if arguments.serve is not None:
        with LiveServer(watcher, arguments.host, arguments.serve) as server:
            print(f"{server.address} shows {folder} until Ctrl-C", flush=True)
            server.serve_forever()
        return 0
    before, live = "", is_terminal(sys.stdout) and not arguments.once
    while True:
        runs = watcher.look()
        size = shutil.get_terminal_size((100, 40))
        text = table(runs, size.columns, size.lines - 5 if live else None)
        going = any(run.status in ("running", "queued") for run in runs)
        headline = text.partition("\n")[0]
        if live or not before or not going:
            print("\x1b[H\x1b[2J" * live, end="", file=sys.__stdout__)  # sys.stdout escapes it
            print(text, flush=True)
        elif headline != before:
            print(headline, flush=True)
        if arguments.once or not going:
            return 0
        before = headline
        time.sleep(_SECONDS)


if __name__ == "__main__":
    raise SystemExit(main())
