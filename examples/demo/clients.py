"""What asks the agents: a lean HTTP client, MQTT clients of both protocol versions, and a load."""

from __future__ import annotations

import asyncio
import collections
import json
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiomqtt
import numpy as np
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

TIMEOUT: Final = 10.0  # seconds; nothing here takes longer unless it is broken


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer and how long it took, in seconds."""

    body: dict[str, Any]
    seconds: float
    status: int = 200


def predict_body(row: np.ndarray, **fields: Any) -> bytes:
    """The body of ``POST /predict`` for one row; a missing value is ``null``."""
    values = [None if np.isnan(value) else float(value) for value in row]
    return json.dumps({"features": values, **fields}).encode()


class HttpClient:
    """One keep-alive connection. The client must not cost more than the server it measures."""

    def __init__(self, host: str, port: int, unix_path: Path | None = None) -> None:
        if unix_path is None:
            self._socket = socket.create_connection((host, port), TIMEOUT)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(TIMEOUT)
            self._socket.connect(str(unix_path))

    def ask(self, method: str, path: str, body: bytes = b"") -> Reply:
        """One request, one answer.

        Raises:
            OSError: the connection broke or nothing came.
        """
        head = f"{method} {path} HTTP/1.1\r\nHost: demo\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        started = time.perf_counter()
        self._socket.sendall(head + body)
        data = self._socket.recv(65536)
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += self._more()
        length = int(data[:end].lower().split(b"content-length:")[1].split(b"\r\n")[0])
        while len(data) < end + 4 + length:
            data += self._more()
        seconds = time.perf_counter() - started
        return Reply(json.loads(data[end + 4 :]), seconds, int(data[9:12]))

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _more(self) -> bytes:
        data = self._socket.recv(65536)
        if not data:
            raise ConnectionResetError("the agent closed the connection")
        return data


async def ask_over_mqtt(port: int, device: str, bodies: Sequence[bytes], *, mqtt5: bool) -> list[Reply]:
    """Ask ``predict`` over MQTT, one request at a time.

    MQTT 5: response topic and correlation data. 3.1.1: fixed topic, correlation by the body's ``id``.
    """
    request, fixed = f"edge/{device}/predict", f"edge/{device}/predict/response"
    answer_topic = f"edge/{device}/demo/answers" if mqtt5 else fixed
    protocol = aiomqtt.ProtocolVersion.V5 if mqtt5 else aiomqtt.ProtocolVersion.V311
    replies = []
    nodelay = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]
    async with aiomqtt.Client(
        "127.0.0.1", port, protocol=protocol, timeout=TIMEOUT, socket_options=nodelay
    ) as client:
        await client.subscribe(answer_topic, qos=0)
        messages = aiter(client.messages)
        for number, body in enumerate(bodies):
            properties = None
            if mqtt5:
                properties = Properties(PacketTypes.PUBLISH)
                properties.ResponseTopic = answer_topic
                properties.CorrelationData = str(number).encode()
            else:
                body = json.dumps(json.loads(body) | {"id": str(number)}).encode()  # noqa: PLW2901
            started = time.perf_counter()
            await client.publish(request, body, qos=0, properties=properties)
            while True:
                message = await asyncio.wait_for(anext(messages), TIMEOUT)
                seconds = time.perf_counter() - started
                content = json.loads(bytes(message.payload))
                got = (
                    message.properties.CorrelationData.decode()
                    if mqtt5 and message.properties is not None
                    else content.get("id")
                )
                if got == str(number):
                    replies.append(Reply(content, seconds))
                    break
    return replies


@dataclass(slots=True)
class Tally:
    """What a load saw of one device."""

    sent: int = 0
    lost: int = 0  # no answer, or one that is not 200
    why_lost: str = ""
    answers: collections.Counter[tuple[str, str, str]] = field(default_factory=collections.Counter)
    longest_gap: float = 0.0  # seconds between two answers


class Load:
    """Parts that keep coming: every device gets a row at a steady rate while the ``with`` lasts."""

    def __init__(self, ports: Sequence[int], rows: np.ndarray, rate: float) -> None:
        self._bodies = [predict_body(row) for row in rows]
        self._rate = rate
        self._stop = threading.Event()
        self.tallies = {port: Tally() for port in ports}
        self._threads = [
            threading.Thread(target=self._run, args=(port, number), daemon=True)
            for number, port in enumerate(ports)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(TIMEOUT)

    @property
    def sent(self) -> int:
        """Requests sent to all devices."""
        return sum(tally.sent for tally in self.tallies.values())

    @property
    def lost(self) -> int:
        """Requests without a proper answer."""
        return sum(tally.lost for tally in self.tallies.values())

    @property
    def longest_gap(self) -> float:
        """The longest time any device went without answering, in seconds; the pace itself is 1 / rate."""
        return max(tally.longest_gap for tally in self.tallies.values())

    def _run(self, port: int, offset: int) -> None:
        tally = self.tallies[port]
        client: HttpClient | None = None
        number = offset * 17
        last = time.perf_counter()
        while not self._stop.wait(1 / self._rate):
            number += 1
            tally.sent += 1
            try:
                client = client or HttpClient("127.0.0.1", port)
                reply = client.ask("POST", "/predict", self._bodies[number % len(self._bodies)])
            except (OSError, ValueError, IndexError) as error:
                tally.lost += 1
                tally.why_lost = f"{type(error).__name__}: {error}"
                client = None
                continue
            if reply.status != 200:
                tally.lost += 1
                tally.why_lost = str(reply.body)
                continue
            now = time.perf_counter()
            tally.longest_gap = max(tally.longest_gap, now - last)
            last = now
            key = (reply.body["source"], reply.body["reason"], reply.body["version"])
            tally.answers[key] += 1
