"""The ways in which a command ends early, and the words it uses for it."""

import difflib
from collections.abc import Iterable


class RequestError(Exception):
    """The request is wrong: one line says what, where, and what would be right (exit code 2)."""


class NotNow(Exception):
    """The request is right but not now: data out of reach, folder in use, ... (exit code 3)."""


class RunFailed(Exception):
    """The run started and failed (exit code 1)."""


class Stopped(BaseException):
    """A signal ended the command; what was running is saved (exit code 128 + signal).

    No Exception, as KeyboardInterrupt is none: it is raised in the middle of anything, and no
    `except Exception` on the way may take it for a failure.
    """

    def __init__(self, signal: int, message: str = "stopped") -> None:
        super().__init__(message)
        self.signal = signal


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return " (did you mean X?)" for the closest of `words`, or "" if none is close."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
