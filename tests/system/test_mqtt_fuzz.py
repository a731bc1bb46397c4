"""Mutated MQTT at a real agent through a real broker: it does not die, keeps nothing, and goes on answering.

Bodies, topics, response topics, correlation data, expiry and other properties are mutated; between them go
right requests, each of which must get its right answer. ``EDGE_FUZZ_MESSAGES`` says how many messages;
``make test-fuzz`` takes a million, the suite a bounded sample.
"""

from __future__ import annotations

import json
import random
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.transport import mqtt_wire as wire
from edge_agent.transport.mqtt_wire import Will
from tests.support.agents import AgentProcess, run_cli
from tests.support.bundles import expected_score, tiny_bundle
from tests.support.services import Mosquitto, eventually
from tests.system.test_http_fuzz import MESSAGES, SEED, _mutate, _resident

ROOT = "edge/line-1"
ANSWERS = "edge/fuzz/answers"
BATCH = 63  # mutated messages before each right one
MOST = 65536  # bytes of a payload; some are longer
TIMEOUT = 120.0  # of a busy disk and machine, too


class Client:
    """A socket to the broker, made again whenever the broker will not have what it was sent."""

    def __init__(self, port: int) -> None:
        self.statuses = Counter[str]()
        self.refused = 0  # by the broker
        self._port = port
        self._asked = 0
        self._connect()

    def _connect(self) -> None:
        self._parser = wire.Parser(1 << 24)
        self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=TIMEOUT)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        will = Will("edge/fuzz/gone", b"")
        hello = wire.connect(
            "fuzz", True, keepalive=0, clean=True, username=None, password=None, will=will, properties=b""
        )
        self._socket.sendall(hello + wire.subscribe(1, [ANSWERS], True))
        while not any(packet.first == wire.SUBACK for packet in self._packets()):
            pass

    def _packets(self) -> list[wire.Packet]:
        data = self._socket.recv(1 << 18)
        if not data:
            raise ConnectionResetError
        return self._parser.feed(data)

    def ask(self, before: list[bytes], topic: str, body: bytes) -> dict[str, Any]:
        """Send all, and wait for the answer to the last."""
        try:
            return self._exchange(before, topic, body)
        except (ConnectionResetError, BrokenPipeError):  # the broker read what it must not pass on
            self.refused += 1
            self._socket.close()
            self._connect()
            return self._exchange([], topic, body)

    def _exchange(self, before: list[bytes], topic: str, body: bytes) -> dict[str, Any]:
        answer = None
        self._asked += 1  # also when it is asked again, or it would be the same request
        correlation = self._asked.to_bytes(8, "big") + b"right"
        properties = wire.bytes_property(wire.RESPONSE_TOPIC, ANSWERS.encode())
        properties += wire.bytes_property(wire.CORRELATION, correlation)
        last = wire.publish(topic, body, packet_id=1, retain=False, properties=properties)
        self._socket.sendall(b"".join([*before, last]))
        while answer is None:
            for packet in self._packets():
                if packet.first & 0xF0 != wire.PUBLISH:
                    continue
                message = wire.read_message(packet, True)
                if message.packet_id:
                    self._socket.sendall(wire.puback(message.packet_id))
                self.statuses[dict(message.user)[b"status"].decode()] += 1
                if message.correlation == correlation:
                    answer = json.loads(message.payload)
        return answer

    def close(self) -> None:
        self._socket.close()


def _bodies() -> list[tuple[str, bytes, bytes]]:
    """Topics with right bodies and the properties that they need."""
    row = np.ones((1, 4), "<f4")
    tensor = {"name": "features", "shape": [1, 4], "datatype": "FP32"}
    binary = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": 16}}]}).encode()
    infer = json.dumps({"id": "a", "inputs": [{**tensor, "data": [[1, 2, 3, None]]}]}).encode()
    length = wire.user_property("inference-header-content-length", str(len(binary)))
    return [
        (f"{ROOT}/predict", b'{"features": [1, 2, 3, 4], "id": "x", "timeout_ms": 50}', b""),
        (f"{ROOT}/predict", json.dumps({"features": [[0.1, 2, None, -4e5]] * 3}).encode(), b""),
        (f"{ROOT}/v2/models/demo/infer", infer, b""),
        (f"{ROOT}/v2/models/demo/versions/1.0.0/infer", infer, b""),
        (f"{ROOT}/v2/models/demo/infer", binary + row.tobytes(), length),
        (f"{ROOT}/v2/models/demo/input", b'{"features": [1, 2, 3, 4]}', b""),
    ]


TOPICS = (
    "v2/models/absent/infer", "v2/models/demo/versions/9.9.9/infer", "v2/models/demo/versions//infer",
    "v2/models//infer", "v2/models/" + "x" * 5000 + "/infer", "v2/models/\u20ac \u0001/infer",
    "v2/models/a/b/infer", "predict/",
)  # fmt: skip
RESPONSE_TOPICS = (
    b"edge/#", b"edge/+/answers", b"plant/plc", b"", b"edge/line-1/predict", b"edge/line-1/status",
    b"$SYS/x", b"edge/" + b"y" * 60_000, b"edge/line-2/v2/models/demo/infer",
    b"edge/\xff\xfe", b"edge/a\0b", b"edge/\xed\xa0\x80",
)  # fmt: skip
USER = (
    (b"inference-header-content-length", b"-1"), (b"inference-header-content-length", b"9" * 40),
    (b"inference-header-content-length", b"7"), (b"inference-header-content-length", b"\xd9\xa3"), (b"", b""),
    (b"status", b"200"), (b"x" * 3000, b"y" * 3000), (b"\xc3\x28", b"\xff"),
)  # fmt: skip


def _message(corpus: list[tuple[str, bytes, bytes]], rng: random.Random) -> bytes:
    """One message with something wrong in it, most of the time."""
    topic, body, properties = rng.choice(corpus)
    response = ANSWERS.encode()
    chance = rng.random()
    if chance < 0.75:
        body = _mutate(body, rng)
    elif chance < 0.80:
        topic = f"{ROOT}/{rng.choice(TOPICS)}"
    elif chance < 0.803:  # most brokers end the connection for some of these
        response = rng.choice(RESPONSE_TOPICS)
    elif chance < 0.84:
        response = rng.choice([topic for topic in RESPONSE_TOPICS if topic.isascii() and b"\0" not in topic])
    elif chance < 0.841:
        properties += bytes(rng.randrange(256) for _ in range(rng.randrange(1, 30)))
    elif chance < 0.842:
        body = b" " * rng.randrange(MOST, MOST + 200_000)
    elif chance < 0.88:
        name, value = rng.choice(USER[:-1])
        properties += bytes((wire.USER,)) + wire.counted(name) + wire.counted(value)
    elif chance < 0.882:
        name, value = USER[-1]
        properties += bytes((wire.USER,)) + wire.counted(name) + wire.counted(value)
    elif chance < 0.90:
        body = rng.randbytes(rng.randrange(300))
    if rng.random() < 0.9:
        properties += wire.bytes_property(wire.RESPONSE_TOPIC, response)
    if rng.random() < 0.9:
        size = rng.choice((0, 1, 4, 16, 16, 16, 300)) if rng.random() < 0.999 else 65_535
        properties += wire.bytes_property(wire.CORRELATION, rng.randbytes(size))
    if rng.random() < 0.1:
        properties += wire.number_property(wire.EXPIRY, rng.choice((0, 1, 60, (1 << 32) - 1)))
    if rng.random() < 0.05:
        properties += wire.number_property(wire.PAYLOAD_FORMAT, 0)
        properties += wire.bytes_property(wire.CONTENT_TYPE, b"text/\xe2\x82\xac")
    packet_id = rng.choice((0, 0, 0, rng.randrange(2, 65_000)))
    return wire.publish(topic, body, packet_id=packet_id, retain=False, properties=properties)


@pytest.mark.timeout(7200)
def test_mutated_messages_neither_kill_it_nor_fill_it(mosquitto: Mosquitto, tmp_path: Path) -> None:
    # On a busy machine the rules would answer for the model, rightly, when time runs out.
    patient = {"deadline_ms": 500 * TIMEOUT, "breaker_failures": 1_000_000_000}
    agent = AgentProcess(
        tmp_path / "agent",
        device="line-1",
        serving=patient,
        mqtt={"port": mosquitto.port, "max_payload_bytes": MOST},
    )
    bundle = tiny_bundle(tmp_path / "bundle")
    assert run_cli("edge-agent", "install", bundle.path, "--config", agent.config).returncode == 0
    agent.start()
    agent.wait_for(source="model")
    eventually(lambda: "mqtt: connected" in agent.log.read_text(), "the agent is connected")
    rng, corpus = random.Random(SEED), _bodies()
    early = 0
    client = Client(mosquitto.port)
    try:
        for number in range(0, MESSAGES, BATCH + 1):
            row = [rng.randrange(-9, 9) for _ in range(4)]
            answer = client.ask(
                [_message(corpus, rng) for _ in range(BATCH)],
                f"{ROOT}/predict",
                json.dumps({"features": row}).encode(),
            )
            assert answer.get("reason") == "ok", answer
            assert answer["score"] == expected_score(np.array([row]))[0], answer
            if not early and number >= MESSAGES // 4:
                early = _resident(agent.pid)
        late = _resident(agent.pid)
    finally:
        client.close()
        stopped = agent.stop()
    print(
        f"{MESSAGES} messages: {dict(sorted(client.statuses.items()))}, {client.refused} times the broker "
        f"ended the sender's connection, RSS {early} then {late}"
    )
    assert stopped == 0
    assert not {status for status in client.statuses if status >= "500"}, client.statuses
    assert client.statuses["200"] > MESSAGES / 8  # it is not only refused: much of it reaches the model
    assert client.statuses["400"] + client.statuses["404"] > MESSAGES / 10
    assert late < early * 1.05, (early, late)
    lines = [json.loads(line) for line in agent.log.read_text().splitlines()]
    assert [line for line in lines if line["level"] == "error"] == []
    assert sum("mqtt: connected" in line.get("message", "") for line in lines) == 1
