"""What a connection promises: order, limits, time, a clean end. Raw sockets, real timers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.config import HttpConfig
from edge_agent.errors import ConfigError, UpdateRejected
from edge_agent.transport.connection import MAX_HEADER_BYTES, MAX_PIPELINED
from edge_agent.transport.http import HttpServer
from edge_agent.transport.routes import EXPOSITION
from tests.support.services import eventually
from tests.transport.agent import TIMEOUT, Agent, Client


@contextlib.contextmanager
def _connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as raw:
        yield raw


def _predict(value: float, request_id: str = "", version: str = "1.1", more: str = "") -> bytes:
    body = json.dumps({"features": [value] * 4, "id": request_id}).encode()
    return (
        f"POST /predict HTTP/{version}\r\nHost: x\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )


def _exchange(port: int, data: bytes) -> bytes:
    """Send, and read until the server closes."""
    with _connected(port) as raw:
        raw.sendall(data)
        return raw.makefile("rb").read()


def _bodies(stream: bytes) -> list[dict[str, Any]]:
    """The JSON bodies of a stream of responses."""
    bodies = []
    while stream:
        head, _, rest = stream.partition(b"\r\n\r\n")
        size = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:"))
        bodies.append(json.loads(rest[:size]))
        stream = rest[size:]
    return bodies


def test_pipelined_requests_are_answered_in_order(agent: Agent) -> None:
    port = agent.listen().port
    ids = [f"r{index}" for index in range(3 * MAX_PIPELINED)]
    # Answers that are ready at once (errors) stand between answers that take a turn of the loop.
    requests = [_predict(1, name) if index % 3 else _predict(1, "x" * 300) for index, name in enumerate(ids)]
    last = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

    bodies = _bodies(_exchange(port, b"".join(requests) + last))

    assert bodies.pop() == {"live": True}
    expected = [name if index % 3 else None for index, name in enumerate(ids)]
    assert [body.get("id") for body in bodies] == expected


def test_a_request_may_arrive_byte_by_byte_and_two_at_once(agent: Agent) -> None:
    with _connected(agent.listen().port) as raw:
        data = _predict(1, "a") + _predict(2, "b", more="Connection: close\r\n")
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in data[:150]:
            raw.sendall(bytes([byte]))
        raw.sendall(data[150:])
        bodies = _bodies(raw.makefile("rb").read())
    assert [(body["id"], body["score"]) for body in bodies] == [("a", 1.0), ("b", 4.0)]


def test_a_chunked_body_is_put_together(agent: Agent) -> None:
    body = b'{"features": [3, 3, 3, 3]}'
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:5], body[5:11], body[11:]))
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    (answer,) = _bodies(_exchange(agent.listen().port, head + chunks + b"0\r\n\r\n"))
    assert answer["score"] == 9.0


def test_expect_100_continue_is_granted_before_the_body(agent: Agent) -> None:
    with _connected(agent.listen().port) as raw:
        head, _, body = _predict(3, more="Expect: 100-continue\r\nConnection: close\r\n").partition(
            b"\r\n\r\n"
        )
        raw.sendall(head + b"\r\n\r\n")
        leave = raw.recv(1000)
        raw.sendall(body)
        rest = raw.makefile("rb").read()
    assert leave == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert _bodies(rest)[0]["score"] == 9.0


def test_leave_to_send_too_much_is_refused_before_it_is_sent(agent: Agent) -> None:
    port = agent.listen(max_body_bytes=100).port
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 101\r\n\r\n"
    answer = _exchange(port, head)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert _bodies(answer) == [{"error": "body: more than 100 bytes"}]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GARBAGE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nbroken header\r\n\r\n", 400),
        (b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: ten\r\n\r\n", 400),
        (b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nExpect: tea\r\n\r\n", 417),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * (MAX_HEADER_BYTES + 1) + b"\r\n\r\n", 431),
    ],
    ids=[
        "TLS", "no request line", "no Host", "broken header", "length of text", "two lengths", "two framings",
        "broken chunk", "unknown Expect", "long path", "many headers", "long header",
    ],
)  # fmt: skip
def test_what_breaks_the_framing_is_answered_and_closed(agent: Agent, data: bytes, status: int) -> None:
    port = agent.listen().port
    answer = _exchange(port, data)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"Connection: close\r\n" in answer
    (body,) = _bodies(answer)
    assert list(body) == ["error"]
    client = Client(port)
    assert client.still_open()
    client.close()


def test_a_header_that_never_ends_is_cut_off(agent: Agent) -> None:
    with _connected(agent.listen().port) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nA: ")
        with contextlib.suppress(OSError):
            for _ in range(10_000):
                raw.sendall(b"b" * 1024)
        answer = raw.recv(100)
    assert answer.startswith(b"HTTP/1.1 431 ")


def test_answers_before_the_broken_request_still_arrive(agent: Agent) -> None:
    first, second = _bodies(_exchange(agent.listen().port, _predict(3, "good") + b"GARBAGE\r\n\r\n"))
    assert first["id"] == "good"
    assert "not an HTTP request" in second["error"]


def test_an_upgrade_is_not_taken_up(agent: Agent) -> None:
    data = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    assert _bodies(_exchange(agent.listen().port, data)) == [{"live": True}]


@pytest.mark.parametrize("more", ["", "Connection: keep-alive\r\n"], ids=["close", "keep-alive"])
def test_http_1_0_is_closed_unless_it_asks_to_stay(agent: Agent, more: str) -> None:
    with _connected(agent.listen().port) as raw:
        raw.sendall(_predict(3, version="1.0", more=more))
        head = raw.recv(10_000)
        if more:
            assert b"Connection: keep-alive\r\n" in head
            raw.sendall(_predict(3, version="1.0", more=more))
            assert raw.recv(10_000).startswith(b"HTTP/1.1 200 OK\r\n")
        else:
            assert raw.recv(100) == b""


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/predict", "POST, OPTIONS"),
        ("DELETE", "/v2/models/demo/infer", "POST, OPTIONS"),
        ("POST", "/metrics", "GET, HEAD, OPTIONS"),
    ],
)
def test_another_method_is_refused_with_those_that_work(
    client: Client, method: str, path: str, allow: str
) -> None:
    answer = client.ask(method, path)
    assert (answer.status, answer.headers["allow"]) == (405, allow)
    assert list(answer.json) == ["error"]
    options = client.ask("OPTIONS", path)
    assert (options.status, options.headers["allow"], options.body) == (204, allow, b"")
    assert client.still_open()


def test_head_gives_the_header_of_get(client: Client) -> None:
    get, head = client.get("/v2"), client.ask("HEAD", "/v2")
    assert (head.status, head.headers, head.body) == (200, get.headers, b"")
    assert client.still_open()


def test_metrics_are_exposed_as_prometheus_reads_them(client: Client) -> None:
    client.post("/predict", {"features": [3, 3, 3, 3]})
    answer = client.get("/metrics")
    assert answer.headers["content-type"] == EXPOSITION
    assert b'edge_requests_total{protocol="http",status="ok"} 1.0' in answer.body
    assert b'edge_requests_total{protocol="mqtt",status="ok"} 0.0' in answer.body


def test_the_page_asks_no_other_host(client: Client) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert b"//" not in answer.body.replace(b"http://www.w3.org", b"")


def test_a_slow_request_is_given_up(agent: Agent) -> None:
    port = agent.listen(header_timeout_seconds=0.2).port
    for part in (b"POST /predict HT", b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"):
        answer = _exchange(port, part)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert "not complete after 0.2 s" in _bodies(answer)[0]["error"]


def test_an_idle_connection_is_closed_in_silence(agent: Agent) -> None:
    port = agent.listen(idle_timeout_seconds=0.2).port
    with _connected(port) as raw:
        raw.sendall(_predict(3))
        assert raw.recv(10_000).startswith(b"HTTP/1.1 200 OK\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert raw.recv(100) == b""


def test_a_client_that_never_reads_does_not_fill_the_memory(agent: Agent) -> None:
    server = agent.listen(header_timeout_seconds=0.3)
    with _connected(server.port) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with contextlib.suppress(OSError):
            while True:
                raw.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
    eventually(lambda: not server.connections, "the connection is dropped")


def test_connections_beyond_the_limit_are_refused_and_the_others_go_on(agent: Agent) -> None:
    server = agent.listen(max_connections=2)
    first, second = Client(server.port), Client(server.port)
    assert first.still_open()
    assert second.still_open()
    with _connected(server.port) as raw:
        answer = raw.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert "2 connections are open" in _bodies(answer)[0]["error"]
    assert first.still_open()
    second.close()
    eventually(lambda: len(server.connections) == 1, "the closed connection is forgotten")
    third = Client(server.port)
    assert third.still_open()
    first.close()
    third.close()


def test_large_bodies_at_once_are_bounded_together(agent: Agent) -> None:
    server = agent.listen(max_body_bytes=1000)
    part = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + b" " * 999
    with contextlib.ExitStack() as waiting:
        half = [waiting.enter_context(_connected(server.port)) for _ in range(4)]
        for raw in half:
            raw.sendall(part)
        eventually(lambda: server.body_bytes == 4 * 999, "four bodies wait")
        client = Client(server.port)
        refused = client.post("/predict", b" " * 900)
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert client.still_open()
        client.close()
    eventually(lambda: server.body_bytes == 0, "bodies of lost connections are given back")


def test_a_client_that_leaves_before_its_answer_disturbs_nobody(agent: Agent, client: Client) -> None:
    assert agent.http is not None
    for _ in range(20):
        with _connected(agent.http.port) as raw:
            raw.sendall(_predict(3))
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    assert client.post("/predict", {"features": [3, 3, 3, 3]}).json["score"] == 9.0


def test_a_half_closed_client_still_gets_its_answer(agent: Agent) -> None:
    with _connected(agent.listen().port) as raw:
        raw.sendall(_predict(3))
        raw.shutdown(socket.SHUT_WR)
        (body,) = _bodies(raw.makefile("rb").read())
    assert body["score"] == 9.0


def test_stopping_answers_what_is_under_way_and_refuses_what_comes_after(agent: Agent) -> None:
    server = agent.listen()
    request = _predict(3)
    with _connected(server.port) as busy, _connected(server.port) as idle:
        busy.sendall(request[:-5])
        eventually(lambda: server.body_bytes > 0, "half a request has arrived")
        stopping = asyncio.run_coroutine_threadsafe(server.stop(TIMEOUT), agent.loop)
        assert idle.recv(100) == b""
        busy.sendall(request[-5:])
        answer = busy.makefile("rb").read()
        stopping.result(TIMEOUT)
    assert b"Connection: close\r\n" in answer
    assert _bodies(answer)[0]["score"] == 9.0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1)


def test_stopping_cuts_what_does_not_end_in_time(agent: Agent) -> None:
    server = agent.listen()
    with _connected(server.port) as raw:
        raw.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        eventually(lambda: server.body_bytes > 0, "a request has begun")
        agent.call(server.stop(0.05))
        with contextlib.suppress(ConnectionResetError):
            assert raw.recv(100) == b""
    assert not server.connections


def test_a_taken_port_says_what_to_do(agent: Agent) -> None:
    port = agent.listen().port
    second = HttpServer(HttpConfig(port=port), agent.service, agent.metrics)
    with pytest.raises(ConfigError) as raised:
        agent.call(second.start())
    assert str(raised.value) == (
        f"port {port} on 127.0.0.1 is taken: set http.port, or stop the other program"
    )


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_that_is_not_ours_says_what_to_do(agent: Agent, host: str) -> None:
    server = HttpServer(HttpConfig(host=host, port=0), agent.service, agent.metrics)
    with pytest.raises(ConfigError, match=r"http\.host"):
        agent.call(server.start())


class _Recorder:
    """An operator's agent, as far as the control socket sees it."""

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.release = threading.Event()

    async def status(self) -> dict[str, Any]:
        return {"agent": "here"}

    async def install(self, path: str) -> dict[str, Any]:
        if path == "/bad":
            raise UpdateRejected("bundle /bad: the golden vectors disagree", reason="golden")
        self.asked.append(path)
        return {"result": "succeeded"}

    async def rollback(self, model: str | None) -> dict[str, Any]:
        self.asked.append(model)
        return {}

    async def hold(self, until: str | None, reason: str, *, release: bool) -> dict[str, Any]:
        self.asked.append((until, reason, release))
        return {}

    async def load(self, model: str) -> None:
        self.asked.append(("load", model))

    async def unload(self, model: str) -> None:
        raise RuntimeError("an inner detail")


def _control(path: Path, request: bytes) -> tuple[bytes, dict[str, Any]]:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(TIMEOUT)
        raw.connect(str(path))
        raw.sendall(request.replace(b" HTTP/1.1\r\n", b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"))
        answer = raw.makefile("rb").read()
    return answer.partition(b"\r\n")[0], _bodies(answer)[0]


def _post(path: str, body: bytes) -> bytes:
    return f"POST {path} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def test_the_control_socket_administers_and_the_port_does_not(
    agent: Agent, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    admin, path = _Recorder(), tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))  # of an agent that was killed
    server = agent.listen(admin=admin, unix_path=path)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert _control(path, b"GET /admin/status HTTP/1.1\r\n\r\n")[1] == {"agent": "here"}
    assert _control(path, _post("/admin/install", b'{"path": "/x"}'))[1] == {"result": "succeeded"}
    assert _control(path, _post("/admin/rollback", b""))[1] == {}
    assert _control(path, _post("/admin/rollback", b'{"model": "demo"}'))[1] == {}
    assert _control(path, _post("/v2/repository/models/demo/load", b""))[1] == {}
    assert _control(path, _post("/admin/hold", b'{"until": "2999-01-01", "reason": "audit"}'))[1] == {}
    assert admin.asked == ["/x", None, "demo", ("load", "demo"), ("2999-01-01", "audit", False)]
    assert _control(path, _post("/admin/hold", b'{"until": 7}'))[0] == b"HTTP/1.1 400 Bad Request"
    assert _control(path, _predict(3))[1]["score"] == 9.0

    status, body = _control(path, _post("/admin/install", b"{}"))
    assert (status, body) == (b"HTTP/1.1 400 Bad Request", {"error": "path: expected the path of a bundle"})
    status, body = _control(path, _post("/admin/install", b'{"path": "/bad"}'))
    assert (status, body["error"]) == (b"HTTP/1.1 409 Conflict", "bundle /bad: the golden vectors disagree")
    status, body = _control(path, _post("/v2/repository/models/demo/unload", b""))
    assert status == b"HTTP/1.1 500 Internal Server Error"
    assert "inner detail" not in body["error"]
    assert "inner detail" in caplog.text

    client = Client(server.port)
    for method, target in (("GET", "/admin/status"), ("POST", "/v2/repository/models/demo/unload")):
        refused = client.ask(method, target)
        assert refused.status == 403
        assert "only on the control socket" in refused.json["error"]
    client.close()

    agent.call(server.stop(0))
    assert not path.exists()


def test_an_unusable_control_socket_leaves_no_listener_behind(agent: Agent, tmp_path: Path) -> None:
    server = HttpServer(HttpConfig(port=0), agent.service, agent.metrics, unix_path=tmp_path / ("x" * 120))
    with pytest.raises(ConfigError, match="control socket"):
        agent.call(server.start())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1)
