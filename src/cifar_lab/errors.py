"""The ways in which a command ends early, and what all that prints has in common."""

import difflib
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("cifar_lab")
"""The one logger of the package: `cli` lets it reach the terminal, a run its train.log."""

_USER = re.compile(r"\b([a-z][a-z0-9+.-]*://)[^\s/?#'\"<>]*@", re.IGNORECASE)
_QUERY = re.compile(r"\b([a-z][a-z0-9+.-]*://[^\s?'\"<>]*)\?[^\s'\"<>)]*", re.IGNORECASE)
_SECRET = re.compile(r"(^|_)(KEY|APIKEY|TOKEN|PASSWORD|PASSWD|SECRET)(_|$)", re.IGNORECASE)
_SHORTEST_SECRET = 6  # characters; a shorter text would be found everywhere
_JOIN = "\u200d"


class CommandError(Exception):
    """What a command ends with: one line on standard error, and an exit code."""

    exit_code = 1


class UsageError(CommandError):
    """The request is wrong: the line says what, where, and what would be right."""

    exit_code = 2


class Unavailable(CommandError):
    """The request is right but not now: data out of reach, folder in use, ..."""

    exit_code = 3


class RunFailed(CommandError):
    """The run started and failed."""


class Damaged(RunFailed):
    """A file is not what was written; the message names the file."""


class Stopped(BaseException):
    """A signal ended the command; what was running is saved (exit code 128 + signal).

    No Exception, as KeyboardInterrupt is none: it is raised in the middle of anything, and no
    `except Exception` on the way may take it for a failure.
    """

    def __init__(self, signal: int, message: str = "stopped") -> None:
        super().__init__(message)
        self.signal = signal


def missing_extra(setting: str, package: str, extra: str) -> UsageError:
    """Return the error for a setting whose package comes with an optional extra.

    The brackets are quoted, because zsh takes them for a pattern.
    """
    return UsageError(
        f"{setting} needs {package}: pip install 'cifar-lab[{extra}]', "
        f"or in a checkout pip install -e '.[{extra}]'"
    )


def closest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the one of `words` that is spelt most like `word`, or has a part so called, or ""."""
    word, known = word.lower(), {other.lower(): other for other in words}
    close = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    if not close and len(word) > 1:  # s0: s0_optimizer_activation; plateau: reduce_on_plateau
        close = [name for name in known if re.search(rf"(\b|_){re.escape(word)}", name)]
    return known[close[0]] if close else ""


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return " (did you mean X?)" for the closest of `words`, or "" if none is close."""
    guess = closest(word, words)
    return f" (did you mean {guess}?)" if guess else ""


def listing(words: Iterable[str], length: int = 120) -> str:
    """Return words joined by commas; those beyond `length` characters are only counted."""
    left, shown = list(words), ""
    while left and len(shown) + len(left[0]) <= length:
        shown += f", {left.pop(0)}" if shown else left.pop(0)
    return f"{shown or 'none'}" + (f" and {len(left)} more" if left else "")


def first_line(error: BaseException, length: int = 200) -> str:
    """Return the first line of an error's message, shortened, or its class where it has none.

    A first line that ends with a colon announces what follows: the second line is added.
    """
    lines = [line.strip() for line in redact(str(error)).strip().splitlines()]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return shorten(text, length)


def printable(text: str) -> str:
    """Return text as a terminal can show it: control characters and broken bytes as escapes.

    A lone surrogate stands for a byte of a name that is not UTF-8 (PEP 383).
    """

    def shown(character: str) -> str:
        # Spaces of other widths and the joiners of emoji are no print, but harmless.
        if character.isprintable() or unicodedata.category(character) == "Zs" or character == _JOIN:
            return character
        if "\udc80" <= character <= "\udcff":
            return f"\\x{ord(character) - 0xDC00:02x}"
        return character.encode("unicode_escape").decode()

    return text if text.isprintable() else "".join(map(shown, text))


def shorten_path(path: Path, length: int = 110) -> str:
    """Return a path on one line; a long one is cut in the middle, and keeps its last names."""
    text = printable(str(path))
    return text if len(text) <= length else f"{text[:30]}...{text[33 - length :]}"


def shorten(text: str, length: int = 80) -> str:
    """Return `text` on one line, cut in the middle where it is longer than `length`."""
    shown = printable(text)
    if len(shown) <= length:
        return shown
    shown = redact(shown)  # half a password would not be recognised later
    end = f"...({len(shown)} characters)"
    return shown[: length - len(end)] + end


def redact(text: str) -> str:
    """Return a text without passwords, for whatever is printed or written.

    These are the users and queries of addresses, and what the environment keeps in variables that
    are called a key, a token, a password or a secret, or as the password of an address.
    """
    text = redact_addresses(text)
    for secret in _secrets():
        text = text.replace(secret, "***")
    return text


def _secrets() -> Iterator[str]:
    """Yield what is secret in the environment of this moment: whole values, and their parts."""
    for name, value in os.environ.items():
        users = [match[0][len(match[1]) : -1] for match in _USER.finditer(value)]
        queries = [match[0][len(match[1]) + 1 :] for match in _QUERY.finditer(value)]
        parts = [value] if _SECRET.search(name) else []
        parts += [*users, *(user.partition(":")[2] for user in users), *queries]
        parts += [word.partition("=")[2] for query in queries for word in query.split("&")]
        yield from (part for part in parts if len(part) >= _SHORTEST_SECRET)


def redact_addresses(text: str) -> str:
    """Return a text whose addresses have no user, password or query."""
    return _QUERY.sub(r"\1", _USER.sub(r"\1", text))


def shows_bars() -> bool:
    """Whether standard error is where people watch: a terminal or a notebook."""
    return "ipykernel" in sys.modules or is_terminal(sys.stderr)


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal.

    In a service there is none, it may be closed, and what a logging library puts in its place may
    know no `isatty`.
    """
    try:
        return bool(stream.isatty())
    except Exception:
        return False
