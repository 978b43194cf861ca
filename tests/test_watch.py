"""Runs that go on, followed from their files alone: a table, and a page in a browser."""

import contextlib
import dataclasses
import http.client
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fixtures import Capture, Patch
from tiny_runs import make

from cifar_lab import watch
from cifar_lab.analysis.watching import LiveServer, Watcher, headline
from cifar_lab.errors import UsageError
from cifar_lab.runs.run_dir import RunDir


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.fixture
def folder(finished: RunDir) -> Path:
    """A finished run and one that is queued."""
    make(finished.path.parents[1], "seed=3")
    return finished.path.parents[1]


def test_the_table_says_how_far_each_run_is_and_nothing_is_written(
    folder: Path, capsys: Capture
) -> None:
    before = files(folder)
    assert watch.main([str(folder), "--once"]) == 0
    first, _, header, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("1 of 2 finished · 1 queued · best validation accuracy ")
    assert header.split() == ["run", "state", "epoch", "validation", "best", "left"]
    assert [row.split()[1] for row in rows] == ["finished", "queued"]
    assert "2 of 2" in rows[0]
    assert "0 of 2" in rows[1]
    assert files(folder) == before


def test_only_what_has_changed_is_read_again(
    folder: Path, finished: RunDir, monkeypatch: Patch
) -> None:
    watcher = Watcher(folder)
    first = watcher.look()
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "read_metrics", None)
        assert watcher.look() == first
    rows = finished.read_metrics()
    finished.rewrite_metrics(rows[:1], watched=False, by_class=False)
    assert [run.done for run in watcher.look()] == [1, 0]


def test_a_run_that_trains_has_a_time_left_and_one_that_was_killed_is_interrupted(
    folder: Path, finished: RunDir
) -> None:
    summary = finished.read_summary()
    finished.write_summary(dataclasses.replace(summary, status="running"))
    finished.rewrite_metrics(finished.read_metrics()[:1], watched=False, by_class=False)
    watcher = Watcher(folder)
    with finished.lock():
        run = watcher.look()[0]
        assert run.status == "running"
        assert run.seconds_left is not None
        assert "1 running · 1 queued" in headline(watcher.look())
        assert " left" in headline(watcher.look())
    assert {run.status for run in watcher.look()} == {"interrupted", "queued"}
    finished.summary_file.write_text("{")
    assert {run.status for run in watcher.look()} == {"damaged", "queued"}
    shutil.rmtree(folder)
    with pytest.raises(UsageError, match="is not a folder"):
        watcher.look()


@contextlib.contextmanager
def serving(folder: Path, host: str = "127.0.0.1") -> Iterator[LiveServer]:
    with LiveServer(Watcher(folder), host, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server(folder: Path) -> Iterator[LiveServer]:
    with serving(folder) as server:
        yield server


def get(server: LiveServer, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    content = answer.read().decode(errors="replace")
    connection.close()
    return answer.status, content


def test_the_page_renews_itself_by_what_has_changed(
    server: LiveServer, folder: Path, finished: RunDir
) -> None:
    before = files(folder)
    status, page = get(server, "/")
    assert status == 200
    assert "Configurations" in page
    assert "connect-src 'self'" in page

    def changes(since: int) -> Any:
        return json.loads(get(server, f"/changes?since={since}")[1])

    first = changes(0)
    assert [row[2] for row in first["rows"]] == ["finished", "queued"]
    assert first["ended"] == 1
    second = changes(first["version"])
    assert second["rows"] == []
    assert files(folder) == before
    finished.rewrite_metrics(finished.read_metrics()[:1], watched=False, by_class=False)
    (row,) = changes(second["version"])["rows"]
    assert (row[0], row[3]) == (0, "1 of 2")


def test_only_files_of_runs_are_served_and_only_to_this_machine(
    server: LiveServer, folder: Path, finished: RunDir
) -> None:
    inside = f"/{finished.path.relative_to(folder)}"
    assert get(server, f"{inside}/train.log")[0] == 200
    assert get(server, f"{inside}/best.pt")[0] == 404
    secret = folder.parent / "secret.txt"
    secret.write_text("hushed")
    (finished.path / "link.txt").symlink_to(secret)
    (finished.path / "index.html").symlink_to(secret)
    for path in (f"{inside}/link.txt", f"{inside}/", "/../secret.txt", "/%2e%2e/secret.txt"):
        status, content = get(server, path)
        assert (status, "hushed" in content) == (404, False)
    assert get(server, "/", Host="evil.example:80")[0] == 403
    with serving(folder, "0.0.0.0") as other:
        secret_path = urlsplit(other.address).path
        assert len(secret_path) > 20
        assert get(other, "/")[0] == 403
        assert get(other, secret_path, Host="my-host:80")[0] == 200


def test_a_port_in_use_is_one_line(server: LiveServer, folder: Path, capsys: Capture) -> None:
    assert watch.main([str(folder), "--serve", str(server.server_port)]) == 2
    assert f"port {server.server_port} is in use" in capsys.readouterr().err


@pytest.mark.browser
def test_a_browser_shows_the_rows(server: LiveServer) -> None:
    line = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    line += ["--virtual-time-budget=4000", server.address]
    page = subprocess.run(line, capture_output=True, text=True, check=True, timeout=120).stdout
    assert "<td>finished</td>" in page
    assert "1 of 2 finished" in page
