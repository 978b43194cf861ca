"""The process that sends runs to a tracker: `python -m cifar_lab.trackers.child SPECIFICATION`.

The clients of trackers print, wait and try again for minutes, draw random numbers, start threads
that delay the end of Python, and may crash. Here none of it can touch a run that trains.

A line on standard input is a run folder that has something new; each is answered by a report in
JSON on standard output. The end of the input is the end of the run.
"""

import contextlib
import dataclasses
import json
import os
import queue
import sys
import threading

from cifar_lab.config import targets
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.trackers import build_tracker
from cifar_lab.trackers.sending import Report, Sender


def main() -> None:
    """Send folders until the input ends."""
    specification = json.loads(sys.argv[1])
    answers = os.dup(1)
    os.dup2(2, 1)  # what the clients print goes to the log
    targets.trust(specification["trust"])
    tracker = build_tracker(specification["tracker"])
    folders: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(folders, tracker.wait_seconds), daemon=True).start()
    sender, current = None, None
    while (folder := folders.get()) is not None:
        if sender is None or folder != current:
            sender, current = Sender(RunDir(folder), tracker, live=specification["live"]), folder
        _answer(answers, sender.update(last=not specification["live"]))
    if sender is not None and specification["live"]:
        _answer(answers, sender.update(last=True))
    os.close(answers)


def _listen(folders: "queue.SimpleQueue[str | None]", patience: float) -> None:
    """Pass on what is asked; after the end, let the process live `patience` seconds at most.

    That matters where nobody is left to end it, because the run was killed.
    """
    with open(0, encoding="utf-8", closefd=False) as lines:
        for line in lines:
            folders.put(line.rstrip("\n"))
    folders.put(None)
    timer = threading.Timer(patience, os._exit, args=(1,))
    timer.daemon = True
    timer.start()


def _answer(descriptor: int, report: Report) -> None:
    with contextlib.suppress(BrokenPipeError):  # the run was killed: nobody listens any more
        os.write(descriptor, json.dumps(dataclasses.asdict(report)).encode() + b"\n")


if __name__ == "__main__":
    main()
