"""Telemetry in, decisions out, over a real broker that goes away; duplicates, events, doors of the broker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paho.mqtt.client import Client as Paho
from paho.mqtt.client import MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_agent.config import DriftConfig, EngineConfig, MqttConfig, ServingConfig
from edge_agent.errors import ConfigError
from edge_agent.serving.service import Service
from edge_agent.transport.mqtt import MqttTransport
from tests.support.agents import AgentProcess, run_cli
from tests.support.bundles import tiny_bundle
from tests.support.certificates import Authority
from tests.support.services import Mosquitto, eventually, require
from tests.transport.agent import TIMEOUT, Agent, running
from tests.transport.test_inference_over_mqtt import (
    INFER,
    PREDICT,
    RESPONSE,
    ROOT,
    ROW,
    TENSOR,
    connected,
    user,
)

INPUT = f"{ROOT}/v2/models/demo/input"
OUTPUT = f"{ROOT}/v2/models/demo/output"
KEPT = (
    "listener 1883\nallow_anonymous true\npersistence true\npersistence_location {}/\nmax_queued_messages 0\n"
)
RATE = 100.0  # messages per second
MESSAGES = int(os.environ.get("EDGE_STREAM_MESSAGES", "500"))
OUTAGE_SECONDS = float(os.environ.get("EDGE_STREAM_OUTAGE", "0"))  # `make test-outage` makes it a minute
PATIENCE = 60.0 + OUTAGE_SECONDS + MESSAGES / RATE


def scores(messages: list[MQTTMessage]) -> list[float]:
    return [json.loads(message.payload)["score"] for message in messages]


def sequence(message: MQTTMessage) -> int:
    return int(user(message)["sequence"])


# -- streams -------------------------------------------------------------------------------------------------


def test_every_input_gets_its_decision_in_order(agent: Agent, mosquitto: Mosquitto, tmp_path: Path) -> None:
    agent.subscribe(mosquitto.port, spool=tmp_path / "spool")
    with connected(mosquitto, OUTPUT) as peer:
        for index in range(100):
            peer.send(INPUT, {"features": [index, 0, 0, 0]}, CorrelationData=str(index).encode())
        messages = [peer.receive() for _ in range(100)]
    assert scores(messages) == [index * index / 4 for index in range(100)]
    assert [sequence(message) for message in messages] == list(range(1, 101))
    assert [int(message.properties.CorrelationData) for message in messages] == list(range(100))
    assert {(message.qos, message.retain) for message in messages} == {(1, False)}
    assert user(messages[0])["source"] == "model"


def test_an_input_may_be_either_body_and_a_wrong_one_is_refused_in_its_place(
    agent: Agent, mosquitto: Mosquitto, tmp_path: Path
) -> None:
    agent.subscribe(mosquitto.port, spool=tmp_path / "spool")
    with connected(mosquitto, OUTPUT, f"{ROOT}/v2/models/demo/versions/+/output") as peer:
        row = np.array([ROW], "<f4").tobytes()
        tensor = TENSOR["inputs"][0] | {"parameters": {"binary_data_size": len(row)}}
        del tensor["data"]
        head = json.dumps({"inputs": [tensor]}).encode()
        length = ("inference-header-content-length", str(len(head)))
        peer.send(INPUT, {"features": ROW})
        peer.send(INPUT, TENSOR)
        peer.send(INPUT, head + row, UserProperty=[length])
        peer.send(INPUT, b'{"features": [1')
        peer.send(INPUT, {"features": ROW, "model": "other"})
        peer.send(f"{ROOT}/v2/models/demo/versions/1.0.0/input", {"features": ROW})
        peer.send(f"{ROOT}/v2/models/demo/versions/9.9.9/input", {"features": ROW})
        messages = [peer.receive() for _ in range(7)]
    bodies = [json.loads(message.payload) for message in messages]
    assert bodies[0]["score"] == bodies[5]["score"] == 9.0
    assert bodies[1]["outputs"][0]["data"] == bodies[2]["outputs"][0]["data"] == [9.0]
    assert "not JSON" in bodies[3]["error"]
    assert "'other' in the body, 'demo' in the topic" in bodies[4]["error"]
    assert [user(message)["status"] for message in messages] == ["200"] * 3 + ["400"] * 2 + ["200", "404"]
    assert [sequence(message) for message in messages] == list(range(1, 8))
    assert messages[5].topic == f"{ROOT}/v2/models/demo/versions/1.0.0/output"


def test_what_is_published_while_the_device_is_away_is_decided_when_it_is_back(
    agent: Agent, mosquitto: Mosquitto, tmp_path: Path
) -> None:
    transport = agent.subscribe(mosquitto.port, spool=tmp_path / "spool")
    with connected(mosquitto, OUTPUT) as peer:
        peer.send(INPUT, {"features": [0, 0, 0, 0]})
        assert sequence(peer.receive()) == 1
        agent.stop()
        eventually(lambda: not transport.connected.is_set(), "it is gone")
        for index in range(1, 4):
            peer.send(INPUT, {"features": [index, 0, 0, 0]})
        agent.subscribe(mosquitto.port, spool=tmp_path / "spool")
        messages = [peer.receive() for _ in range(3)]
        assert scores(messages) == [index * index / 4 for index in range(1, 4)]
        assert [sequence(message) for message in messages] == [2, 3, 4]
        assert peer.silent()


def test_without_a_place_for_decisions_requests_are_still_answered(
    agent: Agent, mosquitto: Mosquitto, tmp_path: Path
) -> None:
    (tmp_path / "spool").write_text("not a folder")
    agent.subscribe(mosquitto.port, spool=tmp_path / "spool")
    with connected(mosquitto, RESPONSE, OUTPUT) as peer:
        peer.send(INPUT, {"features": ROW})
        assert peer.ask(PREDICT, {"features": ROW}).topic == RESPONSE
        assert peer.silent()


def test_an_agent_that_ends_while_it_starts_leaves_no_file_open(
    agent: Agent, mosquitto: Mosquitto, tmp_path: Path
) -> None:
    async def start_and_end(turns: int) -> None:
        config = MqttConfig(port=mosquitto.port)
        transport = MqttTransport(config, "line-1", agent.service, agent.metrics, spool=tmp_path / "spool")
        task = asyncio.create_task(transport.run())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    for turns in range(1, 30):
        agent.call(start_and_end(turns))
    spool = str(tmp_path / "spool")
    links = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [link for link in links if str(link).startswith(spool)]


class Plant:
    """Publishes numbered telemetry at a steady rate, whatever the broker does, and collects decisions."""

    def __init__(self, broker: Mosquitto, total: int) -> None:
        self.total = total
        self.arrived: list[MQTTMessage] = []
        self._lock = threading.Lock()
        ready = threading.Event()
        self._reader = self._client("reader", broker)
        self._reader.on_message = lambda _client, _data, message: self._take(message)
        self._reader.on_subscribe = lambda *_: ready.set()
        self._reader.subscribe(OUTPUT, 1)
        assert ready.wait(TIMEOUT)
        self._writer = self._client("writer", broker)
        self._writer.on_publish = lambda *_: self._was_accepted()
        self.sent = self.accepted = 0
        self._thread = threading.Thread(target=self._write)

    def __enter__(self) -> Plant:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        for client in (self._writer, self._reader):
            client.disconnect()
            client.loop_stop()

    def _was_accepted(self) -> None:
        self.accepted += 1

    def by_sequence(self) -> dict[int, MQTTMessage]:
        """A QoS 1 delivery may come twice to this reader, with the same sequence."""
        with self._lock:
            return {sequence(message): message for message in self.arrived}

    def _take(self, message: MQTTMessage) -> None:
        with self._lock:
            self.arrived.append(message)

    def _write(self) -> None:
        pause, began = threading.Event(), time.monotonic()
        for index in range(self.total):
            properties = Properties(PacketTypes.PUBLISH)
            properties.CorrelationData = str(index).encode()
            # QoS 2: this side does not make duplicates, so each one seen is the agent's.
            body = json.dumps({"features": [index % 50, 0, 0, 0]})
            # paho does not keep to the broker's Receive Maximum (20) when it connects again.
            eventually(lambda: self.sent - self.accepted < 16, "a place in the window", PATIENCE)
            self._writer.publish(INPUT, body, 2, False, properties)
            self.sent += 1
            pause.wait(max(0.0, began + index / RATE - time.monotonic()))

    @staticmethod
    def _client(name: str, broker: Mosquitto) -> Paho:
        client = Paho(CallbackAPIVersion.VERSION2, name, protocol=MQTTv5)
        client.max_inflight_messages_set(20)
        client.reconnect_delay_set(1, 1)  # whole seconds
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 3600
        client.connect(broker.host, broker.port, clean_start=False, properties=properties)
        client.loop_start()
        return client


@pytest.mark.timeout(2 * PATIENCE)
def test_every_accepted_input_is_decided_once_and_in_order_though_broker_and_agent_die(
    tmp_path: Path,
) -> None:
    (tmp_path / "broker").mkdir()
    broker = Mosquitto(tmp_path / "broker", KEPT.format(tmp_path / "broker"))
    broker.start()
    agent = AgentProcess(
        tmp_path / "agent",
        device="line-1",
        mqtt={"port": broker.port, "reconnect_max_seconds": 0.3},
    )
    bundle = tiny_bundle(tmp_path / "bundle")
    assert run_cli("edge-agent", "install", bundle.path, "--config", agent.config).returncode == 0
    total = MESSAGES
    try:
        agent.start()
        with connected(broker, f"{ROOT}/status") as peer:
            assert peer.receive().payload == b"online"  # from now on the broker keeps what comes
        with Plant(broker, total) as plant:
            eventually(lambda: len(plant.by_sequence()) >= 50, "decisions come")
            broker.stop()
            eventually(lambda: plant.sent > plant.accepted + 10, "telemetry goes on without a broker")
            away = time.monotonic()
            agent.kill()
            if OUTAGE_SECONDS:
                agent.start()
            eventually(lambda: time.monotonic() - away >= OUTAGE_SECONDS, "the outage is over", PATIENCE)
            if OUTAGE_SECONDS:
                agent.kill()
            broker.start()
            eventually(lambda: plant.accepted > 200, "the broker takes telemetry again")
            agent.start()
            agent.kill()  # and in the middle of its work
            agent.start()
            eventually(lambda: plant.accepted == total, "everything is accepted", PATIENCE)
            eventually(lambda: len(plant.by_sequence()) >= total, "everything is decided", PATIENCE)
    finally:
        agent.stop()
        broker.stop()
    decided = plant.by_sequence()
    assert sorted(decided) == list(range(1, total + 1))
    inputs = [int(decided[number].properties.CorrelationData) for number in range(1, total + 1)]
    assert inputs == list(range(total))
    first_seen = list(dict.fromkeys(sequence(message) for message in plant.arrived))
    assert first_seen == list(range(1, total + 1))


# -- requests ------------------------------------------------------------------------------------------------


def test_a_request_that_comes_twice_is_answered_once(agent: Agent, mosquitto: Mosquitto) -> None:
    agent.subscribe(mosquitto.port)
    with connected(mosquitto, RESPONSE) as peer:
        for _ in range(3):
            peer.send(PREDICT, {"features": ROW}, ResponseTopic=RESPONSE, CorrelationData=b"1")
        peer.send(INFER, TENSOR, ResponseTopic=RESPONSE, CorrelationData=b"1")
        peer.send(PREDICT, {"features": ROW}, ResponseTopic=RESPONSE, CorrelationData=b"2")
        peer.send(PREDICT, {"features": [0, 0, 0, 0]}, ResponseTopic=RESPONSE, CorrelationData=b"1")
        seen = [peer.receive() for _ in range(4)]
        assert [message.properties.CorrelationData for message in seen] == [b"1", b"1", b"2", b"1"]
        assert peer.silent()
    assert agent.counted("mqtt", "ok") == 4


def test_a_request_is_known_until_it_expires(agent: Agent, mosquitto: Mosquitto) -> None:
    agent.subscribe(mosquitto.port)
    ask = {"ResponseTopic": RESPONSE, "CorrelationData": b"1", "MessageExpiryInterval": 1}
    with connected(mosquitto, RESPONSE) as peer:
        peer.send(PREDICT, {"features": ROW}, **ask)
        first = time.monotonic()
        peer.receive()
        eventually(lambda: time.monotonic() - first > 1.1, "it expired")
        peer.send(PREDICT, {"features": ROW}, **ask)
        assert json.loads(peer.receive().payload)["score"] == 9.0


def test_a_request_without_correlation_is_answered_each_time(agent: Agent, mosquitto: Mosquitto) -> None:
    agent.subscribe(mosquitto.port)
    with connected(mosquitto, RESPONSE) as peer:
        for _ in range(2):
            assert json.loads(peer.ask(PREDICT, {"features": ROW}).payload)["score"] == 9.0


# -- events --------------------------------------------------------------------------------------------------


def test_events_tell_of_an_update_and_of_a_fallback(
    agent: Agent, mosquitto: Mosquitto, tmp_path: Path
) -> None:
    agent.subscribe(mosquitto.port)
    with connected(mosquitto, f"{ROOT}/events", f"{ROOT}/models") as peer:
        while peer.receive().topic != f"{ROOT}/models":
            pass
        agent.serve(tiny_bundle(tmp_path / "second", version="2.0.0"))
        event = next_event(peer)
        assert (event["event"], event["version"], event["previous"]) == ("update", "2.0.0", "1.0.0")

        async def unload() -> None:
            agent.service.unload("demo")

        agent.call(unload())
        events = {event["event"]: event for event in (next_event(peer), next_event(peer))}
        assert events["state"]["state"] == "unloaded"
        assert events["fallback"]["active"] is True


def test_an_event_tells_of_drift_and_of_its_end(mosquitto: Mosquitto, tmp_path: Path) -> None:
    with running() as agent, connected(mosquitto, f"{ROOT}/events", RESPONSE) as peer:
        drift = DriftConfig(window_rows=200, max_rows_per_second=1e6)
        agent.service = Service(ServingConfig(), EngineConfig(), drift, agent.metrics)
        agent.serve(tiny_bundle(tmp_path / "bundle"))
        watching = asyncio.run_coroutine_threadsafe(agent.service.watch_drift(0.01), agent.loop)
        agent.subscribe(mosquitto.port)
        rng = np.random.default_rng(3)
        said: list[bool] = []
        while len(said) < 3:
            away = 3.0 if said == [False] else 0.0  # the calibration rows lie in [-1, 1]
            rows = rng.uniform(-1, 1, (100, 4)) + away
            peer.send(PREDICT, {"features": rows.tolist()}, ResponseTopic=RESPONSE)
            while (message := peer.receive()).topic != RESPONSE:
                event = json.loads(message.payload)
                if event["event"] == "drift":
                    assert (event["model"], event["version"]) == ("demo", "1.0.0")
                    said.append(event["drifting"])
        watching.cancel()
        assert said == [False, True, False]


def next_event(peer: Any) -> dict[str, Any]:
    while True:
        message = peer.receive()
        if message.topic.endswith("/events"):
            event: dict[str, Any] = json.loads(message.payload)
            return event


# -- the broker's doors --------------------------------------------------------------------------------------


@contextlib.contextmanager
def broker(folder: Path, settings: str) -> Iterator[Mosquitto]:
    folder.mkdir(exist_ok=True)
    mosquitto = Mosquitto(folder, settings)
    try:
        mosquitto.start()
        yield mosquitto
    finally:
        mosquitto.stop()


def test_a_broker_with_tls_wants_our_certificate(agent: Agent, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "pki")
    server, device = authority.issue("broker"), authority.issue("line-1")
    settings = (
        "listener 1883\nallow_anonymous true\nrequire_certificate true\n"
        f"cafile {authority.certificate}\ncertfile {server.certificate}\nkeyfile {server.key}\n"
    )
    tls = {"ca": str(authority.certificate), "certificate": str(device.certificate), "key": str(device.key)}
    with broker(tmp_path / "broker", settings) as mosquitto:
        config = {"tls": tls, "reconnect_max_seconds": 0.2}
        transport = agent.subscribe(mosquitto.port, **mqtt_config(config))
        assert transport.connected.is_set()
        client = Paho(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
        client.tls_set(str(authority.certificate), str(device.certificate), str(device.key))
        answers: list[MQTTMessage] = []
        subscribed = threading.Event()
        client.on_message = lambda _client, _data, message: answers.append(message)
        client.on_subscribe = lambda *_: subscribed.set()
        client.connect(mosquitto.host, mosquitto.port)
        client.loop_start()
        client.subscribe(RESPONSE, 1)
        assert subscribed.wait(TIMEOUT)
        properties = Properties(PacketTypes.PUBLISH)
        properties.ResponseTopic = RESPONSE
        client.publish(PREDICT, json.dumps({"features": ROW}), 1, properties=properties)
        eventually(lambda: bool(answers), "an answer over TLS")
        client.disconnect()
        client.loop_stop()


def mqtt_config(content: dict[str, Any]) -> dict[str, Any]:
    """Fields as agent.yaml has them, converted as the configuration is."""
    import msgspec

    config = msgspec.convert(content, MqttConfig)
    return {name: getattr(config, name) for name in content}


def test_a_broker_that_nobody_vouches_for_is_not_talked_to(
    agent: Agent, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plant, stranger = Authority(tmp_path / "plant"), Authority(tmp_path / "stranger", "stranger")
    server = stranger.issue("broker")
    settings = (
        "listener 1883\nallow_anonymous true\n"
        f"cafile {stranger.certificate}\ncertfile {server.certificate}\nkeyfile {server.key}\n"
    )
    config = mqtt_config({"tls": {"ca": str(plant.certificate)}, "reconnect_max_seconds": 0.1})
    with (
        broker(tmp_path / "broker", settings) as mosquitto,
        trying(agent, mosquitto.port, config) as transport,
    ):
        eventually(lambda: "certificate verify failed" in caplog.text, "it is refused")
        assert not transport.connected.is_set()


def test_a_broker_that_refuses_is_tried_again_until_it_lets_us_in(
    agent: Agent, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "broker"
    folder.mkdir()
    passwords, secret = folder / "passwords", tmp_path / "secret"
    secret.write_text("correct\n")
    settings = f"listener 1883\nallow_anonymous false\npassword_file {passwords}\n"

    def set_password(password: str) -> None:
        passwords.touch(mode=0o600)
        command = [require("mosquitto_passwd", "mosquitto"), "-b", str(passwords), "line-1", password]
        subprocess.run(command, check=True, capture_output=True)

    set_password("other")
    config = {"username": "line-1", "password_file": str(secret), "reconnect_max_seconds": 0.1}
    with broker(folder, settings) as mosquitto, trying(agent, mosquitto.port, config) as transport:
        eventually(lambda: "ot authori" in caplog.text, "it is refused")
        assert not transport.connected.is_set()
        mosquitto.stop()
        set_password("correct")
        mosquitto.start()
        eventually(transport.connected.is_set, "it is let in")
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) <= 2  # the first refusal, not each


@contextlib.contextmanager
def trying(agent: Agent, port: int, config: dict[str, Any]) -> Iterator[MqttTransport]:
    """A transport that may never connect."""

    async def start() -> tuple[MqttTransport, asyncio.Task[None]]:
        transport = MqttTransport(MqttConfig(port=port, **config), "line-1", agent.service, agent.metrics)
        return transport, asyncio.create_task(transport.run())

    async def stop(task: asyncio.Task[None]) -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    transport, task = agent.call(start())
    try:
        yield transport
    finally:
        agent.call(stop(task))


def test_a_missing_certificate_is_the_operators_error(agent: Agent) -> None:
    config = mqtt_config({"tls": {"ca": "/no/such/ca.pem"}})
    with pytest.raises(ConfigError, match=r"mqtt\.tls /no/such/ca\.pem: No such file"):
        MqttTransport(MqttConfig(**config), "line-1", agent.service, agent.metrics)
