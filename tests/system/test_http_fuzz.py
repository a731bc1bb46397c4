"""Mutated HTTP at a real agent: it does not die, answers no 5xx, keeps nothing in memory, and goes on.

``EDGE_FUZZ_MESSAGES`` says how many messages; ``make test-fuzz`` takes a million, the suite a bounded sample.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.support.agents import AgentProcess, run_cli
from tests.support.bundles import tiny_bundle

MESSAGES = int(os.environ.get("EDGE_FUZZ_MESSAGES", "8000"))
SEED = int(os.environ.get("EDGE_FUZZ_SEED", "1"))
PIPELINED = 8  # messages on one connection; only the last may break the framing
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


def _request(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    head = "".join(f"{line}\r\n" for line in (f"{method} {path} HTTP/1.1", "Host: device", *headers))
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


CHUNKED = (
    b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'5\r\n{"fea\r\n16\r\ntures": [1, 2, 3, 4]} \r\n0\r\n\r\n'
)


def _corpus() -> list[bytes]:
    row = np.ones((1, 4), "<f4")
    tensor = {"name": "features", "shape": [1, 4], "datatype": "FP32"}
    binary = json.dumps(
        {"inputs": [{**tensor, "parameters": {"binary_data_size": 16}}], "outputs": [{"name": "score"}]}
    ).encode()
    infer = json.dumps({"id": "a", "inputs": [{**tensor, "data": [[1, 2, 3, None]]}]}).encode()
    many = [[0.1, 2, None, -4e5]] * 3
    return [
        _request("POST", "/predict", b'{"features": [1, 2, 3, 4], "id": "x", "timeout_ms": 50}'),
        _request("POST", "/predict", json.dumps({"features": many}).encode()),
        _request("POST", "/predict", b'{"features": {"f0": 1, "f1": 2, "f2": null, "f3": 4}}'),
        _request("POST", "/v2/models/demo/infer", infer, "Content-Type: application/json"),
        _request("POST", "/v2/models/demo/versions/1.0.0/infer", infer),
        _request(
            "POST", "/v2/models/demo/infer", binary + row.tobytes(),
            f"Inference-Header-Content-Length: {len(binary)}",
        ),
        _request("POST", "/v2/models/demo/infer", row.tobytes(), "Inference-Header-Content-Length: 0"),
        _request("POST", "/v2/repository/index", b'{"ready": true}'),
        _request("GET", "/v2/models/demo/stats"),
        _request("GET", "/v2/models/demo"),
        _request("GET", "/v2/health/ready"),
        CHUNKED,
    ]  # fmt: skip


PIECES = [
    b"NaN", b"1e999", b"-1", b"9" * 30, b"null", b"[", b"]" * 40, b"{" * 200, b'"', b"\\u0000", b"\xff\xfe",
    b"\r\n", b"\r\n\r\n", b"\0", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n", b"%2f..", b",",
    b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"Authorization: Bearer x\r\n", b"BYTES", b"FP16",
    b"binary_data_size", b"2147483648", b"HTTP/1.0", b"HTTP/9.9", b"\xf0\x9f\x92\xa9", b"true",
]  # fmt: skip


def _mutate(message: bytes, rng: random.Random) -> bytes:
    data = bytearray(message)
    for _ in range(rng.choice((0, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 if data:
                data[at % len(data)] = rng.randrange(256)
            case 1:
                data[at:at] = rng.choice(PIECES)
            case 2:
                del data[at : at + rng.randrange(1, 20)]
            case 3:
                data[at:at] = data[at : at + rng.randrange(1, 60)]
            case 4:
                del data[at:]
            case _ if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
    return bytes(data)


def _mutate_body(message: bytes, rng: random.Random) -> bytes:
    """Only what is inside is wrong: the message still ends where it says."""
    head, _, body = message.partition(b"\r\n\r\n")
    if message == CHUNKED or not body:
        return message
    body = _mutate(body, rng)
    return re.sub(rb"Content-Length: \d+$", b"Content-Length: %d" % len(body), head) + b"\r\n\r\n" + body


def _batch(corpus: list[bytes], rng: random.Random) -> list[bytes]:
    inside = [_mutate_body(rng.choice(corpus), rng) for _ in range(PIPELINED - 1)]
    return [*inside, _mutate(rng.choice(corpus), rng)]


def _send(port: int, messages: list[bytes], *, in_turns: bool) -> list[int]:
    """Send, close our half, read what comes; the statuses.

    All at once, as pipelining clients do, or each after the answer to the one before, as all others do: then
    a head that was seen before is not parsed again. Whatever is before the last message is answered.
    """
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
        try:
            for count, message in enumerate(messages[:-1] if in_turns else (), 1):
                raw.sendall(message)
                while len(STATUS.findall(received)) < count and (part := raw.recv(1 << 16)):
                    received += part
            raw.sendall(messages[-1] if in_turns else b"".join(messages))
            raw.shutdown(socket.SHUT_WR)
            while part := raw.recv(1 << 16):
                received += part
        except (BrokenPipeError, ConnectionResetError):
            pass  # it was cut off: its right with a message that cannot be read on from
    return [int(status) for status in STATUS.findall(received)]


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.timeout(3600)
def test_mutated_requests_neither_kill_it_nor_fill_it(tmp_path: Path) -> None:
    agent = AgentProcess(tmp_path / "agent")
    bundle = tiny_bundle(tmp_path / "bundle")
    assert run_cli("edge-agent", "install", bundle.path, "--config", agent.config).returncode == 0
    agent.start()
    agent.wait_for(source="model")
    expected = agent.predict([1, 2, 3, 4])["score"]
    rng, corpus, statuses = random.Random(SEED), _corpus(), Counter[int]()
    early = 0
    try:
        for number in range(0, MESSAGES, PIPELINED):
            statuses.update(_send(agent.port, _batch(corpus, rng), in_turns=rng.random() < 0.5))
            if number % 4000 == 0:
                assert agent.predict([1, 2, 3, 4])["score"] == expected
            if not early and number >= MESSAGES // 4:
                early = _resident(agent.pid)
        late = _resident(agent.pid)
        assert agent.predict([1, 2, 3, 4])["score"] == expected
    finally:
        stopped = agent.stop()
    print(f"{MESSAGES} messages: {dict(sorted(statuses.items()))}, RSS {early} then {late}")
    assert stopped == 0
    # 505 is the protocol's own word for HTTP/9.9; 503 would be ours, for too many bodies at once.
    assert not {status for status in statuses if status >= 500} - {505}, statuses
    assert statuses[200] > MESSAGES / 5  # it is not only refused: much of it reaches the model
    assert sum(statuses[status] for status in (400, 404)) > MESSAGES / 5
    assert late < early * 1.05, (early, late)
    errors = [line for line in agent.log.read_text().splitlines() if json.loads(line)["level"] == "error"]
    assert errors == []
