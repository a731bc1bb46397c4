"""Who may come in: TLS, tokens, client certificates, rates. Real sockets, real certificates, real files."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.config import HttpConfig, TlsConfig, from_mapping
from edge_agent.errors import ConfigError
from edge_agent.transport.doors import MAX_CLIENTS, Rates, Tokens, new_token
from edge_agent.transport.http import HttpServer
from tests.support.certificates import Authority, Pair
from tests.support.services import eventually
from tests.transport.agent import TIMEOUT, Agent, Client

ROW = b'{"features": [1, 1, 1, 1]}'


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


def _tls(pair: Pair, **more: Any) -> TlsConfig:
    return TlsConfig(certificate=str(pair.certificate), key=str(pair.key), **more)


def _trusting(authority: Authority, own: Pair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.certificate))
    if own is not None:
        context.load_cert_chain(own.certificate, own.key)
    return context


@contextlib.contextmanager
def _connected(port: int, context: ssl.SSLContext) -> Iterator[http.client.HTTPSConnection]:
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=TIMEOUT, context=context)
    try:
        yield connection
    finally:
        connection.close()


def _ask(
    connection: http.client.HTTPConnection, path: str = "/v2", token: str | None = None
) -> tuple[int, bytes]:
    connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
    answer = connection.getresponse()
    return answer.status, answer.read()


def _status(port: int, context: ssl.SSLContext, path: str = "/v2", token: str | None = None) -> int:
    with _connected(port, context) as connection:
        return _ask(connection, path, token)[0]


def _shown(port: int, authority: Authority) -> bytes:
    """The certificate that a new connection sees."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as raw,
        _trusting(authority).wrap_socket(raw, server_hostname="127.0.0.1") as tls,
    ):
        shown = tls.getpeercert(binary_form=True)
    assert shown is not None
    return shown


def _token_file(path: Path, *names: str) -> dict[str, str]:
    tokens, made = Tokens({}), {}
    for name in names:
        tokens, made[name] = tokens.with_new(name)
    tokens.write(path)
    return made


# -- TLS ---------------------------------------------------------------------------------------------------


def test_inference_over_tls(agent: Agent, authority: Authority) -> None:
    server = agent.listen(tls=_tls(authority.issue("device")))
    assert server.url == f"https://127.0.0.1:{server.port}"
    with _connected(server.port, _trusting(authority)) as connection:
        for _ in range(3):
            connection.request("POST", "/predict", ROW)
            answer = connection.getresponse()
            assert (answer.status, b'"decision":"pass"' in answer.read()) == (200, True)


def test_a_client_without_tls_disturbs_nobody(
    agent: Agent, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    server = agent.listen(tls=_tls(authority.issue("device")))
    with (
        caplog.at_level(logging.INFO),
        socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT) as raw,
    ):
        raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            while raw.recv(1000):
                pass
        assert _status(server.port, _trusting(authority)) == 200
    assert not caplog.records


def test_old_tls_is_refused(agent: Agent, authority: Authority) -> None:
    server = agent.listen(tls=_tls(authority.issue("device")))
    context = _trusting(authority)
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        _status(server.port, context)


def test_a_renewed_certificate_is_taken_up_and_open_connections_go_on(
    agent: Agent, authority: Authority, tmp_path: Path
) -> None:
    pair = authority.issue("device")
    server = agent.listen(tls=_tls(pair))
    before = _shown(server.port, authority)
    with _connected(server.port, _trusting(authority)) as connection:
        assert _ask(connection)[0] == 200
        first = connection.sock
        authority.issue("device")  # the same paths
        eventually(lambda: _shown(server.port, authority) != before, "the new certificate", TIMEOUT)
        assert _ask(connection)[0] == 200
        assert connection.sock is first


def test_a_broken_renewal_is_reported_once_and_the_old_certificate_stays(
    agent: Agent, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pair = authority.issue("device")
    server = agent.listen(tls=_tls(pair))
    before = _shown(server.port, authority)
    other = authority.issue("device", into=_folder(tmp_path / "other"))
    with caplog.at_level(logging.WARNING):
        shutil.copy(other.key, pair.key)  # the key of another certificate
        eventually(lambda: bool(caplog.records), "the report", TIMEOUT)
        assert _shown(server.port, authority) == before
    assert [record.getMessage() for record in caplog.records] == ["renewal_refused"]

    shutil.copy(other.certificate, pair.certificate)
    eventually(lambda: _shown(server.port, authority) != before, "the completed renewal", TIMEOUT)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize("broken", ["absent", "no PEM", "another's key"])
def test_unusable_tls_files_are_named_and_nothing_listens(
    agent: Agent, authority: Authority, tmp_path: Path, broken: str
) -> None:
    pair = authority.issue("device")
    if broken == "absent":
        pair.key.unlink()
    elif broken == "no PEM":
        pair.certificate.write_text("a certificate")
    else:
        shutil.copy(authority.issue("device", into=_folder(tmp_path / "other")).key, pair.key)
    server = HttpServer(from_mapping({"http": {"port": 0}}, "test").http, agent.service, agent.metrics)
    server.config = from_mapping(
        {"http": {"port": 0, "tls": {"certificate": str(pair.certificate), "key": str(pair.key)}}}, "test"
    ).http
    with pytest.raises(ConfigError, match=r"http\.tls\.key .*device\.key"):
        agent.call(server.start())
    assert server.url == ""


# -- client certificates -----------------------------------------------------------------------------------


def test_required_client_certificates_are_asked_for_in_the_handshake(
    agent: Agent, authority: Authority, tmp_path: Path
) -> None:
    server = agent.listen(tls=_tls(authority.issue("device"), client_ca=str(authority.certificate)))
    assert _status(server.port, _trusting(authority, authority.issue("client"))) == 200
    stranger = Authority(tmp_path / "elsewhere", "elsewhere").issue("stranger")
    for context in (_trusting(authority), _trusting(authority, stranger)):
        with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
            _status(server.port, context)


def test_a_certificate_or_a_token_opens_where_either_is_accepted(
    agent: Agent, authority: Authority, tmp_path: Path
) -> None:
    token = _token_file(tmp_path / "tokens", "alice")["alice"]
    server = agent.listen(
        tls=_tls(
            authority.issue("device"),
            client_ca=str(authority.certificate),
            client_certificates="accepted",
        ),
        tokens_file=str(tmp_path / "tokens"),
    )
    with_certificate = _trusting(authority, authority.issue("client"))
    assert _status(server.port, with_certificate) == 200
    assert _status(server.port, _trusting(authority), token=token) == 200
    assert _status(server.port, _trusting(authority)) == 401
    assert _status(server.port, _trusting(authority), "/v2/health/ready") == 200


def test_a_required_certificate_and_a_token_file_want_both(
    agent: Agent, authority: Authority, tmp_path: Path
) -> None:
    token = _token_file(tmp_path / "tokens", "alice")["alice"]
    server = agent.listen(
        tls=_tls(authority.issue("device"), client_ca=str(authority.certificate)),
        tokens_file=str(tmp_path / "tokens"),
    )
    context = _trusting(authority, authority.issue("client"))
    assert _status(server.port, context) == 401
    assert _status(server.port, context, token=token) == 200


# -- tokens ------------------------------------------------------------------------------------------------


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, str]:
    return _token_file(tmp_path / "tokens", "alice", "bob")


@pytest.fixture
def guarded(agent: Agent, tmp_path: Path, tokens: dict[str, str]) -> Iterator[Client]:
    client = Client(agent.listen(tokens_file=str(tmp_path / "tokens"), max_body_bytes=1 << 20).port)
    yield client
    client.close()


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_with_a_token_file_only_its_tokens_open(guarded: Client, tokens: dict[str, str]) -> None:
    for token in tokens.values():
        assert guarded.post("/predict", ROW, _bearer(token)).status == 200
    for headers in (
        {},
        _bearer(new_token()),
        _bearer(""),
        {"Authorization": tokens["alice"]},
        {"Authorization": f"Basic {tokens['alice']}"},
    ):
        refused = guarded.post("/predict", ROW, headers)
        assert refused.status == 401
        assert refused.headers["www-authenticate"].startswith("Bearer")
        assert "Bearer TOKEN" in refused.json["error"]
    assert guarded.post("/predict", ROW, _bearer(tokens["bob"])).status == 200
    assert guarded.still_open()


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready", "/", "/docs", "/openapi.json"])
def test_probes_and_pages_that_know_nothing_of_the_device_stay_open(guarded: Client, path: str) -> None:
    assert guarded.get(path).status == 200


@pytest.mark.parametrize("path", ["/v2", "/metrics", "/status", "/v2/models/demo", "/v2/models/stats", "/x"])
def test_everything_else_wants_a_token(guarded: Client, path: str) -> None:
    assert guarded.get(path).status == 401


def test_a_body_that_may_not_be_sent_is_not_kept(agent: Agent, guarded: Client) -> None:
    assert agent.http is not None
    assert guarded.post("/predict", b"x" * (1 << 19)).status == 401
    assert agent.http.body_bytes == 0
    assert guarded.still_open()


def test_a_revoked_token_stops_working_on_open_connections_and_a_new_one_begins(
    guarded: Client, tokens: dict[str, str], tmp_path: Path
) -> None:
    assert guarded.ask("GET", "/v2", None, _bearer(tokens["alice"])).status == 200
    changed, carol = Tokens.read(tmp_path / "tokens").without("alice").with_new("carol")
    changed.write(tmp_path / "tokens")
    eventually(
        lambda: guarded.ask("GET", "/v2", None, _bearer(tokens["alice"])).status == 401, "revoked", TIMEOUT
    )
    assert guarded.ask("GET", "/v2", None, _bearer(carol)).status == 200
    assert guarded.ask("GET", "/v2", None, _bearer(tokens["bob"])).status == 200


def test_a_token_file_that_is_gone_or_damaged_locks_nobody_out(
    guarded: Client, tokens: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        (tmp_path / "tokens").unlink()
        eventually(lambda: bool(caplog.records), "the report", TIMEOUT)
    assert guarded.ask("GET", "/v2", None, _bearer(tokens["alice"])).status == 200
    assert guarded.get("/v2").status == 401


def test_the_control_socket_wants_no_token(agent: Agent, tmp_path: Path, tokens: dict[str, str]) -> None:
    agent.listen(tokens_file=str(tmp_path / "tokens"), unix_path=tmp_path / "control.sock")
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(TIMEOUT)
        raw.connect(str(tmp_path / "control.sock"))
        raw.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert raw.makefile("rb").read().startswith(b"HTTP/1.1 200 ")


def test_only_hashes_are_kept_and_only_for_the_owner(tmp_path: Path, tokens: dict[str, str]) -> None:
    content = (tmp_path / "tokens").read_text()
    for name, token in tokens.items():
        assert token not in content
        assert f"{name} sha256:{hashlib.sha256(token.encode()).hexdigest()}\n" in content
    assert (tmp_path / "tokens").stat().st_mode & 0o777 == 0o600
    assert Tokens.read(tmp_path / "tokens").owner(tokens["bob"].encode()) == "bob"


@pytest.mark.parametrize(
    "line",
    ["alice", "alice s3cret", "alice sha256:abc", f"alice sha256:{'a' * 64} x", f"a/b sha256:{'a' * 64}"],
)
def test_a_damaged_line_is_named_by_its_number_and_not_shown(tmp_path: Path, line: str) -> None:
    (tmp_path / "tokens").write_text(f"# ours\nbob sha256:{'b' * 64}\n{line}\n")
    with pytest.raises(ConfigError, match="line 3") as raised:
        Tokens.read(tmp_path / "tokens")
    assert "s3cret" not in str(raised.value)


# -- rates -------------------------------------------------------------------------------------------------


def test_a_client_that_asks_too_often_is_told_when_to_come_back(agent: Agent) -> None:
    client = Client(agent.listen(requests_per_second=0.5, request_burst=3).port)
    answers = [client.post("/predict", ROW) for _ in range(5)]
    assert [answer.status for answer in answers] == [200, 200, 200, 429, 429]
    assert answers[-1].headers["retry-after"] == "2"
    assert "more than 0.5 requests per second" in answers[-1].json["error"]
    assert client.still_open()  # asks the probe, which is never counted
    client.close()


def test_each_token_has_its_own_rate(agent: Agent, tmp_path: Path, tokens: dict[str, str]) -> None:
    server = agent.listen(tokens_file=str(tmp_path / "tokens"), requests_per_second=0.1, request_burst=2)
    client = Client(server.port)
    statuses = {
        name: [client.post("/predict", ROW, _bearer(token)).status for _ in range(3)]
        for name, token in tokens.items()
    }
    assert statuses == {"alice": [200, 200, 429], "bob": [200, 200, 429]}
    client.close()


def test_a_bucket_fills_again_and_never_beyond_its_burst() -> None:
    rates = Rates(per_second=10, burst=2)
    assert [rates.wait("a", now) for now in (0.0, 0.0)] == [0.0, 0.0]
    assert rates.wait("a", 0.0) == pytest.approx(0.1)
    assert rates.wait("a", 0.1) == 0.0
    assert [rates.wait("a", 100.0) for _ in range(3)] == [0.0, 0.0, pytest.approx(0.1)]


def test_strangers_do_not_fill_the_memory() -> None:
    rates = Rates(per_second=1, burst=1)
    for number in range(3 * MAX_CLIENTS):
        assert rates.wait(f"10.0.{number}", 0.0) == 0.0
    assert rates.wait(f"10.0.{3 * MAX_CLIENTS - 1}", 0.0) > 0  # the latest is still known


# -- beyond loopback ---------------------------------------------------------------------------------------

_TLS = {"certificate": "c.pem", "key": "k.pem"}


@pytest.mark.parametrize(
    ("http_section", "lacks"),
    [
        ({}, "set http.tls and http.tokens_file"),
        ({"tls": _TLS}, "set http.tokens_file"),
        ({"tokens_file": "tokens"}, "set http.tls,"),
    ],
)
def test_beyond_loopback_wants_tls_and_a_client_that_says_who_it_is(
    http_section: dict[str, Any], lacks: str
) -> None:
    with pytest.raises(ConfigError, match=lacks):
        from_mapping({"http": {"host": "0.0.0.0", **http_section}}, "agent.yaml")


@pytest.mark.parametrize(
    "content",
    [
        {"http": {"host": "0.0.0.0", "tls": _TLS, "tokens_file": "tokens"}},
        {"http": {"host": "::", "tls": {**_TLS, "client_ca": "ca.pem"}}},
        {"http": {"host": "0.0.0.0"}, "insecure": True},
        {"http": {"host": "127.0.0.2"}},
        {"http": {"host": "::1"}},
        {"http": {"host": "localhost", "tokens_file": "tokens"}},
    ],
)
def test_what_is_safe_or_said_to_be_is_accepted(content: dict[str, Any]) -> None:
    assert from_mapping(content, "agent.yaml").http.host == content["http"]["host"]


# -- changing the doors under load -------------------------------------------------------------------------


def test_no_connection_is_refused_while_the_doors_change(agent: Agent, authority: Authority) -> None:
    tls = _tls(authority.issue("device"))
    server = agent.listen(tls=tls)
    over, failures, answered = threading.Event(), [], 0

    def hammer() -> None:
        nonlocal answered
        while not over.is_set():
            try:
                assert _status(server.port, _trusting(authority)) == 200
                answered += 1
            except OSError as error:
                failures.append(error)

    thread = threading.Thread(target=hammer)
    thread.start()
    for number in range(20):
        agent.call(server.reconfigure(HttpConfig(port=0, tls=tls, max_connections=100 + number)))
    eventually(lambda: answered > 20, "answers all along", TIMEOUT)
    over.set()
    thread.join()
    assert failures == []


def test_a_handshake_that_does_not_go_on_is_cut(agent: Agent, authority: Authority) -> None:
    server = agent.listen(tls=_tls(authority.issue("device")), header_timeout_seconds=0.2)
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT) as raw,
        contextlib.suppress(ConnectionResetError),
    ):
        assert raw.recv(100) == b""


def test_a_failed_reconfiguration_changes_nothing(agent: Agent, authority: Authority, tmp_path: Path) -> None:
    server = agent.listen(tls=_tls(authority.issue("device")))
    before = (server.config, server.doors, server.url)
    for wrong in (
        HttpConfig(port=0, tokens_file=str(tmp_path / "absent")),
        HttpConfig(port=0, host="192.0.2.1"),
    ):
        with pytest.raises(ConfigError):
            agent.call(server.reconfigure(wrong))
        assert (server.config, server.doors, server.url) == before
        assert _status(server.port, _trusting(authority)) == 200
