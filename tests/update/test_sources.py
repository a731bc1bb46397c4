"""Reading a repository: limits, conditions, resumption; and that only one kind of error comes out."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.contract.manifest import Manifest
from edge_agent.errors import ConfigError
from edge_agent.update.fetch import fetch_members
from edge_agent.update.source import FolderSource, SourceFailed, open_source
from edge_agent.update.web import HttpSource
from tests.store.bundles import plain_bundle
from tests.update.devices import StaticServer

TIMEOUT = 5.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    (folder / "metadata").mkdir(parents=True)
    (folder / "metadata" / "timestamp.json").write_bytes(b"one")
    (folder / "blobs" / "sha256").mkdir(parents=True)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[StaticServer]:
    server = StaticServer(folder)
    yield server
    server.stop()


@pytest.fixture
def manifest(tmp_path: Path, folder: Path) -> Manifest:
    """A bundle of 300 kB, whose members are in the repository."""
    bundle = plain_bundle(tmp_path / "bundle", "1.0.0", model=bytes(range(250)) * 1200)
    for name, member in bundle.manifest.members.items():
        (folder / "blobs" / "sha256" / member.digest.hex).write_bytes(bundle.read(name))
    return bundle.manifest


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """The staging folder and the one of half downloads."""
    (tmp_path / "staged").mkdir()
    (tmp_path / "partial").mkdir()
    return tmp_path / "staged", tmp_path / "partial"


def quiet(_: int) -> None:
    pass


@pytest.mark.parametrize("kind", ["folder", "file-url", "http"])
def test_every_source_sees_a_change_and_only_a_change(folder: Path, server: StaticServer, kind: str) -> None:
    text = {"folder": str(folder), "file-url": f"file://{folder}", "http": server.url}[kind]
    source = open_source(text, TIMEOUT)
    first = source.look(None)
    again = source.look(first)
    assert again.digest == first.digest
    (folder / "metadata" / "timestamp.json").write_bytes(b"two")
    assert source.look(again).digest != first.digest


def test_http_asks_with_a_condition_but_now_and_then_without(server: StaticServer) -> None:
    source = HttpSource(server.url, TIMEOUT)
    seen = None
    for _ in range(41):
        seen = source.look(seen)
    statuses = [status for _, _, status in server.requests]
    assert statuses == [200, *([304] * 19), 200, *([304] * 19), 200]


@pytest.mark.parametrize("kind", ["folder", "http"])
def test_a_missing_file_and_a_large_one_have_their_reasons(
    folder: Path, server: StaticServer, kind: str
) -> None:
    source = open_source(str(folder) if kind == "folder" else server.url, TIMEOUT)
    with pytest.raises(SourceFailed) as caught:
        source.read("metadata/2.root.json", 100)
    assert caught.value.reason == "not_found"
    (folder / "large").write_bytes(b"x" * 101)
    with pytest.raises(SourceFailed, match="more than 100 bytes") as caught:
        source.read("large", 100)
    assert caught.value.reason == "too_large"
    assert source.read("large", 101) == b"x" * 101


def test_a_medium_that_is_not_there_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(SourceFailed) as caught:
        FolderSource(tmp_path / "not-mounted").look(None)
    assert caught.value.reason == "unreachable"


@pytest.mark.parametrize("path", ["../secret", "a/../../secret", "/etc/passwd"])
def test_no_path_leaves_the_folder(folder: Path, path: str) -> None:
    (folder.parent / "secret").write_text("x")
    with pytest.raises(SourceFailed, match="leaves the repository"):
        FolderSource(folder).read(path, 100)


def test_a_server_that_is_not_there_is_unreachable() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(SourceFailed) as caught:
            HttpSource(url, TIMEOUT).look(None)
    assert caught.value.reason == "unreachable"


@pytest.mark.parametrize(
    "answer",
    [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",
     b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n",
     b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n",
     b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"],
    ids=["nothing", "nonsense", "error", "redirect-to-file", "redirect-loop", "bad-chunk"],
)  # fmt: skip
def test_a_server_that_answers_nonsense_is_unreachable(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT)
        done = threading.Event()

        def serve() -> None:
            while not done.is_set():
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with pytest.raises(SourceFailed):
                HttpSource(f"http://127.0.0.1:{listener.getsockname()[1]}", TIMEOUT).look(None)
        finally:
            done.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_a_server_that_says_nothing_is_given_up(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        source = HttpSource(f"http://127.0.0.1:{listener.getsockname()[1]}", 0.05)
        with pytest.raises(SourceFailed, match="timed out"):
            source.look(None)


@pytest.mark.parametrize("text", ["ftp://host/x", "s3://bucket", "file://other-host/x"])
def test_a_source_we_cannot_read_is_a_configuration_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"updates\.source"):
        open_source(text, TIMEOUT)


def test_a_cut_download_goes_on_where_it_was_cut(
    server: StaticServer, manifest: Manifest, places: tuple[Path, Path]
) -> None:
    staged, partial = places
    source = HttpSource(server.url, TIMEOUT)
    server.cut_after = 100_000
    with pytest.raises(SourceFailed) as caught:
        fetch_members(source, manifest, ["model.onnx"], staged, partial, quiet)
    assert caught.value.reason == "truncated"
    server.cut_after = None
    moved = fetch_members(source, manifest, ["model.onnx"], staged, partial, quiet)
    assert moved == manifest.members["model.onnx"].size - 100_000
    assert server.requests[-1][2] == 206
    assert (staged / "model.onnx").stat().st_size == manifest.members["model.onnx"].size
    assert list(partial.iterdir()) == []


def test_a_half_download_that_was_wrong_is_fetched_from_the_start(
    server: StaticServer, manifest: Manifest, places: tuple[Path, Path]
) -> None:
    staged, partial = places
    member = manifest.members["model.onnx"]
    (partial / member.digest.hex).write_bytes(b"wrong" * 100)
    moved = fetch_members(HttpSource(server.url, TIMEOUT), manifest, ["model.onnx"], staged, partial, quiet)
    assert moved >= member.size
    assert [status for _, _, status in server.requests] == [206, 200]


def test_a_half_download_longer_than_the_member_is_not_used(
    folder: Path, manifest: Manifest, places: tuple[Path, Path]
) -> None:
    staged, partial = places
    member = manifest.members["model.onnx"]
    (partial / member.digest.hex).write_bytes(b"x" * (member.size + 1))
    moved = fetch_members(FolderSource(folder), manifest, ["model.onnx"], staged, partial, quiet)
    assert moved == member.size


def test_a_download_never_grows_beyond_what_the_manifest_says(
    folder: Path, manifest: Manifest, places: tuple[Path, Path]
) -> None:
    staged, partial = places
    member = manifest.members["rules.yaml"]
    (folder / "blobs" / "sha256" / member.digest.hex).write_bytes(b"x" * 10_000_000)
    with pytest.raises(SourceFailed) as caught:
        fetch_members(FolderSource(folder), manifest, ["rules.yaml"], staged, partial, quiet)
    assert caught.value.reason == "blob_mismatch"
    assert list(partial.iterdir()) == []
    assert list(staged.iterdir()) == []
