"""Round trips through one mosquitto: the agent, beside a bare echo built on paho-mqtt.

The echo is the least that a service on paho can do: its callback answers each request with a constant, at
QoS 1, and there is no model. Broker and client are the same for both; what differs is the client library and
the work. ``python -m benchmarks.mqtt PORT TOPIC`` is that echo.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_agent.transport import mqtt_wire as wire
from edge_agent.transport.mqtt_wire import Will

TIMEOUT = 10.0  # seconds
WARM_UP = 300  # requests before those that count
CONSTANT = json.dumps({"answer": "x" * 280}).encode()  # as long as a decision


class Client:
    """One request at a time over a blocking socket: the client must not cost more than what it measures."""

    def __init__(self, port: int, name: str) -> None:
        self._answers = f"edge/{name}/answers"
        self._parser = wire.Parser(1 << 20)
        self._socket = socket.create_connection(("127.0.0.1", port), TIMEOUT)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        will = Will(f"edge/{name}/gone", b"")
        self._socket.sendall(
            wire.connect(
                name, True, keepalive=0, clean=True, username=None, password=None, will=will, properties=b""
            )
            + wire.subscribe(1, [self._answers], True)
        )
        self._wait_for(wire.SUBACK)

    def ask(self, topic: str, body: bytes, correlation: bytes, timeout: float = TIMEOUT) -> float:
        """Seconds from request to answer, both at QoS 1 from the broker's other side.

        Raises:
            TimeoutError: no answer came.
        """
        self._socket.settimeout(timeout)
        properties = wire.bytes_property(wire.RESPONSE_TOPIC, self._answers.encode())
        properties += wire.bytes_property(wire.CORRELATION, correlation)
        request = wire.publish(topic, body, packet_id=0, retain=False, properties=properties)
        started = time.perf_counter()
        self._socket.sendall(request)
        while True:
            packet = self._wait_for(wire.PUBLISH)
            seconds = time.perf_counter() - started
            message = wire.read_message(packet, True)
            if message.packet_id:
                self._socket.sendall(wire.puback(message.packet_id))
            if message.correlation == correlation:
                return seconds

    def _wait_for(self, kind: int) -> wire.Packet:
        while True:
            for packet in self._parser.feed(self._socket.recv(1 << 18)):
                if packet.first & 0xF0 == kind:
                    return packet

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


@dataclass(frozen=True)
class RoundTrips:
    """What one service was seen to do."""

    seconds: list[float]
    processor_seconds: float  # of the service, for each message


def measure(port: int, pid: int, topic: str, bodies: Sequence[bytes], requests: int) -> RoundTrips:
    """Ask the service of process ``pid``, one request at a time, once it answers."""
    client = Client(port, "bench-client")
    deadline = time.monotonic() + TIMEOUT
    number = 0
    while number < WARM_UP:
        try:
            client.ask(topic, bodies[number % len(bodies)], b"w%d" % number, 0.5)
        except TimeoutError:
            assert time.monotonic() < deadline, topic
        number += 1
    before = _processor_seconds(pid)
    seconds = [client.ask(topic, bodies[n % len(bodies)], b"%d" % n) for n in range(requests)]
    spent = _processor_seconds(pid) - before
    client.close()
    return RoundTrips(seconds, spent / requests)


def _processor_seconds(pid: int) -> float:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def echo(port: int, topic: str) -> None:
    """Answer for ever."""
    from paho.mqtt.client import Client as Paho
    from paho.mqtt.client import MQTTMessage, MQTTv5
    from paho.mqtt.enums import CallbackAPIVersion
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties

    def answer(client: Paho, _: object, message: MQTTMessage) -> None:
        properties = Properties(PacketTypes.PUBLISH)
        properties.CorrelationData = message.properties.CorrelationData
        client.publish(message.properties.ResponseTopic, CONSTANT, 1, properties=properties)

    client = Paho(CallbackAPIVersion.VERSION2, "bench-echo", protocol=MQTTv5)
    client.on_message = answer
    client.connect("127.0.0.1", port)
    connection = client.socket()
    assert isinstance(connection, socket.socket)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.subscribe(topic, 1)
    client.loop_forever()


if __name__ == "__main__":
    echo(int(sys.argv[1]), sys.argv[2])
