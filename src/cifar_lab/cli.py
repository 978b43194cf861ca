"""One main for all commands: an exception becomes one line on standard error and an exit code."""

import argparse
import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from cifar_lab.errors import NotNow, RequestError, RunFailed, Stopped

EXIT_CODES = {RunFailed: 1, RequestError: 2, NotNow: 3}


class Parser(argparse.ArgumentParser):
    """An argument parser whose refusals are RequestErrors."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise RequestError(f"{message}; see --help")


def run(command: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code (contract: 0, 1, 2, 3, 130 or 143)."""
    show_log()
    try:
        return command(list(sys.argv[1:] if argv is None else argv))
    except Stopped as stopped:
        return _say(stopped, 128 + stopped.signal)
    except KeyboardInterrupt as error:
        return _say(error, 130, "stopped")
    except (RequestError, NotNow, RunFailed) as error:
        return _say(
            error, next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _say(error, *_explain(error))


def show_log() -> None:
    """Let the package's log reach standard output as plain lines, once."""
    logger = logging.getLogger("cifar_lab")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not any(isinstance(handler, _Console) for handler in logger.handlers):
        logger.addHandler(_Console())


class _Console(logging.Handler):
    """Writes above a progress bar, never through it; finds sys.stdout anew for each line."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        tqdm.write(self.format(record), file=stream)


def _explain(error: OSError) -> tuple[int, str]:
    where = error.filename or "the output folder"
    if error.errno == errno.ENOSPC:
        return 1, f"the disk is full at {where}; free some space and run the same line again"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return 2, f"{where} cannot be written ({error.strerror}); choose another output_dir"
    if error.errno == errno.ENAMETOOLONG:
        return 2, f"{str(where)[:60]}... is too long for a file name; choose shorter names"
    return 1, f"{where}: {error.strerror or error}"


def _say(error: BaseException, code: int, message: str | None = None) -> int:
    if os.environ.get("CIFAR_LAB_DEBUG") == "1":
        traceback.print_exception(error)
    text = " ".join((message or str(error) or type(error).__name__).split("\n"))
    print(f"cifar_lab: {text}", file=sys.stderr, flush=True)
    return code
