"""One main for all commands: an exception becomes one line on standard error and an exit code."""

import argparse
import contextlib
import errno
import functools
import io
import logging
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

from cifar_lab.config import targets
from cifar_lab.config.command_line import StrictParser
from cifar_lab.config.launch import launched
from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import (
    CommandError,
    Stopped,
    UsageError,
    closest,
    first_line,
    log,
    printable,
    redact,
    shorten,
    shorten_path,
)
from cifar_lab.version import __version__

LONGEST_MESSAGE = 300  # characters of the line that says why a command ended

NOT_TOGETHER = "torchrun is for one run of the command train; start whatever else without it"


class Parser(StrictParser):
    """The argument parser of every command but `train`.

    `takes_overrides`: the command takes GROUP=OPTION and KEY=VALUE too, before, between and after
    its own options. `parse_known_args` returns them for `compose`, which checks them.
    """

    def __init__(self, command: str, description: str, *, takes_overrides: bool = False) -> None:
        plain = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=f"python -m cifar_lab.{command}",
            description=description,
            # with line breaks, as wide on every terminal
            formatter_class=functools.partial(plain, max_help_position=28, width=100),
            allow_abbrev=False,
        )
        self.color = False  # Python 3.14 colours help, which `_Output` would show as escapes
        # `run` answers it, for all commands.
        self.add_argument("--version", action="store_true", help="print the versions and exit")
        self._takes_overrides = takes_overrides
        if takes_overrides:
            self.usage = "%(prog)s [GROUP=OPTION ...] [KEY=VALUE ...] [options]"
            self.epilog = (
                "GROUP=OPTION and KEY=VALUE are those of python -m cifar_lab.train: see its "
                "--help.\n--cfg job prints the config that they make, and nothing runs."
            )
        else:
            trust = "a module of your own that a run's config names; also trust=MODULE"
            self.add_argument("--trust", type=targets.trust, metavar="MODULE", help=trust)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as argparse does; trust=M is --trust M, unless `compose` reads it."""
        words = list(sys.argv[1:] if args is None else args)
        if not self._takes_overrides:
            words = [f"--{word}" if word.startswith("trust=") else word for word in words]
        parsed, rest = super().parse_known_args(words, namespace)
        for word in (word for word in rest if word.startswith("--")):
            guess = closest(word, re.findall(r"--[\w-]+", self.format_help()), 0.8)
            if guess not in ("", word):
                self.error(f"there is no option {shorten(word)} (did you mean {guess}?)")
        return parsed, rest

    def add(self, option: str, help: str, **how: Any) -> None:
        """Add an argument or an option, with what argparse knows of how it is read."""
        self.add_argument(option, help=help, **how)

    def add_number(
        self, option: str, help: str, low: float, high: float, default: float | None = None
    ) -> None:
        """Add an option whose value is a number from `low` to `high`, of the type of `low`."""

        def parse(text: str) -> float:
            with contextlib.suppress(ValueError):
                if low <= (number := type(low)(text)) <= high:
                    return number
            wrong = f"{option} {shorten(text)} is wrong"
            raise UsageError(f"{wrong}: it must be from {low:,} to {high:,}")

        self.add_argument(option, type=parse, default=default, metavar="N", help=help)

    def add_flag(self, option: str, help: str) -> None:
        """Add an option without a value."""
        self.add_argument(option, action="store_true", help=help)

    def add_output(self, option: str, help: str, *suffixes: str, **kind: bool) -> None:
        """Add an option that names a file or folder to write: `check_output` takes `kind`."""
        of_folder = kind.get("is_folder", False)

        def parse(text: str) -> Path:
            place = path(text) if of_folder else Path(text)
            check_output(option, place, suffixes, **kind)
            return place

        metavar = "FOLDER" if of_folder else "FILE"
        self.add_argument(option, type=parse, metavar=metavar, help=help)


def command(function: Callable[[list[str]], int]) -> Callable[..., int]:
    """Return a command's `main`: `run` of what takes the words, by default those of the process."""

    @functools.wraps(function)
    def main(argv: Sequence[str] | None = None) -> int:
        return run(function, argv)

    return main


def run(
    command: Callable[[list[str]], int],
    argv: Sequence[str] | None = None,
    *,
    trains: bool = False,
    distributed: bool = False,
) -> int:
    """Run a command; return its exit code: 0, 1, 2, 3, or 128 and the number of a signal.

    If it `trains`, output that cannot be written (a closed pipe or terminal, a full disk) is
    dropped: the runs are worth more than the lines about them. Otherwise it ends the command.
    One that is not `distributed` is refused in the processes of torchrun, of which the first one
    prints what is wrong; the others would end it too early by an exit code of their own.
    """
    place = launched()
    if place is not None and not distributed:
        return _say(UsageError(NOT_TOGETHER), 2) if place.rank == 0 else 0
    show_log(silent=place is not None and place.rank > 0)
    arguments = list(sys.argv[1:] if argv is None else argv)
    with _standard_streams(drop_output=trains), warnings.catch_warnings():
        # A library's warning is one line, too, without the line of its source.
        warnings.showwarning = _show_warning
        try:
            if "--version" in arguments:
                from importlib.metadata import version

                torch, hydra = version("torch"), version("hydra-core")  # neither is imported
                print(f"cifar_lab {__version__}, torch {torch}, Hydra {hydra}", flush=True)
                return 0
            code = command(arguments)
            sys.stdout.flush()
            return code
        except SystemExit as finished:  # argparse has printed a help page
            return int(finished.code or 0)
        except Stopped as stopped:
            return _say(stopped, 128 + stopped.signal)
        except KeyboardInterrupt as error:
            return _say(error, 130, "stopped")
        except CommandError as error:
            return _say(error, error.exit_code)
        except BrokenPipeError:
            return 1
        except OSError as error:
            return _say(error, *_explain(error))
        except Exception as error:  # a fault of ours, or what nobody was expected to do
            named = f"{type(error).__name__}: {first_line(error)}"
            return _say(error, 1, f"{named} (CIFAR_LAB_DEBUG=1 shows where)")


@contextlib.contextmanager
def _standard_streams(*, drop_output: bool) -> Iterator[None]:
    """Replace standard streams that could end a command by themselves.

    A closed or missing stream (a service, pythonw) writes to nowhere, and a character that the
    terminal's encoding lacks is shown as a question mark. What standard error cannot take is
    dropped, and with `drop_output` what standard output cannot take too.
    """
    out = cast("TextIO", _Output(sys.stdout, drop=drop_output))
    err = cast("TextIO", _Output(sys.stderr, drop=True))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield
        finally:
            for stream in (out, err):
                with contextlib.suppress(Exception):  # a failure ended the command already
                    stream.flush()


class _Output:
    """A text stream without passwords. Once it fails, it discards the rest, or raises."""

    def __init__(self, stream: TextIO | None, *, drop: bool) -> None:
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
        self._stream = stream
        self._drop = drop

    def write(self, text: str) -> int:
        """Write a text, what would move the cursor as escapes; return its length."""
        self._do("write", redact(re.sub(r"[^\n\r\t]+", lambda part: printable(part[0]), text)))
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, if the stream has a buffer (loggers in its place have none)."""
        self._do("flush")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _do(self, method: str, *arguments: str) -> None:
        try:
            getattr(self._stream, method, lambda *_: None)(*arguments)
        except Exception as error:  # closed, full, or no stream of text
            with contextlib.suppress(OSError, ValueError, AttributeError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())  # for what is buffered and still to come
                os.close(nowhere)
            if not self._drop:
                if isinstance(error, OSError):
                    error.filename = "standard output"
                raise


def path(text: str) -> Path:
    """Return an argument as a path, for argparse; an empty one, of a variable not set, is wrong."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name of a file or folder is empty")
    return Path(text)


def folders_and_settings(
    words: Sequence[str], command: str, keys: str, takes: str
) -> tuple[list[Path], list[str]]:
    """Divide words into folders and KEY=VALUE; UsageError for a KEY that is none of `keys`.

    `keys` is a regular expression for its beginning, and `takes` says what it means.
    """
    settings = [word for word in words if "=" in word and not Path(word).is_dir()]
    for word in settings:
        if not re.match(rf"[+~]*({keys})", word):
            raise UsageError(f"{shorten(word)} is not for {command}: it takes {takes}")
    return [Path(word) for word in words if word not in settings], settings


def check_output(
    option: str,
    path: Path,
    suffixes: Sequence[str] = (),
    *,
    creates_folder: bool = False,
    is_folder: bool = False,
) -> None:
    """UsageError if `path`, the value of `option`, cannot be written; nothing is written.

    `creates_folder`: the folders above a file are created when it is written, as those of a folder.
    """
    if path == Path() and not is_folder:
        raise UsageError(f"{option} needs the name of a file")
    text = f"{option} {shorten_path(path)}"
    if suffixes and path.suffix.lower() not in suffixes:
        raise UsageError(f"{text} is wrong: the name must end with {' or '.join(suffixes)}")
    if path.exists() and not (path.is_dir() if is_folder else path.is_file()):
        kind = "a folder" if path.is_dir() else "a file" if is_folder else "no file"
        raise UsageError(f"{text} is wrong: it is {kind}")
    folder = path if is_folder else path.parent
    while (creates_folder or is_folder) and not folder.exists():
        folder = folder.parent
    where = shorten_path(folder)
    if not folder.is_dir():
        raise UsageError(f"{text} cannot be written: there is no folder {where}")
    try:  # os.access says yes to root in folders such as /proc
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        raise UsageError(f"{text} cannot be written: {where} is not yours to write to") from None


def one_run(words: Sequence[str], purpose: str) -> RunConfig | None:
    """Return the checked config of a command that is for one run; None if it was to be shown.

    `purpose`: what the command does with a run, for the UsageError where the words mean several.
    """
    from cifar_lab.training.preflight import compose_checked

    request = compose_checked(words)
    if request.shown is not None:
        print(request.shown)
        return None
    if len(request.runs) != 1 or request.options.plan:
        number = "a plan" if request.options.plan else len(request.runs)
        raise UsageError(f"{purpose} is of one run, but this is {number}")
    return request.runs[0].config


def show_log(*, silent: bool = False) -> None:
    """Let the package's log reach standard output as plain lines, once, or nothing if `silent`."""
    log.setLevel(logging.INFO)
    log.propagate = False
    if not any(isinstance(handler, _Console) for handler in log.handlers):
        log.addHandler(logging.NullHandler() if silent else _Console())


class _Console(logging.Handler):
    """Writes above a progress bar, never through it; finds sys.stdout anew for each line."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        if isinstance(stream, _Output):  # else the command has ended, and a function is called
            tqdm.write(self.format(record), file=stream)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {shorten(' '.join(str(message).split()), 200)}", file=sys.stderr)


def _explain(error: OSError) -> tuple[int, str]:
    where = str(error.filename or "the output folder")
    if error.errno == errno.ENOSPC:
        return 1, f"the disk is full at {where}; free some space and run the same line again"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return 2, f"{where} cannot be read or written ({error.strerror}); choose another folder"
    if error.errno == errno.ELOOP:
        return 2, f"{where} is a link that leads to itself; choose another folder"
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return 2, f"{where} is no folder ({error.strerror}); choose another one"
    if error.errno == errno.ENAMETOOLONG:
        return 2, f"{where[:60]}... is too long for a file name; choose shorter names"
    return 1, f"{where}: {error.strerror or error}"


def _say(error: BaseException, code: int, message: str | None = None) -> int:
    """Print why a command ended, on one line. Of a long one, long paths are shortened first.

    The words between them say what was wrong, and the path is often part of a command to copy.
    """
    if os.environ.get("CIFAR_LAB_DEBUG") == "1":
        traceback.print_exception(error)
    text = message or str(error) or type(error).__name__
    for long in re.findall(r"[^\s`]*/[^\s`]{60,}", text):
        if len(text) > LONGEST_MESSAGE:
            text = text.replace(long, shorten_path(Path(long), 80), 1)
    print(f"cifar_lab: {shorten(text, LONGEST_MESSAGE)}", file=sys.stderr, flush=True)
    return code
