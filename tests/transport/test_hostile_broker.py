"""A broker that breaks the protocol: the agent serves on over HTTP and comes back to a good broker."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from pathlib import Path

import pytest

from edge_agent.transport import broker
from edge_agent.transport import mqtt_wire as wire
from tests.support.services import Mosquitto, eventually, free_port
from tests.transport.agent import Agent, Client
from tests.transport.test_inference_over_mqtt import PREDICT, RESPONSE, ROW, connected
from tests.transport.test_streams_over_mqtt import trying

ACCEPTED = b"\x20\x03\x00\x00\x00"  # CONNACK
SUBSCRIBED = b"\x90\x08\x00\x01\x00" + b"\x01" * 5
LONG = b"\xff\xff\xff\x7f"  # 268,435,455 bytes are said to follow
RNG = random.Random(5)
MESSAGE = wire.publish(PREDICT, b'{"features": [1, 2', packet_id=3, retain=False, properties=b"")

EXPIRED = wire.publish(
    PREDICT,
    b'{"features": [1, 2, 3, 4]}',
    packet_id=3,
    retain=False,
    properties=wire.bytes_property(wire.CORRELATION, b"1") + wire.number_property(wire.EXPIRY, 0),
)

# What it says to a CONNECT, and then for ever; None: no more, but the connection stays.
SAYINGS: dict[str, tuple[bytes, bytes | None]] = {
    "nothing and hangs up": (b"", b""),
    "random bytes": (RNG.randbytes(300), b""),
    "HTTP": (b"HTTP/1.1 400 Bad Request\r\n\r\n", b""),
    "random bytes once it has accepted": (ACCEPTED + RNG.randbytes(300), b""),
    "half a packet": (ACCEPTED[:3], b""),
    "two acceptances": (ACCEPTED + ACCEPTED, b""),
    "a refusal": (b"\x20\x03\x00\x87\x00", b""),
    "a refusal of 3.1.1": (b"\x20\x02\x00\x05", b""),
    "a refusal for its version": (b"\x20\x02\x00\x01", b""),
    "properties beyond the end": (b"\x20\x03\x00\x00\x7f", b""),
    "a packet that has no end": (ACCEPTED + b"\x90" + LONG, b"\0" * 65536),
    "a length that has no end": (ACCEPTED + b"\x30\xff\xff\xff\xff\xff", b"\xff"),
    "a message of QoS 3": (ACCEPTED + SUBSCRIBED + b"\x36\x05\x00\x01a\x00\x01\x00", b""),
    "a topic alias": (ACCEPTED + SUBSCRIBED + b"\x30\x07\x00\x00\x03\x23\x00\x01x", b""),
    "confirmations of nothing": (ACCEPTED + SUBSCRIBED + b"\x40\x02\x00\x09" * 1000, b""),
    "foreign topics": (
        ACCEPTED + SUBSCRIBED + wire.publish("a/#", b"x", packet_id=1, retain=False, properties=b""), b"",
    ),
    "requests without end, and reads nothing": (ACCEPTED + SUBSCRIBED, MESSAGE * 100),
    "a message without end": (
        ACCEPTED + SUBSCRIBED + b"\x32" + LONG + wire.counted(PREDICT.encode()), b"\0" * 65536,
    ),
    "a request that has expired": (ACCEPTED + SUBSCRIBED + EXPIRED, b""),
    "goodbye": (ACCEPTED + SUBSCRIBED + b"\xe0\x01\x8e", b""),
}  # fmt: skip
ENOUGH = 48 << 20  # bytes of what has no end


class Hostile:
    """Accepts connections, says what it was told to, and counts them."""

    def __init__(self, port: int, begin: bytes, then: bytes | None) -> None:
        self.connections = 0
        self.said = 0
        self._begin, self._then = begin, then
        self._listener = socket.create_server(("127.0.0.1", port))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        self._listener.settimeout(0.1)
        while not self._over.is_set():
            try:
                raw, _ = self._listener.accept()
            except TimeoutError:
                continue
            with raw:
                raw.settimeout(2)
                self.connections += 1
                try:
                    raw.recv(65536)
                    raw.sendall(self._begin)
                    while self._then and not self._over.is_set() and self.said < ENOUGH:
                        self.said += raw.send(self._then)
                except OSError:
                    pass

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._listener.close()


@pytest.mark.parametrize("saying", SAYINGS)
def test_a_broker_that_says(
    saying: str, agent: Agent, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    hostile = Hostile(port, *SAYINGS[saying])
    try:
        with trying(agent, port, {"reconnect_max_seconds": 0.05}):
            eventually(lambda: hostile.connections >= 3 or hostile.said >= ENOUGH, "it tries again")
            assert client.post("/predict", {"features": ROW}).json["score"] == 9.0
            # It pauses between the attempts: 0.05 s at most, at random, is 40 a second on average.
            assert hostile.connections < 300
    finally:
        hostile.close()
    said = [record for record in caplog.records if record.levelname in {"WARNING", "ERROR"}]
    assert len(said) <= 2  # the first time, not each
    assert not [record for record in said if record.levelname == "ERROR"], said


@pytest.mark.parametrize(
    ("saying", "protocol", "hinted"),
    [
        ("nothing and hangs up", "5", True),
        ("nothing and hangs up", "3.1.1", False),
        ("a refusal for its version", "5", True),
        ("a refusal", "5", False),
        ("goodbye", "5", False),
    ],
)
def test_whoever_may_not_speak_mqtt_5_is_told_what_to_set(
    saying: str, protocol: str, hinted: bool, agent: Agent, caplog: pytest.LogCaptureFixture
) -> None:
    hostile = Hostile(port := free_port(), *SAYINGS[saying])
    try:
        with trying(agent, port, {"reconnect_max_seconds": 0.05, "protocol": protocol}):
            eventually(lambda: hostile.connections >= 2, "it tries again")
    finally:
        hostile.close()
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert ("set mqtt.protocol to '3.1.1'" in said) == hinted, said


def test_a_broker_that_never_answers_may_not_speak_mqtt_5(
    agent: Agent, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, trying(agent, silent.getsockname()[1], {}):
        eventually(lambda: "no answer in 10 s" in caplog.text, "it gives up", seconds=30)
    assert "if it speaks 3.1.1 only, set mqtt.protocol to '3.1.1'" in caplog.text


def test_it_comes_back_from_a_hostile_broker_to_a_good_one(agent: Agent, tmp_path: Path) -> None:
    good = Mosquitto(tmp_path / "broker")
    hostile = Hostile(good.port, *SAYINGS["random bytes once it has accepted"])
    with trying(agent, good.port, {"reconnect_max_seconds": 0.05}) as transport:
        eventually(lambda: hostile.connections >= 3, "it tries again")
        hostile.close()
        good.start()
        try:
            eventually(transport.connected.is_set, "it is connected")
            with connected(good, RESPONSE) as peer:
                assert b'"score":9.0' in peer.ask(PREDICT, {"features": ROW}).payload
        finally:
            good.stop()


def test_a_connection_that_is_given_up_while_it_is_made_ends(agent: Agent) -> None:
    hostile = Hostile(port := free_port(), b"", b"")

    async def give_up(turns: int) -> bool:
        login = broker.Login(
            "127.0.0.1", port, v5=True, identifier="x", will=wire.Will("a", b"b"), username=None,
            password=None, tls=None, keepalive=30, clean=True, session_expiry=0, receive_maximum=10,
            max_payload=1000,
        )  # fmt: skip
        task = asyncio.ensure_future(broker.connect(login, lambda *_: None, lambda *_: None))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=10)
        return task.done()

    try:
        assert all(agent.call(give_up(turns)) for turns in range(8))
    finally:
        hostile.close()
