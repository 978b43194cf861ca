"""Download one file whose checksum is known: over HTTP with resume, or with the npm client."""

import http.client
import logging
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from cifar_lab.datasets.store import digest_of
from cifar_lab.errors import Unavailable, UsageError
from cifar_lab.runs.files import open_for_appending, sync

log = logging.getLogger("cifar_lab")

LARGEST_DOWNLOAD = 256 << 20
MOST_TRIES = 6
TRIAL_SECONDS = 5.0
NPM_SECONDS = 1800.0


class SourceFailed(Exception):
    """A source did not provide the data: the message says why, in a few words."""


class TooSlow(SourceFailed):
    """A source works, but would take longer than the user is willing to wait."""


class _Interrupted(Exception):
    """A transfer ended before its end."""


@dataclass(frozen=True)
class DownloadOptions:
    """The options of a downloaded dataset. Raises UsageError for an invalid one."""

    mirrors: Sequence[str] = ()
    stall_seconds: float = 20.0
    patience_minutes: float = 10.0

    def __post_init__(self) -> None:
        for address in self.mirrors:
            if not str(address).startswith(("http://", "https://")):
                raise UsageError(
                    f"dataset.source.mirrors: {address!r} is not a web address; it must begin "
                    "with http:// or https:// (to use a local file, put it into the data folder)"
                )
        for key in ("stall_seconds", "patience_minutes"):
            value = getattr(self, key)
            if not 0 < value < float("inf"):
                raise UsageError(f"dataset.source.{key}={value}: it must be a number above 0")


def file_matches(path: Path, expected: str, algorithm: str = "md5") -> bool:
    """Whether the file exists and has this digest; a warning says if it has another one."""
    if not path.is_file():
        return False
    digest = digest_of(path, algorithm)
    if digest != expected:
        log.warning("%s is damaged (%s %s, expected %s)", path, algorithm, digest, expected)
    return digest == expected


def download(
    address: str, target: Path, md5: str, options: DownloadOptions, *, patient: bool = True
) -> None:
    """Download `address` to `target`, continuing what an earlier download left.

    A connection that is silent for `options.stall_seconds` is closed. Unless `patient`, a transfer
    that after a short trial is expected to take longer than `options.patience_minutes` raises
    TooSlow and keeps what it has received. Content with another md5 is removed. Raises
    SourceFailed.
    """
    part = target.with_name(target.name + ".part")
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if part.is_symlink():  # not ours, and what it points to may be anybody's
            part.unlink()
    patience_seconds = None if patient else 60 * options.patience_minutes
    for _ in range(MOST_TRIES):
        start = part.stat().st_size if part.is_file() else 0
        if start and digest_of(part, "md5") == md5:
            return _keep(part, target)
        try:
            _receive(address, part, start, options.stall_seconds, patience_seconds)
        except _Interrupted as interrupted:
            if not part.is_file() or part.stat().st_size <= start:
                raise SourceFailed(str(interrupted)) from interrupted
            log.warning("%s: %s; continuing from there", address, interrupted)
            continue
        if digest_of(part, "md5") == md5:
            return _keep(part, target)
        size = part.stat().st_size
        part.unlink()
        if start == 0:
            raise SourceFailed(f"sent something else ({_megabytes(size)}, wrong md5)")
        # The wrong bytes may be those that were already there: once more, from the beginning.
        log.warning("%s: the resumed file has a wrong md5; downloading it from the start", address)
    raise SourceFailed(f"the connection broke {MOST_TRIES} times")


def _receive(
    address: str, part: Path, start: int, stall_seconds: float, patience_seconds: float | None
) -> None:
    """Append to `part` what the server sends from byte `start` on.

    Raises _Interrupted if the connection breaks, SourceFailed if the answer cannot be right.
    """
    with _open(address, start, stall_seconds) as response:
        if response.status == 416:  # nothing is left to send: what is there is too long
            return
        if response.status != 206:
            start = 0
        elif not (response.headers["Content-Range"] or "").startswith(f"bytes {start}-"):
            part.unlink(missing_ok=True)
            raise SourceFailed("answered with another range than the requested one")
        expected = None if response.length is None else start + response.length
        log.info("downloading %s", address)
        with _writing(part):
            # Unbuffered, so that a full disk raises at the write and not when the file is closed.
            file = open_for_appending(part, anew=not start, buffering=0)
        bar = tqdm(
            desc=part.name.removesuffix(".part"),
            total=expected,
            initial=start,
            unit="B",
            unit_scale=True,
            disable=None,
        )
        received, began = start, time.monotonic()
        with file, bar:
            while True:
                try:
                    chunk = response.read1(1 << 18)
                except (http.client.HTTPException, OSError) as error:
                    reason = _reason(error, stall_seconds)
                    raise _Interrupted(f"{reason} after {_megabytes(received)}") from error
                if not chunk:
                    break
                received += len(chunk)
                bar.update(len(chunk))
                with _writing(part):
                    while chunk:
                        chunk = chunk[file.write(chunk) :]
                if received > LARGEST_DOWNLOAD:
                    file.truncate(0)
                    raise SourceFailed(f"sent more than {_megabytes(LARGEST_DOWNLOAD)}")
                seconds = time.monotonic() - began
                if expected and patience_seconds is not None and seconds > TRIAL_SECONDS:
                    rate = (received - start) / seconds
                    left = (expected - received) / rate
                    if left > patience_seconds:
                        raise TooSlow(f"{rate / 1000:.0f} kB/s, about {left / 60:.0f} minutes left")
        if expected is not None and received < expected:
            raise _Interrupted(
                f"closed the connection after {_megabytes(received)} of {_megabytes(expected)}"
            )


def _open(address: str, start: int, stall_seconds: float) -> http.client.HTTPResponse:
    """Request an address from byte `start` on. Raises SourceFailed."""
    headers = {"User-Agent": "cifar_lab"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        request = urllib.request.Request(address, headers=headers)
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=stall_seconds)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:
            return error  # type: ignore[return-value]  # it is a response, too
        raise SourceFailed(f"HTTP {error.code} {error.reason}") from error
    except (http.client.HTTPException, OSError, ValueError) as error:
        raise SourceFailed(_reason(error, stall_seconds)) from error
    return response


def npm_pack(package: str, target: Path, sha256: str) -> None:
    """Download `name@version` as a .tgz with the npm client and verify it. Raises SourceFailed."""
    npm = shutil.which("npm")
    if npm is None:
        raise SourceFailed("there is no npm on the PATH")
    folder = target.with_name(f".npm-{target.stem}")
    shutil.rmtree(folder, ignore_errors=True)
    with _writing(folder):
        folder.mkdir(parents=True)
    # By default, npm retries for more than a minute before it reports that there is no network.
    command = [npm, "pack", package, "--ignore-scripts", "--cache", str(folder / "cache")]
    command += ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--no-update-notifier"]
    log.warning("downloading %s with the npm client", package)
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
            raise SourceFailed("npm pack returned something else (wrong sha256)")
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
def _writing(path: Path) -> Iterator[None]:
    """Turn an error of the file system (no space, no permission) into a one-line Unavailable."""
    try:
        yield
    except OSError as error:
        raise Unavailable(
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
