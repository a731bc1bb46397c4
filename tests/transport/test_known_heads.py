"""A head that was parsed once is known by its bytes, and means the same the next time."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from edge_agent.config import HttpConfig
from edge_agent.transport.connection import MAX_KNOWN_HEADS
from edge_agent.transport.http import HttpServer
from tests.transport.agent import TIMEOUT, Agent


class Wire:
    """A raw connection that knows where a response ends."""

    def __init__(self, server: HttpServer) -> None:
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT)
        self._file = self._socket.makefile("rb")

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def answer(self) -> tuple[int, Any]:
        status = int(self._file.readline().split()[1])
        size = 0
        while (line := self._file.readline()) not in (b"\r\n", b""):
            if line.startswith(b"Content-Length:"):
                size = int(line[15:])
        return status, json.loads(self._file.read(size)) if size else None

    def ask(self, data: bytes) -> tuple[int, Any]:
        self.send(data)
        return self.answer()


def _head(length: int, more: str = "") -> bytes:
    return f"POST /predict HTTP/1.1\r\nHost: x\r\n{more}Content-Length: {length}\r\n\r\n".encode()


def _body(value: int) -> bytes:
    return b'{"features": [%d, %d, %d, %d]}' % (value, value, value, value)


def _request(value: int, more: str = "") -> bytes:
    return _head(len(_body(value)), more) + _body(value)


def test_the_same_head_with_another_body_gets_the_answer_to_that_body(agent: Agent) -> None:
    server = agent.listen()
    with Wire(server) as wire, Wire(server) as other:
        answers = [wire.ask(_request(value)) for value in (1, 2, 3)]
        answers.append(other.ask(_request(4)))
    assert [(status, answer["score"]) for status, answer in answers] == [
        (200, 1.0), (200, 4.0), (200, 9.0), (200, 16.0),
    ]  # fmt: skip
    assert list(server.heads) == [_head(len(_body(1)))]


def test_a_known_head_may_come_in_pieces_with_others_or_with_too_little(agent: Agent) -> None:
    server = agent.listen()
    with Wire(server) as wire:
        assert wire.ask(_request(1))[1]["score"] == 1.0
        wire.send(_request(2) + _request(3))
        assert [wire.answer()[1]["score"] for _ in range(2)] == [4.0, 9.0]
        wire.send(_request(4)[:-3])
        wire.send(_request(4)[-3:] + _request(5)[:20])
        wire.send(_request(5)[20:])
        assert [wire.answer()[1]["score"] for _ in range(2)] == [16.0, 25.0]
        assert wire.ask(_request(6))[1]["score"] == 36.0
    assert len(server.heads) == 1


def test_a_known_head_with_a_body_that_is_wrong_is_refused_and_the_next_is_not(agent: Agent) -> None:
    with Wire(agent.listen()) as wire:
        assert wire.ask(_request(1))[0] == 200
        status, answer = wire.ask(_request(1).replace(b"features", b"futures!"))
        assert status == 400
        assert "features" in answer["error"]
        assert wire.ask(_request(2))[0] == 200


@pytest.mark.parametrize(
    "request_",
    [
        _request(1, "Authorization: Bearer secret\r\n"),
        _request(1, "Content-Encoding: gzip\r\n"),
        _request(1, "Expect: 100-continue\r\n"),
        _request(1, "X-Long: " + "x" * 2000 + "\r\n"),
        b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
        % (len(_body(1)), _body(1)),
        _request(1).replace(b"HTTP/1.1\r\n", b"HTTP/1.0\r\nConnection: keep-alive\r\n"),
        _request(1) + _request(2),
    ],
)
def test_what_is_out_of_the_ordinary_is_parsed_every_time(agent: Agent, request_: bytes) -> None:
    server = agent.listen()
    with Wire(server) as wire:
        wire.send(request_)
        assert wire.answer()[0] in (100, 200, 415)
    assert not server.heads


def test_empty_lines_after_a_request_in_pieces_are_not_taken_for_its_head(agent: Agent) -> None:
    server = agent.listen()
    get = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    with Wire(server) as wire:
        wire.send(get[:10])
        assert wire.ask(get[10:]) == (200, {"live": True})
        wire.send(b"\r\n\r\n")
        assert wire.ask(get[:-2] + b"X: y\r\n\r\n") == (200, {"live": True})
        wire.send(b"\r\n\r\n")
        assert wire.ask(_request(2))[1]["score"] == 4.0
    assert b"\r\n\r\n" not in server.heads


def test_a_limit_that_was_lowered_holds_for_known_heads(agent: Agent) -> None:
    server = agent.listen()
    with Wire(server) as wire:
        assert wire.ask(_request(1))[0] == 200
    agent.call(server.reconfigure(HttpConfig(port=0, max_body_bytes=10)))
    with Wire(server) as wire:
        assert wire.ask(_request(1))[0] == 413


def test_rates_and_tokens_are_looked_at_for_known_heads_too(agent: Agent) -> None:
    server = agent.listen(requests_per_second=0.001, request_burst=2)
    with Wire(server) as wire:
        assert [wire.ask(_request(value))[0] for value in (1, 2, 3)] == [200, 200, 429]


def test_heads_of_strangers_do_not_fill_the_memory(agent: Agent) -> None:
    server = agent.listen()
    with Wire(server) as wire:
        for number in range(MAX_KNOWN_HEADS + 10):
            assert wire.ask(_request(1, f"X: {number}\r\n"))[0] == 200
    assert 0 < len(server.heads) <= MAX_KNOWN_HEADS
