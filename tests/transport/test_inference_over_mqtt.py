"""Inference over a real broker: MQTT 5 request/response, 3.1.1 by ``id``, losing the broker."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paho.mqtt.client import Client as Paho
from paho.mqtt.client import MQTTMessage, MQTTv5, MQTTv311
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_agent.errors import ConfigError
from tests.support.bundles import tiny_bundle
from tests.support.services import Mosquitto, eventually, require
from tests.transport.agent import TIMEOUT, Agent, Client, running

ROOT = "edge/line-1"
PREDICT = f"{ROOT}/predict"
INFER = f"{ROOT}/v2/models/demo/infer"
RESPONSE = "edge/clients/test/response"
ROW = [3, 3, 3, 3]
TENSOR = {"inputs": [{"name": "features", "shape": [1, 4], "datatype": "FP32", "data": ROW}]}


class Peer:
    """A client of the broker, paho in its own thread; what it is subscribed to arrives in order."""

    def __init__(self, broker: Mosquitto, *topics: str, protocol: int = MQTTv5) -> None:
        self._v5 = protocol == MQTTv5
        self._arrived: queue.Queue[MQTTMessage] = queue.Queue()
        self._ready = threading.Event()
        self._paho = Paho(CallbackAPIVersion.VERSION2, protocol=protocol)
        self._paho.on_message = lambda _client, _data, message: self._arrived.put(message)
        self._paho.on_subscribe = lambda *_: self._ready.set()
        self._paho.connect(broker.host, broker.port)
        self._paho.loop_start()
        self._paho.subscribe([(topic, 1) for topic in topics])
        assert self._ready.wait(TIMEOUT)

    def send(self, topic: str, body: Any, *, retain: bool = False, **properties: Any) -> None:
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        if self._v5:
            packed = Properties(PacketTypes.PUBLISH)
            for name, value in properties.items():
                setattr(packed, name, value)
            sent = self._paho.publish(topic, payload, 1, retain, packed)
        else:
            assert not properties
            sent = self._paho.publish(topic, payload, 1, retain)
        if retain:
            sent.wait_for_publish(TIMEOUT)

    def receive(self) -> MQTTMessage:
        return self._arrived.get(timeout=TIMEOUT)

    def ask(self, topic: str, body: Any, **properties: Any) -> MQTTMessage:
        self.send(topic, body, **{"ResponseTopic": RESPONSE, **properties})
        return self.receive()

    def silent(self) -> bool:
        return self._arrived.empty()

    def close(self) -> None:
        self._paho.disconnect()
        self._paho.loop_stop()


@contextlib.contextmanager
def connected(broker: Mosquitto, *topics: str, protocol: int = MQTTv5) -> Iterator[Peer]:
    peer = Peer(broker, *topics, protocol=protocol)
    try:
        yield peer
    finally:
        peer.close()


def user(message: MQTTMessage) -> dict[str, str]:
    return dict(message.properties.UserProperty)


@pytest.fixture
def peer(agent: Agent, mosquitto: Mosquitto) -> Iterator[Peer]:
    """Subscribed to one response topic; the agent is connected with its defaults."""
    agent.subscribe(mosquitto.port)
    with connected(mosquitto, RESPONSE) as peer:
        yield peer


def _mosquitto_rr(broker: Mosquitto, topic: str, body: Any) -> bytes:
    argv = [
        require("mosquitto_rr"), "-h", broker.host, "-p", str(broker.port), "-V", "mqttv5", "-q", "1",
        "-t", topic, "-e", RESPONSE, "-W", str(int(TIMEOUT)), "-m", json.dumps(body),
    ]  # fmt: skip
    return subprocess.run(argv, check=True, capture_output=True, timeout=2 * TIMEOUT).stdout.rstrip(b"\n")


def test_mosquitto_rr_gets_the_same_answer_as_curl(
    agent: Agent, client: Client, mosquitto: Mosquitto
) -> None:
    agent.subscribe(mosquitto.port)

    assert _mosquitto_rr(mosquitto, INFER, TENSOR) == client.post("/v2/models/demo/infer", TENSOR).body

    body = {"features": ROW, "id": "7"}
    over_mqtt = json.loads(_mosquitto_rr(mosquitto, PREDICT, body))
    over_http = client.post("/predict", body).json
    over_mqtt.pop("latency_ms")
    over_http.pop("latency_ms")
    assert over_mqtt == over_http


def test_the_answer_carries_correlation_status_and_source(agent: Agent, peer: Peer) -> None:
    message = peer.ask(INFER, TENSOR, CorrelationData=b"\x00\xff17")
    assert message.properties.CorrelationData == b"\x00\xff17"
    assert message.properties.ContentType == "application/json"
    assert user(message) == {"status": "200", "source": "model", "reason": "ok", "model_version": "1.0.0"}
    assert json.loads(message.payload)["outputs"][0]["data"] == [9.0]
    assert message.qos == 1
    assert not message.retain
    eventually(lambda: agent.counted("mqtt", "ok") == 1, "the request is counted")


def test_a_version_in_the_topic_is_insisted_on(peer: Peer) -> None:
    right = peer.ask(f"{ROOT}/v2/models/demo/versions/1.0.0/infer", TENSOR)
    assert user(right)["status"] == "200"
    wrong = peer.ask(f"{ROOT}/v2/models/demo/versions/2.0.0/infer", TENSOR)
    assert user(wrong)["status"] == "404"
    assert "it is 1.0.0" in json.loads(wrong.payload)["error"]


def test_binary_tensors_travel_as_over_http(peer: Peer) -> None:
    row = np.array([ROW], "<f4").tobytes()
    head = json.dumps(
        {
            "parameters": {"binary_data_output": True},
            "inputs": [
                {
                    "name": "features",
                    "shape": [1, 4],
                    "datatype": "FP32",
                    "parameters": {"binary_data_size": len(row)},
                }
            ],
        }
    ).encode()
    name = "inference-header-content-length"
    message = peer.ask(INFER, head + row, UserProperty=[(name, str(len(head)))])
    assert message.properties.ContentType == "application/octet-stream"
    size = int(user(message)[name])
    assert np.frombuffer(message.payload[size:], "<f4").tolist() == [9.0]


def test_message_expiry_is_no_obstacle(peer: Peer) -> None:
    assert user(peer.ask(PREDICT, {"features": ROW}, MessageExpiryInterval=5))["status"] == "200"


@pytest.mark.parametrize(
    ("topic", "body", "status", "says"),
    [
        (PREDICT, b"", "400", "empty"),
        (PREDICT, b'{"features": [1, 2', "400", "not JSON"),
        (PREDICT, b'{"features": [1, NaN, 3, 4]}', "400", "null for a missing value"),
        (PREDICT, {"features": [1, 2]}, "400", "expected shape [-1, 4], got [1, 2]"),
        (INFER, {"inputs": []}, "400", "inputs"),
        (f"{ROOT}/v2/models/absent/infer", TENSOR, "404", "no model 'absent' here"),
    ],
)
def test_a_malformed_request_is_answered_with_its_error(
    agent: Agent, peer: Peer, topic: str, body: Any, status: str, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    message = peer.ask(topic, body, CorrelationData=b"c")
    assert user(message) == {"status": status}
    assert message.properties.CorrelationData == b"c"
    assert says in json.loads(message.payload)["error"]
    assert user(peer.ask(PREDICT, {"features": ROW}))["status"] == "200"
    assert agent.counted("mqtt", "client_error") == 1
    assert not [record for record in caplog.records if record.levelname != "INFO"]


@pytest.mark.parametrize(
    "topic",
    [
        "plant/plc/commands",
        "edgy/x",
        PREDICT,
        f"{ROOT}/status",
        "edge/line-2/v2/models/demo/infer",
        "edge/line-2/v2/models/demo/input",
        "edge/line-2/events",
    ],
)
def test_a_response_topic_outside_the_prefix_is_refused(
    agent: Agent, mosquitto: Mosquitto, topic: str
) -> None:
    agent.subscribe(mosquitto.port)
    with connected(mosquitto, f"{PREDICT}/response", topic) as peer:
        if topic == f"{ROOT}/status":
            assert peer.receive().payload == b"online"
        peer.send(PREDICT, {"features": ROW}, ResponseTopic=topic, CorrelationData=b"c")
        seen = peer.receive()
        if topic == PREDICT:  # our own request comes back to us
            seen = peer.receive()
        assert (seen.topic, seen.properties.CorrelationData) == (f"{PREDICT}/response", b"c")
        assert "response topic" in json.loads(seen.payload)["error"]
        assert user(seen)["status"] == "400"
        assert peer.silent()


def test_a_3_1_1_client_finds_its_answer_by_id(agent: Agent, mosquitto: Mosquitto) -> None:
    agent.subscribe(mosquitto.port)
    topics = (f"{ROOT}/v2/models/demo/response", f"{PREDICT}/response")
    with connected(mosquitto, *topics, protocol=MQTTv311) as peer:
        peer.send(f"{ROOT}/v2/models/demo/versions/1.0.0/infer", {"id": "a", **TENSOR})
        message = peer.receive()
        assert (message.topic, json.loads(message.payload)["id"]) == (topics[0], "a")
        peer.send(PREDICT, {"id": "b", "features": ROW})
        message = peer.receive()
        answer = json.loads(message.payload)
        assert (message.topic, answer["id"], answer["decision"]) == (topics[1], "b", "fail")
        peer.send(PREDICT, {"id": "c", "features": [1]})
        assert "error" in json.loads(peer.receive().payload)


def test_an_agent_that_speaks_3_1_1_answers_alike(agent: Agent, mosquitto: Mosquitto) -> None:
    agent.subscribe(mosquitto.port, protocol="3.1.1")
    with connected(mosquitto, f"{PREDICT}/response", protocol=MQTTv311) as peer:
        peer.send(PREDICT, {"id": "b", "features": ROW})
        assert json.loads(peer.receive().payload)["score"] == 9.0


def test_status_and_models_are_retained(agent: Agent, mosquitto: Mosquitto, tmp_path: Path) -> None:
    agent.subscribe(mosquitto.port)
    with connected(mosquitto, f"{ROOT}/status") as peer:
        message = peer.receive()
        assert (message.payload, message.retain) == (b"online", True)
    with connected(mosquitto, f"{ROOT}/models") as peer:
        (entry,) = json.loads(peer.receive().payload)
        assert (entry["name"], entry["version"], entry["state"]) == ("demo", "1.0.0", "READY")
        agent.serve(tiny_bundle(tmp_path / "second", version="2.0.0"))
        (entry,) = json.loads(peer.receive().payload)
        assert entry["version"] == "2.0.0"


def test_a_clean_end_says_offline(mosquitto: Mosquitto, tmp_path: Path) -> None:
    with connected(mosquitto, f"{ROOT}/status") as peer:
        with running() as agent:
            agent.serve(tiny_bundle(tmp_path / "bundle"))
            agent.subscribe(mosquitto.port)
            assert peer.receive().payload == b"online"
        assert peer.receive().payload == b"offline"


def test_a_retained_request_is_not_answered_again_at_each_connect(agent: Agent, mosquitto: Mosquitto) -> None:
    with connected(mosquitto, f"{PREDICT}/response") as peer:
        peer.send(PREDICT, {"id": "stale", "features": ROW}, retain=True)
        agent.subscribe(mosquitto.port)
        peer.send(PREDICT, {"id": "fresh", "features": ROW})
        assert json.loads(peer.receive().payload)["id"] == "fresh"


def test_the_agent_comes_back_after_the_broker(agent: Agent, mosquitto: Mosquitto) -> None:
    transport = agent.subscribe(mosquitto.port, reconnect_max_seconds=0.2)
    for kill in (False, True):
        mosquitto.stop(kill=kill)
        eventually(lambda: not transport.connected.is_set(), "the loss is noticed")
        mosquitto.start()
        eventually(transport.connected.is_set, "the agent is back")
        with connected(mosquitto, RESPONSE) as peer:
            assert json.loads(peer.ask(PREDICT, {"features": ROW}).payload)["score"] == 9.0
        with connected(mosquitto, f"{ROOT}/status") as peer:
            assert peer.receive().payload == b"online"


def test_a_broker_that_is_away_at_start_is_waited_for(agent: Agent, mosquitto: Mosquitto) -> None:
    mosquitto.stop()
    starting = threading.Thread(
        target=lambda: agent.subscribe(mosquitto.port, reconnect_max_seconds=0.2), name="subscribe"
    )
    starting.start()
    mosquitto.start()
    starting.join(TIMEOUT)
    with connected(mosquitto, RESPONSE) as peer:
        assert user(peer.ask(PREDICT, {"features": ROW}))["status"] == "200"


def test_a_burst_is_answered_completely_or_refused_as_overload(agent: Agent, mosquitto: Mosquitto) -> None:
    agent.subscribe(mosquitto.port, max_pending=50)
    with connected(mosquitto, RESPONSE) as peer:
        for index in range(200):
            peer.send(
                PREDICT,
                {"features": ROW, "id": str(index)},
                ResponseTopic=RESPONSE,
                CorrelationData=str(index).encode(),
            )
        messages = [peer.receive() for _ in range(200)]
    assert {int(message.properties.CorrelationData) for message in messages} == set(range(200))
    assert {user(message)["status"] for message in messages} <= {"200", "429"}


def test_a_payload_over_the_limit_is_refused_to_3_1_1_clients(agent: Agent, mosquitto: Mosquitto) -> None:
    agent.subscribe(mosquitto.port, max_payload_bytes=1000)
    with connected(mosquitto, f"{PREDICT}/response", protocol=MQTTv311) as peer:
        peer.send(PREDICT, b" " * 1001)
        assert json.loads(peer.receive().payload) == {"error": "payload: 1001 bytes, the limit is 1000"}


def test_a_payload_far_over_the_limit_is_refused_to_who_sent_it(agent: Agent, mosquitto: Mosquitto) -> None:
    agent.subscribe(mosquitto.port, max_payload_bytes=1000)
    with connected(mosquitto, RESPONSE) as peer:
        for number in range(30):  # more than are on their way at once
            name = b"%d" % number
            message = peer.ask(PREDICT, b" " * 300_000, CorrelationData=name)
            assert (user(message)["status"], message.properties.CorrelationData) == ("400", name)
            assert "payload: 300000 bytes, the limit is 1000" in message.payload.decode()
            peer.send(PREDICT, {"features": ROW}, ResponseTopic=RESPONSE)
            assert user(peer.receive())["status"] == "200"


def test_an_unreadable_password_file_is_the_operators_error(agent: Agent) -> None:
    from edge_agent.config import MqttConfig
    from edge_agent.transport.mqtt import MqttTransport

    async def run() -> None:
        config = MqttConfig(username="x", password_file="/no/such/file")
        await MqttTransport(config, "line-1", agent.service, agent.metrics).run()

    with pytest.raises(ConfigError, match=r"mqtt\.password_file /no/such/file: No such file"):
        agent.call(run())
