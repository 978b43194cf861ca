import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_sets
from fileserver import Behaviour, FileServer, file_server
from fixtures import CaptureLog, Patch

import cifar_lab.datasets.download as download
from cifar_lab.datasets import ImageArrays
from cifar_lab.datasets.archive import loader
from cifar_lab.datasets.download import SourceFailed, TooSlow
from cifar_lab.datasets.store import add_arrays, cached
from cifar_lab.errors import Unavailable

CONTENT = bytes(range(256)) * 2000  # 512 kB
MD5 = tiny_sets.md5(CONTENT)
ROOT = Path(__file__).parent.parent


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as running:
        yield running


def get(address: str, target: Path, stall: float = 10) -> None:
    download.download(address, target, MD5, stall)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("left", "ranges", "asked"),
    [
        (None, True, [None]),
        (CONTENT[:100_000], True, ["bytes=100000-"]),
        (CONTENT[:100_000], False, ["bytes=100000-"]),
        (CONTENT, True, []),
        (b"x" * 1000, True, ["bytes=1000-", None]),
        (b"x" * (len(CONTENT) + 10), True, [f"bytes={len(CONTENT) + 10}-", None]),
    ],
    ids=["nothing", "a part", "no ranges", "all", "a wrong part", "too much"],
)
def test_only_what_an_earlier_download_did_not_leave_is_asked_for(
    left: bytes | None, ranges: bool, asked: list[str | None], server: FileServer, tmp_path: Path
) -> None:
    if left is not None:
        (tmp_path / "file.part").write_bytes(left)
    get(server.serve("/file", Behaviour(CONTENT, ranges=ranges)), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert [how for _, how in server.requests] == asked
    assert names(tmp_path) == ["file"]


def test_a_connection_that_breaks_is_resumed(server: FileServer, tmp_path: Path) -> None:
    get(server.serve("/file", Behaviour(CONTENT, close_after=200_000)), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.requests == [
        ("/file", None),
        ("/file", "bytes=200000-"),
        ("/file", "bytes=400000-"),
    ]


def test_silence_ends_a_connection(server: FileServer, tmp_path: Path) -> None:
    how = Behaviour(CONTENT, hang_after=1000, ranges=False)
    with pytest.raises(SourceFailed, match=r"silent for 0\.4 s"):
        get(server.serve("/file", how), tmp_path / "file", stall=0.4)


def test_impatience_leaves_a_slow_server_and_keeps_what_came(
    server: FileServer, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(download, "TRIAL_SECONDS", 0.2)
    address = server.serve("/file", Behaviour(CONTENT, bytes_per_second=55_000))
    with pytest.raises(TooSlow, match=r"\d\d kB/s, about 0 minutes left"):
        download.download(address, tmp_path / "file", MD5, 10, 1 / 60)
    kept = (tmp_path / "file.part").stat().st_size
    assert 0 < kept < 100_000
    server.serve("/file", Behaviour(CONTENT))
    get(address, tmp_path / "file")
    assert server.requests[1] == ("/file", f"bytes={kept}-")
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (Behaviour(CONTENT[:-1] + b"?"), "sent something else"),
        (Behaviour(CONTENT, claimed_length=1000), "sent something else"),
        (Behaviour(CONTENT, close_after=200_000, ranges=False), r"after 0\.2 MB of 0\.5 MB"),
        (Behaviour(b"<html>"), "sent something else"),
        (Behaviour(b"", status=404), "HTTP 404"),
    ],
)
def test_wrong_content_is_never_used(
    server: FileServer, tmp_path: Path, how: Behaviour, why: str
) -> None:
    with pytest.raises(SourceFailed, match=why):
        get(server.serve("/file", how), tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_part_that_is_a_link_is_not_followed(server: FileServer, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"gold")
    (tmp_path / "file.part").symlink_to(victim)
    with pytest.raises(OSError, match=r"file\.part"):
        get(server.serve("/file", Behaviour(CONTENT)), tmp_path / "file")
    assert victim.read_bytes() == b"gold"


class Tiny:
    """A tiny set in CIFAR's format on a server, and the folder it is to come to."""

    def __init__(self, server: FileServer, root: Path) -> None:
        self.server, self.root = server, root
        self.data = tiny_sets.arrays()
        address = f"{server.address}/tar"
        self.edition, self.archive, self.files = tiny_sets.cifar(self.data, address)
        self.path = root / "tiny-python.tar.gz"
        server.serve("/tar", Behaviour(self.archive))

    def load(
        self, mirrors: tuple[str, ...] = (), stall: float = 10, patience: float = 1
    ) -> ImageArrays:
        waits = {"stall_seconds": stall, "patience_minutes": patience}
        known, load = self.data.checksums, loader("tiny", "CIFAR10", lambda _: [self.edition])
        return load(root=self.root, checksums=known, mirrors=mirrors, **waits)


@pytest.fixture
def tiny(server: FileServer, tmp_path: Path) -> Tiny:
    return Tiny(server, tmp_path / "data")


def test_a_set_is_downloaded_once_and_then_comes_from_the_cache(tiny: Tiny) -> None:
    assert tiny_sets.same(tiny.load(), tiny.data)
    (tiny.path).unlink()
    assert tiny_sets.same(tiny.load(), tiny.data)
    assert len(tiny.server.requests) == 1


def test_what_lies_in_the_data_folder_is_used_as_it_is(tiny: Tiny) -> None:
    tiny_sets.write(tiny.root, {tiny.path.name: tiny.archive})
    assert tiny_sets.same(tiny.load(), tiny.data)
    assert tiny.server.requests == []
    assert tiny.path.exists()


def test_what_is_damaged_is_named_and_fetched_and_no_pickle_in_it_opened(
    tiny: Tiny, tmp_path: Path, caplog: CaptureLog
) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    files = {**tiny.files, "test_batch": pickle.dumps(Bomb())}
    packed = tiny_sets.tar_gz({f"tiny-batches-py/{name}": text for name, text in files.items()})
    tiny_sets.write(tiny.root, {tiny.path.name: packed})
    assert tiny_sets.same(tiny.load(), tiny.data)
    assert len(tiny.server.requests) == 1
    assert f"{tiny.path.name} is damaged" in caplog.text
    assert not (tmp_path / "ran").exists()


def test_a_slow_address_is_asked_again_after_the_others(
    tiny: Tiny, monkeypatch: Patch, caplog: CaptureLog
) -> None:
    monkeypatch.setattr(download, "TRIAL_SECONDS", 0.0)
    tiny.server.serve("/tar", Behaviour(tiny.archive, bytes_per_second=len(tiny.archive) * 4))
    mirror = tiny.server.serve("/b", Behaviour(b"", status=404))
    assert tiny_sets.same(tiny.load(mirrors=(mirror,), patience=1e-4), tiny.data)
    assert [path for path, _ in tiny.server.requests] == ["/tar", "/b", "/tar"]
    assert "trying the other sources first" in caplog.text


def test_no_source_left_says_in_one_line_what_was_tried_and_what_one_can_do(tiny: Tiny) -> None:
    first = tiny.server.serve("/tar", Behaviour(b"", status=404))
    second = tiny.server.serve("/b", Behaviour(tiny.archive, hang_after=0))
    with pytest.raises(Unavailable) as caught:
        tiny.load((second,), stall=0.4)
    assert str(caught.value) == (
        f"tiny is not in {tiny.root} and could not be downloaded "
        f"(tried {first}: HTTP 404 Not Found; {second}: silent for 0.4 s after 0.0 MB); "
        f"put tiny-python.tar.gz into {tiny.root}, or set CIFAR_LAB_DATA to a folder that has it"
    )


def test_content_that_decodes_to_something_else_is_never_used(tiny: Tiny) -> None:
    load = loader("tiny", "CIFAR10", lambda _: [tiny.edition])
    checksums = {**tiny.data.checksums, "train_labels": "0" * 64}
    with pytest.raises(Unavailable, match="its train_labels have a wrong sha256"):
        load(root=tiny.root, checksums=checksums)
    assert not (tiny.root / "decoded" / "tiny" / "contents.json").exists()


LOAD = """
import sys
from pathlib import Path
import tiny_sets
from fileserver import FileServer
from test_downloads import Tiny
tiny = Tiny(FileServer(sys.argv[1]), Path(sys.argv[2]))
print("same" if tiny_sets.same(tiny.load(), tiny.data) else "other", flush=True)
"""


def start(tiny: Tiny) -> "subprocess.Popen[str]":
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, tiny.server.address, str(tiny.root)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_processes_that_start_together_fetch_once(tiny: Tiny) -> None:
    tiny.server.serve("/tar", Behaviour(tiny.archive, bytes_per_second=len(tiny.archive) / 3))
    both = [start(tiny), start(tiny)]
    ends = [process.communicate(timeout=60) for process in both]
    assert [out for out, _ in ends] == ["same\n", "same\n"], ends
    assert len(tiny.server.requests) == 1
    assert sum("waiting for another process that prepares tiny" in err for _, err in ends) == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is POSIX")
def test_after_a_kill_the_next_process_goes_on(tiny: Tiny) -> None:
    tiny.server.serve("/tar", Behaviour(tiny.archive, bytes_per_second=len(tiny.archive) / 10))
    process = start(tiny)
    part = tiny.root / f"{tiny.path.name}.part"
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size > 5_000) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    kept = part.stat().st_size
    tiny.server.serve("/tar", Behaviour(tiny.archive))
    assert tiny_sets.same(tiny.load(), tiny.data)
    assert tiny.server.requests == [("/tar", None), ("/tar", f"bytes={kept}-")]


@pytest.fixture
def read_only(tmp_path: Path) -> Path:
    """A place for a data folder in which nobody, not even root, can make a file: below a file."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "data"


def test_a_folder_that_cannot_be_written_is_named_before_any_download(
    tiny: Tiny, read_only: Path
) -> None:
    tiny.root = read_only
    with pytest.raises(Unavailable, match=r"tried .*Not a directory.*CIFAR_LAB_DATA"):
        tiny.load()
    assert tiny.server.requests == []


def test_a_folder_that_cannot_be_written_still_serves_what_it_has(
    tiny: Tiny, read_only: Path
) -> None:
    found = cached(read_only / "tiny", "", lambda add: add_arrays(tiny.data, add), "tiny")
    assert tiny_sets.same(found, tiny.data)


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for npm is a shell script")
@pytest.mark.parametrize(
    ("script", "why"),
    [
        ('test "$1 $2" = "pack tiny@1.0.0" && printf content > tiny-1.0.0.tgz', None),
        ("printf other > tiny.tgz", "wrong sha256"),
        ("echo 'npm error code E404' >&2; exit 1", "npm error code E404"),
        ("exit 0", "npm pack failed"),
    ],
)
def test_npm_packs_into_a_folder_that_is_gone_afterwards(
    script: str, why: str | None, tmp_path: Path, monkeypatch: Patch
) -> None:
    npm, target = tmp_path / "bin" / "npm", tmp_path / "data" / "tiny.tgz"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}{os.pathsep}{os.environ['PATH']}")
    sha256 = hashlib.sha256(b"content").hexdigest()
    if why is None:
        download.download("npm:tiny@1.0.0", target, sha256, 20)
        assert target.read_bytes() == b"content"
    else:
        with pytest.raises(SourceFailed, match=why):
            download.download("npm:tiny@1.0.0", target, sha256, 20)
    assert names(target.parent) == ([] if why else ["tiny.tgz"])
