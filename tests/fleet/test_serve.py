"""The static server: conditional requests, ranges, nothing outside, and a stock TUF client on top."""

from __future__ import annotations

import http.client
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fleet.errors import ServeError
from fleet.serve import StaticServer, keep_fresh


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    for folder in ("metadata", "targets/releases", "blobs/sha256"):
        (root / folder).mkdir(parents=True)
    (root / "metadata/timestamp.json").write_bytes(b"one")
    (root / "blobs/sha256/ab").write_bytes(bytes(range(100)))
    (root / "secret").write_bytes(b"s")
    (root / "metadata/.new-x").write_bytes(b"s")
    (tmp_path / "keys").write_bytes(b"private")
    (root / "metadata/link").symlink_to(tmp_path / "keys")
    return root


@pytest.fixture
def server(root: Path) -> Iterator[StaticServer]:
    server = StaticServer(root, port=0)
    server.start()
    yield server
    server.stop()


def _ask(
    server: StaticServer, path: str, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=10)
    try:
        connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()
    finally:
        connection.close()


def test_an_unchanged_file_is_304_and_a_changed_one_is_not(server: StaticServer, root: Path) -> None:
    status, headers, body = _ask(server, "/metadata/timestamp.json")
    assert (status, body) == (200, b"one")
    assert headers["Cache-Control"] == "no-cache"
    status, again, body = _ask(server, "/metadata/timestamp.json", If_None_Match=headers["ETag"])
    assert (status, body, again["ETag"]) == (304, b"", headers["ETag"])
    staged = root / "metadata/.new-y"
    staged.write_bytes(b"two")  # the same size
    staged.replace(root / "metadata/timestamp.json")
    assert _ask(server, "/metadata/timestamp.json", If_None_Match=headers["ETag"])[::2] == (200, b"two")


@pytest.mark.parametrize(
    ("wanted", "status", "content", "body"),
    [
        ("bytes=90-", 206, "bytes 90-99/100", bytes(range(90, 100))),
        ("bytes=0-0", 206, "bytes 0-0/100", b"\0"),
        ("bytes=95-400", 206, "bytes 95-99/100", bytes(range(95, 100))),
        ("bytes=-5", 206, "bytes 95-99/100", bytes(range(95, 100))),
        ("bytes=100-", 416, "bytes */100", b""),
        ("bytes=0-1,5-6", 200, None, bytes(range(100))),
    ],
)
def test_a_download_goes_on_where_it_stopped(
    server: StaticServer, wanted: str, status: int, content: str | None, body: bytes
) -> None:
    got, headers, data = _ask(server, "/blobs/sha256/ab", Range=wanted)
    assert (got, headers.get("Content-Range"), data) == (status, content, body)


def test_a_range_of_another_version_gives_the_whole(server: StaticServer) -> None:
    assert _ask(server, "/blobs/sha256/ab", Range="bytes=50-", If_Range='"old"')[0] == 200


def test_head_has_the_facts_and_no_body(server: StaticServer) -> None:
    status, headers, body = _ask(server, "/blobs/sha256/ab", "HEAD")
    assert (status, headers["Content-Length"], body) == (200, "100", b"")
    assert "immutable" in headers["Cache-Control"]


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/metadata",
        "/metadata/",
        "/secret",
        "/metadata/.new-x",
        "/metadata/../secret",
        "/metadata/%2e%2e/secret",
        "/metadata/..%2f..%2fkeys",
        "/metadata/link",
        "//metadata/../../keys",
        "/metadata/nothing",
    ],
)
def test_nothing_else_can_be_seen(server: StaticServer, path: str) -> None:
    status, _, body = _ask(server, path)
    assert status == 404
    assert b"private" not in body
    assert b"timestamp" not in body


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE"])
def test_nothing_can_be_written(server: StaticServer, root: Path, method: str) -> None:
    assert _ask(server, "/metadata/timestamp.json", method)[0] == 501
    assert (root / "metadata/timestamp.json").read_bytes() == b"one"


def test_many_devices_poll_at_once(server: StaticServer) -> None:
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(_ask(server, "/metadata/timestamp.json")[0]))
        for _ in range(40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 40


def test_a_client_that_goes_away_harms_nobody(server: StaticServer) -> None:
    address = urlsplit(server.url)
    for _ in range(5):
        with socket.create_connection((str(address.hostname), int(address.port or 0))) as half:
            half.sendall(b"GET /blobs/sha256/ab HTT")
    assert _ask(server, "/blobs/sha256/ab")[0] == 200


def test_a_taken_port_says_so(server: StaticServer, root: Path) -> None:
    with pytest.raises(ServeError, match=r"cannot be served: .* give another --port"):
        StaticServer(root, port=int(urlsplit(server.url).port or 0)).start()


def test_keep_fresh_calls_until_it_is_stopped() -> None:
    stop, calls = threading.Event(), []

    def refresh() -> None:
        calls.append(os.getpid())
        if len(calls) == 3:
            stop.set()

    keep_fresh(refresh, stop, seconds=0.001)
    assert len(calls) == 3
