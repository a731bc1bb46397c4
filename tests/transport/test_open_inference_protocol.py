"""Open Inference Protocol v2 over HTTP, as stock clients speak it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.support.bundles import expected_score, tiny_bundle
from tests.transport.agent import Agent, Client

ROWS = np.array([[1, 2, 3, 4], [0.5, -0.5, 0.5, -0.5], [3, 3, 3, 3]], np.float32)


@pytest.fixture
def stock(agent: Agent) -> Iterator[triton.InferenceServerClient]:
    """NVIDIA's own client, as it comes from the package index."""
    client = triton.InferenceServerClient(f"127.0.0.1:{agent.listen().port}")
    yield client
    client.close()


def _tensor(*, binary: bool) -> triton.InferInput:
    tensor = triton.InferInput("features", ROWS.shape, "FP32")
    tensor.set_data_from_numpy(ROWS, binary_data=binary)
    return tensor


def test_tritonclient_finds_server_and_model_alive_and_ready(stock: triton.InferenceServerClient) -> None:
    assert stock.is_server_live()
    assert stock.is_server_ready()
    assert stock.is_model_ready("demo")
    assert stock.is_model_ready("demo", "1.0.0")
    assert not stock.is_model_ready("absent")


def test_tritonclient_reads_the_metadata(stock: triton.InferenceServerClient) -> None:
    server = stock.get_server_metadata()
    assert server["name"] == "edge-agent"
    assert "binary_tensor_data" in server["extensions"]

    assert stock.get_model_metadata("demo", "1.0.0") == {
        "name": "demo",
        "versions": ["1.0.0"],
        "platform": "onnx_onnxv1",
        "inputs": [{"name": "features", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "score", "datatype": "FP32", "shape": [-1]}],
    }


@pytest.mark.parametrize("binary_in", [True, False], ids=["binary in", "json in"])
@pytest.mark.parametrize("binary_out", [True, False, None], ids=["binary out", "json out", "default out"])
def test_tritonclient_infers(
    stock: triton.InferenceServerClient, binary_in: bool, binary_out: bool | None
) -> None:
    outputs = None if binary_out is None else [triton.InferRequestedOutput("score", binary_data=binary_out)]

    result = stock.infer(
        "demo", [_tensor(binary=binary_in)], "1.0.0", outputs=outputs, request_id="request-7"
    )

    np.testing.assert_allclose(result.as_numpy("score"), expected_score(ROWS), rtol=1e-6)
    response = result.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == (
        "request-7",
        "demo",
        "1.0.0",
    )
    assert response["parameters"] == {"source": "model", "reason": "ok"}


def test_tritonclient_reads_our_errors(stock: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="no model 'absent' here") as raised:
        stock.infer("absent", [_tensor(binary=True)])
    assert raised.value.status() == "404"


def test_tritonclient_reads_the_repository_index(stock: triton.InferenceServerClient) -> None:
    (entry,) = stock.get_model_repository_index()
    assert (entry["name"], entry["version"], entry["state"]) == ("demo", "1.0.0", "READY")


def test_flat_and_nested_data_mean_the_same(client: Client) -> None:
    flat, nested = (
        client.post(
            "/v2/models/demo/infer",
            {"inputs": [{"name": "features", "shape": [3, 4], "datatype": "FP32", "data": data}]},
        )
        for data in (ROWS.ravel().tolist(), ROWS.tolist())
    )
    assert flat.status == nested.status == 200
    assert flat.body == nested.body
    assert flat.json["outputs"][0]["shape"] == [3]


@pytest.mark.parametrize("datatype", ["FP32", "FP64", "FP16", "INT64", "INT8", "UINT8"])
def test_any_numeric_datatype_is_cast_to_what_the_model_takes(client: Client, datatype: str) -> None:
    tensor = {"name": "features", "shape": [1, 4], "datatype": datatype, "data": [1, 2, 3, 4]}
    answer = client.post("/v2/models/demo/infer", {"inputs": [tensor]})
    assert answer.json["outputs"][0]["data"] == [7.5]


def test_a_raw_body_is_one_row_and_answered_raw(client: Client) -> None:
    answer = client.post(
        "/v2/models/demo/versions/1.0.0/infer", ROWS[0].tobytes(), {"Inference-Header-Content-Length": "0"}
    )
    size = int(answer.headers["inference-header-content-length"])
    head = json.loads(answer.body[:size])
    assert head["outputs"] == [
        {"name": "score", "shape": [1], "datatype": "FP32", "parameters": {"binary_data_size": 4}}
    ]
    assert np.frombuffer(answer.body[size:], "<f4").tolist() == [7.5]


def test_null_is_a_missing_value(client: Client) -> None:
    tensor = {"name": "features", "shape": [1, 4], "datatype": "FP32", "data": [1, None, None, 1]}
    assert client.post("/v2/models/demo/infer", {"inputs": [tensor]}).json["outputs"][0]["data"] == [0.5]


def test_without_a_model_the_rules_answer_in_the_same_form(agent: Agent, client: Client) -> None:
    agent.unload("demo")
    tensor = {"name": "features", "shape": [1, 4], "datatype": "FP32", "data": [3, 3, 3, 3]}

    answer = client.post("/v2/models/demo/infer", {"inputs": [tensor]})

    assert answer.status == 200
    assert answer.json["parameters"] == {"source": "fallback", "reason": "unloaded"}
    assert answer.json["outputs"][0]["data"][0] > 4.0
    (entry,) = client.post("/v2/repository/index", b"").json
    assert (entry["state"], entry["reason"]) == ("UNAVAILABLE", "unloaded by an operator")
    assert client.post("/v2/repository/index", {"ready": True}).json == []


def test_an_agent_whose_model_cannot_answer_at_all_is_alive_but_not_ready(agent: Agent) -> None:
    agent.serve(None, "second")
    client = Client(agent.listen().port)
    assert client.get("/v2/health/live").status == 200
    assert (client.get("/v2/health/ready").status, client.get("/v2/health/ready").json) == (
        503,
        {"ready": False},
    )
    assert client.get("/v2/models/second/ready").status == 503
    assert client.get("/v2/models/demo/ready").status == 200
    assert client.get("/v2/models/second").status == 503
    client.close()


def test_two_models_are_served_side_by_side(agent: Agent, client: Client, tmp_path: Path) -> None:
    agent.serve(tiny_bundle(tmp_path / "wide", "wide", "2.1.0", features=6))
    tensor = {"name": "features", "shape": [1, 6], "datatype": "FP32", "data": [2.0] * 6}
    assert client.post("/v2/models/wide/infer", {"inputs": [tensor]}).json["outputs"][0]["data"] == [4.0]
    assert client.post("/predict", {"features": [2.0] * 6, "model": "wide"}).json["model"] == "wide"
    ambiguous = client.post("/predict", {"features": [2.0] * 6})
    assert (ambiguous.status, "demo, wide" in ambiguous.json["error"]) == (400, True)


def test_statistics_count_what_was_answered(
    agent: Agent, client: Client, stock: triton.InferenceServerClient
) -> None:
    (fresh,) = stock.get_inference_statistics()["model_stats"]
    assert (fresh["name"], fresh["version"], fresh["inference_count"]) == ("demo", "1.0.0", 0)
    assert fresh["last_inference"] == 0
    before = time.time()
    stock.infer("demo", [_tensor(binary=True)])
    stock.infer("demo", [_tensor(binary=True)])
    (computed,) = stock.get_inference_statistics("demo")["model_stats"]
    agent.unload("demo")
    stock.infer("demo", [_tensor(binary=True)])

    (stats,) = stock.get_inference_statistics("demo", "1.0.0")["model_stats"]

    assert stats["inference_count"] == 9
    assert stats["execution_count"] == 2
    assert computed["inference_stats"]["compute_infer"]["count"] == 2
    assert computed["inference_stats"]["queue"]["count"] == 2
    times = {name: duration["ns"] for name, duration in computed["inference_stats"].items()}
    assert 0 < times["compute_infer"] < times["success"]
    assert 0 < times["queue"] + times["compute_infer"] <= times["success"]
    assert stats["fallback_count"] == 3
    assert before * 1000 - 1 <= stats["last_inference"] <= time.time() * 1000 + 1
    success = stats["inference_stats"]["success"]
    assert success["count"] == 3
    assert success["ns"] > 0
    assert stats["inference_stats"]["fail"] == {"count": 0, "ns": 0}
    assert client.get("/v2/models/stats").json == client.get("/v2/models/demo/stats").json
    assert client.get("/v2/models/absent/stats").status == 404
    assert client.get("/v2/models/demo/versions/9.9.9/stats").status == 404
    assert "statistics" in stock.get_server_metadata()["extensions"]


def test_the_repository_index_filters_by_what_is_asked(client: Client) -> None:
    assert len(client.post("/v2/repository/index", {"ready": False}).json) == 1
    refused = client.post("/v2/repository/index", {"ready": "yes"})
    assert (refused.status, "ready: expected true or false" in refused.json["error"]) == (400, True)


def test_load_and_unload_by_a_stock_client_are_answered_on_the_control_socket_only(
    stock: triton.InferenceServerClient,
) -> None:
    for ask in (stock.load_model, stock.unload_model):
        with pytest.raises(InferenceServerException, match="only on the control socket") as raised:
            ask("demo")
        assert raised.value.status() == "403"
