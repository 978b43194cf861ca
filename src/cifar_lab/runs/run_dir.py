"""A run's folder: created from a config, locked by one process, emptied when asked to."""

import contextlib
import dataclasses
import os
import platform
import re
import time
from collections.abc import Iterator
from pathlib import Path

from cifar_lab.config import targets
from cifar_lab.config.identity import address, identity, identity_hash
from cifar_lab.config.run_config import RunConfig, dump, load
from cifar_lab.errors import Damaged, Unavailable, UsageError, first_line, log, shorten_path
from cifar_lab.runs import files
from cifar_lab.runs.run_files import RunFiles, second_name
from cifar_lab.runs.summary import RunSummary, Status, parse_summary, queued

_RESULT = re.compile(
    r"best\.pt|(metrics|steps)\.csv|(samples|features|predictions(_[a-z]+_[a-z]+)?)\.npz|"
    r"classification_report\.(txt|json)|errors\.html|trackers\.(json|log)|"
    r"tensorboard/events\.out\.tfevents\..+"
)
"""What a run has written, but for config.yaml, summary.json, train.log and its lock."""


class TakenOver(Unavailable):
    """Another process writes the folder of a run now."""


class RunDir(RunFiles):
    """The folder of one run: its config, files, status and lock; nothing about training."""

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        self._config: RunConfig | None = None
        self._mark: str | None = None  # what the lock file says, where the system has no locks

    @classmethod
    def create(
        cls, config: RunConfig, folder: Path | None = None, *, anew: bool = False
    ) -> "RunDir":
        """Create a run's folder, with status queued; None: at the address of its config.

        An existing folder keeps its results; settings that are not part of the address (figures,
        checkpoint_minutes, ...) are updated in its config.yaml. A run that is to train `anew` may
        change its number of threads, too.
        """
        run = cls(address(config) if folder is None else folder)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
            raise UsageError(  # a file is in its way, or it is in a folder such as /proc
                f"output_dir={config.output_dir} is wrong: {error.filename} cannot be a folder"
            ) from None
        if run.config_file.exists() and run.summary_file.exists():
            run._update_config(config, anew)
            return run
        with run.lock(patience=10):  # another process may be creating the same folder
            if not run.config_file.exists():
                run._write_config(config)
            if not run.summary_file.exists():
                run.write_summary(queued(config))
        return run

    def read_config(self) -> RunConfig:
        """Return the config in config.yaml, checked as strictly as a command line.

        This object reads the file once; one that `create` has made knows what it wrote.
        """
        if self._config is None:
            self._config = load(self.config_file)
            targets.look_in(self.path)
        return self._config

    def own_config(self) -> RunConfig:
        """Return the config; UsageError if it was edited into that of another run."""
        config = self.read_config()
        if self.holds_other_config(config):
            raise UsageError(
                f"{self.config_file} was edited: its settings are those of another run; restore "
                "them, or train the edited ones in a new folder: "
                f"python -m cifar_lab.train {self.path}"
            )
        return config

    def holds_other_config(self, config: RunConfig) -> bool:
        """Return whether a config.yaml is not the one that the folder was created for.

        summary.json has the hash of that one. Where old code wrote it, the folder's name tells; a
        folder without a hash in its name, such as a renamed one, belongs to the config in it.
        """
        summary = self._summary_if_whole()
        if summary is not None and summary.identity is not None:
            return summary.identity != identity_hash(config)
        digest = re.search(r"-[0-9a-f]{8}$", self.path.resolve().name)
        return digest is not None and digest[0] != f"-{identity_hash(config)}"

    def settle(self, config: RunConfig) -> None:
        """Write the config that a run has where it starts, in which `auto` has got a meaning.

        The folder stays where the config was addressed.
        """
        with self.lock():
            summary = dataclasses.replace(self.read_summary(), identity=identity_hash(config))
            self.write_summary(summary)  # first: if it ends here, the next start settles again
            self._write_config(config)

    def resumed_threads(self, config: RunConfig) -> int | None:
        """Return the number of threads to resume with; UsageError if the config asks otherwise."""
        before = self.read_summary().threads
        if before is None or config.threads in (None, before):
            return before or config.threads
        raise UsageError(
            f"threads={config.threads} is wrong: {self.path} was trained with {before}, another "
            f"number gives different weights; threads={before} resumes, rerun=true starts again"
        )

    def _update_config(self, config: RunConfig, anew: bool) -> None:
        stored = self.read_config()
        if config.threads is None:
            config = dataclasses.replace(config, threads=stored.threads)
        same_run = identity(stored) == identity(config)
        if not same_run or stored == config:  # an edited config is refused when the run starts
            return
        # A process that is running keeps the settings that it has read: then this does nothing.
        with contextlib.suppress(Unavailable), self.lock():
            if config.threads != stored.threads and self.last.exists() and not anew:
                self.resumed_threads(config)
            self._write_config(config)

    def _write_config(self, config: RunConfig) -> None:
        files.write_text(self.config_file, dump(config))
        self._config = config

    # --- the summary and the status -------------------------------------------------------------

    def read_summary(self) -> RunSummary:
        """Return summary.json; `running` reads as `interrupted` if no process holds the lock."""
        try:
            text = files.read_bytes(self.summary_file)
        except (OSError, ValueError) as error:  # a path that no file system takes is a ValueError
            why = getattr(error, "strerror", None) or error
            raise UsageError(
                f"{shorten_path(self.path)} is not a run folder: its summary.json "
                f"cannot be read ({why})"
            ) from None
        try:
            summary = parse_summary(text)
        except (ValueError, UsageError, RecursionError) as error:
            raise Damaged(
                f"{self.summary_file} is damaged ({first_line(error)}); rerun=true runs it again"
            ) from None
        # The system drops the lock of a process that ends in any way: no pid or time is compared.
        if summary.status == "running" and not self.is_locked():
            return dataclasses.replace(summary, status="interrupted")
        return summary

    @property
    def status(self) -> Status:
        """queued, running, interrupted, failed or finished."""
        return self.read_summary().status

    def class_names(self, count: int | None = None) -> list[str]:
        """Return the names of the classes in the order of the logits.

        These are the names for display, else the dataset's own, else those that the evaluation
        found with the images, else none. With a `count`, a class without a name gets its number.
        """
        dataset = self.read_config().dataset
        names = dataset.display_names or dataset.classes or []
        if not names and self.summary_file.exists():
            names = self.read_summary().class_names
        return [*names, *map(str, range(len(names), count or 0))][:count]

    # --- the lock -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self, patience: float = 0.5) -> Iterator[None]:
        """Hold the folder for this process, and tidy up what a killed process left in it.

        Raises Unavailable if another process still holds it after `patience` seconds, UsageError
        if something in it that is written in place is a link, which could lead anywhere.
        """
        written = [self.lock_file, self.log_file, self.metrics_file, self.steps_file]
        written += [self.trackers_log, self.trackers_lock, self.figures, self.tensorboard]
        for path in written:
            if path.is_symlink():
                raise UsageError(
                    f"{path} is a symbolic link; a run writes into its own folder only"
                )
        with files.open_for_appending(self.lock_file) as handle:
            deadline = time.monotonic() + patience
            while not (locked := files.try_lock(handle)):
                handle.seek(0)
                owner = handle.read(100).decode(errors="replace")
                if locked is None and not _lives(owner):
                    break
                if time.monotonic() > deadline:
                    owner = owner.strip() or "another process"
                    raise Unavailable(f"{self.path} is in use by {owner}; wait for it or stop it")
                time.sleep(0.05)
            mark = f"process {os.getpid()} on {platform.node()}"
            handle.truncate(0)
            handle.write(mark.encode())
            handle.flush()
            if locked is None:
                self._mark = mark
                log.warning(
                    "the file system of %s has no locks: let no second process train the same run",
                    self.lock_file,
                )
            for folder in (self.path, self.figures):
                for path in folder.glob(".*.tmp"):  # of processes that were killed
                    if re.search(r"\.([0-9a-f]{16}|\d+)\.tmp$", path.name):  # ours, old ones too
                        path.unlink(missing_ok=True)
            try:
                yield
            finally:
                if self._mark is not None and self._is_marked():
                    handle.truncate(0)
                self._mark = None

    def check_owner(self) -> None:
        """Raise TakenOver if another process has begun to write, as it can where no locks are."""
        if self._mark is not None and not self._is_marked():
            raise TakenOver(
                f"another process ({files.read_bytes(self.lock_file).decode()}) has begun to train "
                f"{self.path}, whose file system has no locks; it goes on, and this one ends"
            )

    def _is_marked(self) -> bool:
        return self.lock_file.exists() and files.read_bytes(self.lock_file).decode() == self._mark

    def is_locked(self) -> bool:
        """Whether a process holds the lock now; without locks, one of this machine."""
        try:
            with files.open_for_reading(self.lock_file) as handle:
                free = files.try_lock(handle, exclusive=False)
                return _lives(handle.read(100).decode()) if free is None else not free
        except OSError:
            return False

    # --- discarding -----------------------------------------------------------------------------

    def discard_results(self) -> None:
        """Remove what the run has written but for config, log and lock, and set it to queued.

        Other files in the folder stay. The checkpoints go first: a process that is killed on the
        way leaves either the old result or a run that starts from nothing.
        """
        config, summary = self.read_config(), self._summary_if_whole()
        names = {*config.figures, *(summary.figures if summary is not None else ())}
        own = {f"figures/{name}.png" for name in names}
        with contextlib.suppress(Damaged):  # the epochs tell the second names of best.pt
            own |= {str(second_name(config, row)) for row in self.read_metrics()}
        self.last.unlink(missing_ok=True)
        self.write_summary(queued(config))
        for path in sorted((*self.path.glob("*"), *self.path.glob("*/*"))):
            name = path.relative_to(self.path).as_posix()
            if path.is_file() and (name in own or _RESULT.fullmatch(name)):
                path.unlink()

    def _summary_if_whole(self) -> RunSummary | None:
        try:
            return self.read_summary()
        except (UsageError, Damaged):
            return None


def _lives(owner: str) -> bool:
    """Whether the process that a lock file names runs on this machine."""
    match = re.fullmatch(r"process (\d+) on (.*)", owner)
    if match is None or match[2] != platform.node():
        return False
    try:
        os.kill(int(match[1]), 0)
    except PermissionError:  # somebody else's
        return True
    except OSError:
        return False
    return True


def without_summaries(words: list[str]) -> list[str]:
    """Return words without the files of `summarize`, which FOLDER/* names beside the runs."""
    names = "summary.csv summary.md report.html grid.png curves.png effects.png"
    return [w for w in words if Path(w).name not in names.split() or not Path(w).is_file()]


def find_runs(folder: Path) -> list[RunDir]:
    """Return the run folders at and below `folder`, sorted by path; links are not followed.

    UsageError if `folder` is no folder.
    """
    if not folder.is_dir():
        raise UsageError(f"{shorten_path(folder)} is not a folder")
    runs: list[RunDir] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if {"config.yaml", "summary.json"} <= {*names}:
            runs.append(RunDir(parent))
            folders.clear()
    return runs
