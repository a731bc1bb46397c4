"""Rows name the machine that they are from: its alarms over time are its own, whichever way they come."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.bundles import tiny_bundle
from tests.support.services import Mosquitto
from tests.transport.agent import Agent, Client, running
from tests.transport.test_inference_over_mqtt import PREDICT, connected
from tests.transport.test_streams_over_mqtt import INPUT, OUTPUT

LATCH = "format: 2\ndefault: pass\nrules: {over: {when: f3 > 8, latch: true}}\n"
OVER, QUIET = [0, 0, 0, 9], [0, 0, 0, 0]
INFER = "/v2/models/demo/infer"


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    """Its model is unloaded: the rules answer."""
    with running() as agent:
        agent.serve(tiny_bundle(tmp_path / "bundle", rules=LATCH))
        agent.unload("demo")
        yield agent


@pytest.fixture
def client(agent: Agent) -> Iterator[Client]:
    client = Client(agent.listen().port)
    yield client
    client.close()


def tensor(row: list[float], **parameters: Any) -> dict[str, Any]:
    content = {"name": "features", "shape": [1, 4], "datatype": "FP32", "data": row}
    return {"inputs": [content], "parameters": parameters}


def decision(client: Client, row: list[float], **fields: Any) -> str:
    answer = client.post("/predict", {"features": row} | fields)
    assert answer.json["source"] == "fallback"
    return str(answer.json["decision"])


def test_a_latched_alarm_fails_the_rows_of_its_machine_only(client: Client) -> None:
    assert decision(client, OVER, source="press 1") == "fail"
    assert decision(client, QUIET, source="press 1") == "fail"
    assert decision(client, QUIET, source="press 2") == "pass"
    assert decision(client, QUIET) == "pass"
    assert decision(client, OVER) == "fail"
    assert decision(client, QUIET) == "fail"


def test_rows_by_name_lists_and_both_protocols_speak_of_the_same_machine(client: Client) -> None:
    named = dict(zip(("f0", "f1", "f2", "f3"), QUIET, strict=True))
    threshold = 4.0
    assert decision(client, OVER, source="a") == "fail"
    assert client.post("/predict", {"features": named, "source": "a"}).json["decision"] == "fail"
    results = client.post("/predict", {"features": [QUIET, QUIET], "source": "a"}).json["results"]
    assert [result["decision"] for result in results] == ["fail", "fail"]
    for source, failed in (("a", True), ("b", False)):
        outputs = client.post(INFER, tensor(QUIET, source=source)).json["outputs"]
        assert (outputs[0]["data"][0] > threshold) is failed


def test_the_rows_of_a_list_are_seen_one_after_the_other(client: Client) -> None:
    results = client.post("/predict", {"features": [QUIET, OVER, QUIET], "source": "a"}).json["results"]
    assert [result["decision"] for result in results] == ["pass", "fail", "fail"]


def test_a_binary_body_names_its_machine_in_its_header(client: Client) -> None:
    raw = struct.pack("<4f", *OVER)
    head = (
        b'{"parameters":{"source":"a"},"inputs":[{"name":"features","shape":[1,4],"datatype":"FP32",'
        b'"parameters":{"binary_data_size":16}}]}'
    )
    client.post(INFER, head + raw, {"Inference-Header-Content-Length": str(len(head))})
    assert decision(client, QUIET, source="a") == "fail"
    assert decision(client, QUIET) == "pass"


@pytest.mark.parametrize("source", [5, True, "x" * 257])
def test_a_machine_that_is_no_short_text_is_refused(client: Client, source: object) -> None:
    answer = client.post(INFER, tensor(QUIET, source=source))
    assert answer.status == 400
    assert answer.json["error"].startswith("parameters.source: expected a text of at most 256 characters")
    answer = client.post("/predict", {"features": QUIET, "source": source})
    assert answer.status == 400
    assert answer.json["error"].startswith("source: ")


def test_a_sequence_of_tritons_is_a_source(client: Client) -> None:
    for sequence in (7, "seven"):
        client.post(INFER, tensor(OVER, sequence_id=sequence, sequence_start=True, sequence_end=False))
        assert decision(client, QUIET, source=str(sequence)) == "fail"
    client.post(INFER, tensor(QUIET, sequence_id=0))
    assert decision(client, QUIET) == "pass"


def test_requests_and_streams_over_mqtt_name_their_machine_alike(
    agent: Agent, client: Client, mosquitto: Mosquitto, tmp_path: Path
) -> None:
    agent.subscribe(mosquitto.port, spool=tmp_path / "spool")
    with connected(mosquitto, OUTPUT, "edge/line-1/predict/response") as peer:
        peer.send(INPUT, {"features": OVER, "source": "a"})
        peer.receive()
        peer.send(INPUT, tensor(OVER, source="b"))
        peer.receive()
        for source, expected in (("a", b'"fail"'), ("b", b'"fail"'), ("c", b'"pass"')):
            peer.send(PREDICT, {"features": QUIET, "source": source})
            assert expected in peer.receive().payload
    assert decision(client, QUIET, source="b") == "fail"
