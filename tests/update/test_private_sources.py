"""A web server behind a proxy, with a private authority, or that asks who comes."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edge_agent.errors import ConfigError
from edge_agent.update.source import Access, SourceFailed, open_source
from tests.support.certificates import Authority
from tests.update.devices import StaticServer

TIMEOUT = 5.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "repository" / "metadata").mkdir(parents=True)
    (tmp_path / "repository" / "metadata" / "timestamp.json").write_bytes(b"one")
    return tmp_path / "repository"


@contextlib.contextmanager
def https(folder: Path, authority: Authority, *, ask: bool) -> Iterator[StaticServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("server"))
    if ask:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(authority.certificate)
    server = StaticServer(folder, context)
    try:
        yield server
    finally:
        server.stop()


def test_a_private_authority_is_trusted_where_it_is_given(tmp_path: Path, folder: Path) -> None:
    authority = Authority(tmp_path / "ca")
    with https(folder, authority, ask=False) as server:
        source = open_source(server.url, TIMEOUT, Access(ca_file=str(authority.certificate)))
        assert source.read("metadata/timestamp.json", 10) == b"one"
        with pytest.raises(SourceFailed, match="certificate verify failed"):
            open_source(server.url, TIMEOUT).read("metadata/timestamp.json", 10)


@pytest.mark.parametrize("in_one_file", [True, False])
def test_a_client_certificate_is_shown_where_it_is_asked_for(
    tmp_path: Path, folder: Path, in_one_file: bool
) -> None:
    authority = Authority(tmp_path / "ca")
    device = authority.issue("device")
    if in_one_file:
        with device.certificate.open("ab") as file:
            file.write(device.key.read_bytes())
    access = Access(
        ca_file=str(authority.certificate), client_certificate=str(device.certificate),
        client_key="" if in_one_file else str(device.key),
    )  # fmt: skip
    with https(folder, authority, ask=True) as server:
        assert open_source(server.url, TIMEOUT, access).read("metadata/timestamp.json", 10) == b"one"
        stranger = open_source(server.url, TIMEOUT, Access(ca_file=str(authority.certificate)))
        with pytest.raises(SourceFailed):
            stranger.read("metadata/timestamp.json", 10)


@pytest.mark.parametrize(
    "access",
    [
        Access(ca_file="/nowhere.pem"),
        Access(ca_file=__file__),
        Access(client_certificate="/nowhere.pem"),
        Access(client_certificate=__file__),
    ],
)
def test_a_certificate_that_cannot_be_used_is_named(access: Access) -> None:
    with pytest.raises(ConfigError, match=r"updates\.(ca_file|client_certificate)"):
        open_source("https://127.0.0.1:1", TIMEOUT, access)


class _Proxy(BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "3")
        self.end_headers()
        self.wfile.write(b"one")

    def log_message(self, *_: object) -> None:
        pass


def test_the_configured_proxy_is_asked_for_the_whole_url() -> None:
    asked: list[str] = []
    handler = type("Proxy", (_Proxy,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        source = open_source(
            "http://releases.plant.example/fleet", TIMEOUT,
            Access(proxy=f"http://127.0.0.1:{server.server_port}"),
        )  # fmt: skip
        assert source.read("metadata/timestamp.json", 10) == b"one"
        server.shutdown()
        thread.join()
    assert asked == ["http://releases.plant.example/fleet/metadata/timestamp.json"]
