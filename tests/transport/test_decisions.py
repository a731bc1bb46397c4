"""``POST /predict``: a row of numbers in, pass or fail out."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support.bundles import tiny_bundle
from tests.transport.agent import Agent, Client, running


def test_one_row_gets_one_object_that_says_who_decided_and_why(client: Client) -> None:
    answer = client.post("/predict", {"features": [3, 3, 3, 3], "id": "part-17"})
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    result = answer.json
    assert 0 <= result.pop("latency_ms") < 20_000
    assert result.pop("confidence") == pytest.approx(0.9933, abs=1e-4)
    assert result == {
        "decision": "fail",
        "score": 9.0,
        "threshold": 4.0,
        "source": "model",
        "reason": "ok",
        "model": "demo",
        "version": "1.0.0",
        "id": "part-17",
    }


def test_the_id_is_absent_when_none_was_given(client: Client) -> None:
    assert "id" not in client.post("/predict", {"features": [1, 1, 1, 1]}).json


@pytest.mark.parametrize(
    "body",
    [
        {"features": [[1, 1, 1, 1], [3, 3, 3, 3]]},
        [[1, 1, 1, 1], [3, 3, 3, 3]],
        {"features": [{"f0": 1, "f1": 1, "f2": 1, "f3": 1}, {"f3": 3, "f2": 3, "f1": 3, "f0": 3}]},
        b" [\n\t[1,1,1,1],\r\n [ 3 , 3.0, 3e0, 0.3E1 ] ] ",
    ],
    ids=["rows", "bare rows", "rows by name", "odd spaces"],
)
def test_a_list_of_rows_gets_a_list_of_results(client: Client, body: object) -> None:
    results = client.post("/predict", body).json["results"]
    assert [(result["decision"], result["score"]) for result in results] == [("pass", 1.0), ("fail", 9.0)]


@pytest.mark.parametrize(
    "features",
    [
        [1, 1, 0, 0],
        {"f3": 0, "f0": 1, "f1": 1, "f2": 0},
        [1, None, None, 1],
        {"f0": 1, "f1": None, "f2": 1, "f3": 0},
    ],
    ids=["position", "name", "position with nulls", "name with nulls"],
)
def test_one_row_by_position_or_by_name_with_null_for_missing(client: Client, features: object) -> None:
    result = client.post("/predict", {"features": features}).json
    assert (result["decision"], result["score"]) == ("pass", 0.5)


def test_a_bare_list_of_numbers_is_one_row(client: Client) -> None:
    assert client.post("/predict", [3, 3, 3, 3]).json["decision"] == "fail"


def test_a_single_row_in_a_list_still_gets_a_list(client: Client) -> None:
    assert len(client.post("/predict", {"features": [[3, 3, 3, 3]]}).json["results"]) == 1


def test_the_rules_answer_for_an_unloaded_model(agent: Agent, client: Client) -> None:
    agent.unload("demo")
    result = client.post("/predict", {"features": [3, 3, 3, 3]}).json
    assert (result["decision"], result["source"], result["reason"]) == ("fail", "fallback", "unloaded")
    assert result["score"] > result["threshold"]


def test_a_model_that_answers_nonsense_is_overruled(agent: Agent, client: Client, tmp_path: Path) -> None:
    agent.serve(tiny_bundle(tmp_path / "nonsense", "nonsense", non_finite_above=2.0))
    result = client.post("/predict", {"features": [3, 3, 3, 3], "model": "nonsense"}).json
    assert (result["decision"], result["source"], result["reason"]) == ("fail", "fallback", "non_finite")


def test_no_time_left_is_answered_by_the_rules_on_asyncios_own_loop(tmp_path: Path) -> None:
    with running(asyncio.new_event_loop()) as agent:
        agent.serve(tiny_bundle(tmp_path / "bundle"))
        client = Client(agent.listen().port)
        plain = client.post("/predict", {"features": [3, 3, 3, 3]}).json
        hurried = client.post("/predict", {"features": [3, 3, 3, 3], "timeout_ms": 1e-6}).json
        client.close()
    assert (plain["decision"], plain["source"], plain["latency_ms"] > 0) == ("fail", "model", True)
    assert (hurried["decision"], hurried["source"], hurried["reason"]) == ("fail", "fallback", "deadline")


def test_an_agent_without_any_model_says_so(client: Client, tmp_path: Path) -> None:
    answer = client.post("/predict", {"features": [1], "model": "absent"})
    assert answer.status == 404
    assert "this agent serves demo" in answer.json["error"]


def test_requests_are_counted_by_outcome(agent: Agent, client: Client) -> None:
    client.post("/predict", {"features": [3, 3, 3, 3]})
    client.post("/predict", {"features": ["x"]})
    client.get("/metrics")
    assert agent.counted("http", "ok") == 1
    assert agent.counted("http", "client_error") == 1
    assert agent.counted("http", "error") == 0
