"""trackers.json: which run at which tracker a folder is, so that it goes on there."""

import dataclasses
import json
import secrets
from dataclasses import dataclass

from cifar_lab.config.schema import parse_as
from cifar_lab.errors import Damaged, UsageError, first_line
from cifar_lab.runs.files import read_bytes, write_text
from cifar_lab.runs.run_dir import RunDir


@dataclass(frozen=True)
class Entry:
    """A run at a tracker: its key there, the epochs that were sent, whether the result was.

    `link` is the address of its page, `problem` why the last attempt to send something failed.
    """

    key: str
    epochs: int = 0
    complete: bool = False
    link: str | None = None
    problem: str | None = None


def read_entry(run: RunDir, destination: str) -> Entry:
    """Return what is known of a run at a destination; one with a new key, if nothing is."""
    return _read(run).get(destination) or Entry(secrets.token_hex(6))


def write_entry(run: RunDir, destination: str, entry: Entry | None) -> None:
    """Note the state of a run at a destination; None: it is not known there."""
    entries = {name: other for name, other in _read(run).items() if name != destination}
    if entry is not None:
        entries[destination] = entry
    content = {name: dataclasses.asdict(entry) for name, entry in entries.items()}
    write_text(run.trackers_file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _read(run: RunDir) -> dict[str, Entry]:
    try:
        content = json.loads(read_bytes(run.trackers_file))
        return {str(name): parse_as(Entry, entry, "") for name, entry in dict(content).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, UsageError, RecursionError) as error:
        raise Damaged(
            f"{run.trackers_file} is damaged ({first_line(error)}); without it, the run is sent as "
            "a new one"
        ) from None
