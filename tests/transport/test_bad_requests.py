"""A caller's mistake: a 4xx with one sentence that names the field, and the connection goes on."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from tests.transport.agent import Agent, Client

INFER = "/v2/models/demo/infer"
LIMIT = 1 << 20  # bytes; the fixture's http.max_body_bytes


def _tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "features", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4], **changes}


def _inputs(*tensors: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"inputs": list(tensors), **more}


def _without(key: str) -> dict[str, Any]:
    return {name: value for name, value in _tensor().items() if name != key}


class Case(NamedTuple):
    """A request, and what its refusal must say."""

    path: str
    body: Any
    says: str
    status: int = 400
    headers: Mapping[str, str] = MappingProxyType({})


CASES = {
    "empty body": Case(INFER, b"", "body: empty, expected JSON"),
    "not JSON": Case(INFER, b"features=1", "body: not JSON"),
    "truncated JSON": Case(INFER, b'{"inputs": [{"name": "feat', "body: not JSON"),
    "not UTF-8": Case("/predict", b'{"features": [1], "id": "\xff\xfe"}', "UTF-8"),
    "NaN token": Case("/predict", b'{"features": [1, NaN, 3, 4]}', "write null for a missing value"),
    "Infinity token": Case(
        "/predict", b'{"features": [1, -Infinity, 3, 4]}', "write null for a missing value"
    ),
    "NaN token in a tensor": Case(
        INFER,
        b'{"inputs": [{"name": "features", "shape": [1, 4], "datatype": "FP32", "data": [NaN, 1, 2, 3]}]}',
        "write null for a missing value",
    ),
    "number beyond double": Case("/predict", b'{"features": [1, 1e999, 3, 4]}', "features[1]"),
    "number beyond float32": Case("/predict", {"features": [1, 1e300, 3, 4]}, "too large for FP32"),
    "text for a number": Case("/predict", {"features": [1, "2", 3, 4]}, "features[1]"),
    "true for a number": Case("/predict", {"features": [1, True, 3, 4]}, "features[1]"),
    "no features": Case("/predict", {"feature": [1, 2, 3, 4]}, "features"),
    "features of a wrong kind": Case("/predict", {"features": "1,2,3,4"}, "features: expected"),
    "too few features": Case("/predict", {"features": [1, 2, 3]}, "expected shape [-1, 4], got [1, 3]"),
    "ragged rows": Case(
        "/predict", {"features": [[1, 2, 3, 4], [1, 2]]}, "features: the rows have different"
    ),
    "no rows": Case("/predict", {"features": []}, "features"),
    "no bare rows": Case("/predict", [], "body"),
    "unknown feature": Case(
        "/predict",
        {"features": {"f0": 1, "f1": 1, "f2": 1, "f3 ": 1}},
        "unknown feature 'f3 '; did you mean 'f3'?",
    ),
    "absent feature": Case("/predict", {"features": {"f0": 1, "f1": 1, "f2": 1}}, "the first is 'f3'"),
    "row of mixed kinds": Case(
        "/predict", {"features": [{"f0": 1, "f1": 1, "f2": 1, "f3": 1}, [1]]}, "features[1]"
    ),
    "id too long": Case("/predict", {"features": [1, 2, 3, 4], "id": "x" * 257}, "id: expected"),
    "timeout of zero": Case("/predict", {"features": [1, 2, 3, 4], "timeout_ms": 0}, "timeout_ms"),
    "deeply nested": Case(
        "/predict", b'{"features": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too deeply"
    ),
    "deeply nested elsewhere": Case(INFER, b'{"x": ' + b"[" * 100_000, "body"),
    "deeply nested data": Case(
        INFER,
        b'{"inputs":[{"name":"features","shape":[1,4],"datatype":"FP32","data":'
        + b"[" * 9000
        + b"]" * 9000
        + b"}]}",
        "too deeply",
    ),
    "no inputs": Case(INFER, {"id": "1"}, "inputs"),
    "empty inputs": Case(INFER, _inputs(), "inputs: expected features"),
    "name absent": Case(INFER, _inputs(_without("name")), "inputs[0]"),
    "data absent": Case(INFER, _inputs(_without("data")), "inputs[0].data is absent"),
    "unknown input": Case(INFER, _inputs(_tensor(name="feature")), "expected features, got feature"),
    "duplicate inputs": Case(INFER, _inputs(_tensor(), _tensor()), "inputs[1].name: 'features' is given"),
    "unknown datatype": Case(INFER, _inputs(_tensor(datatype="FLOAT")), "inputs[0].datatype: 'FLOAT'"),
    "BYTES": Case(INFER, _inputs(_tensor(datatype="BYTES", data=["a"])), "inputs[0].datatype: 'BYTES'"),
    "text data": Case(INFER, _inputs(_tensor(data=["1", "2", "3", "4"])), "inputs[0].data[0]"),
    "float for INT32": Case(
        INFER, _inputs(_tensor(datatype="INT32", data=[1.5, 2, 3, 4])), "inputs[0].data[0]"
    ),
    "too large for UINT8": Case(
        INFER, _inputs(_tensor(datatype="UINT8", data=[300, 2, 3, 4])), "inputs[0].data"
    ),
    "wrong width": Case(INFER, _inputs(_tensor(shape=[1, 3], data=[1, 2, 3])), "expected shape [-1, 4]"),
    "wrong rank": Case(INFER, _inputs(_tensor(shape=[4])), "expected shape [-1, 4], got [4]"),
    "no dimension": Case(INFER, _inputs(_tensor(shape=[], data=[])), "inputs[0]"),
    "negative dimension": Case(INFER, _inputs(_tensor(shape=[-1, 4])), "inputs[0].shape[0]"),
    "huge shape": Case(INFER, _inputs(_tensor(shape=[10**9, 4])), "wants 4000000000 elements, got 4"),
    "monstrous shape": Case(INFER, _inputs(_tensor(shape=[2**62, 2**62])), "inputs[0].shape[0]"),
    "dimension beyond 64 bit": Case(INFER, _inputs(_tensor(shape=[10**30, 4])), "inputs[0].shape[0]"),
    "nine dimensions": Case(INFER, _inputs(_tensor(shape=[1] * 9)), "inputs[0].shape"),
    "nested unlike its shape": Case(
        INFER, _inputs(_tensor(shape=[4, 1], data=[[1, 2, 3, 4]])), "inputs[0].data"
    ),
    "zero rows": Case(INFER, _inputs(_tensor(shape=[0, 4], data=[])), "0 rows"),
    "too many rows": Case(INFER, _inputs(_tensor(shape=[1025, 4], data=[1] * 4100)), "1025 rows"),
    "unknown output": Case(
        INFER, _inputs(_tensor(), outputs=[{"name": "scores"}]), "outputs[0].name: 'scores'"
    ),
    "output twice": Case(
        INFER, _inputs(_tensor(), outputs=[{"name": "score"}, {"name": "score"}]), "outputs[1].name"
    ),
    "timeout of text": Case(INFER, _inputs(_tensor(), parameters={"timeout": "soon"}), "parameters.timeout"),
    "unknown model": Case("/v2/models/demu/infer", _inputs(_tensor()), "no model 'demu' here", 404),
    "unknown version": Case(
        "/v2/models/demo/versions/9.9.9/infer",
        _inputs(_tensor()),
        "has no version '9.9.9' here, it is 1.0.0",
        404,
    ),
    "unknown model and a bad body": Case("/v2/models/demu/infer", b"{", "no model 'demu' here", 404),
    "unknown version and a bad tensor": Case(
        "/v2/models/demo/versions/9.9.9/infer",
        _inputs(_tensor(datatype="FP99")),
        "no version '9.9.9' here",
        404,
    ),
    "unknown path": Case("/v3/models", b"{}", "no such path: '/v3/models'", 404),
    "unknown model path": Case("/v2/models/demo/explain", b"{}", "no such path", 404),
    "binary size not a number": Case(
        INFER, _inputs({**_without("data"), "parameters": {"binary_data_size": "16"}}), "binary_data_size"
    ),
    "binary size without bytes": Case(
        INFER, _inputs({**_without("data"), "parameters": {"binary_data_size": 16}}), "the body has 0 left"
    ),
    "binary size and data": Case(
        INFER, _inputs(_tensor(parameters={"binary_data_size": 16})), "expected one of"
    ),
    "header length beyond the body": Case(
        INFER,
        b"{}",
        "Inference-Header-Content-Length is 99",
        headers={"Inference-Header-Content-Length": "99"},
    ),
    "header length not a number": Case(
        INFER, b"{}", "Inference-Header-Content-Length", headers={"Inference-Header-Content-Length": "-1"}
    ),
    "raw body of a wrong size": Case(
        INFER, b"123", "one row of 'features' has 16", headers={"Inference-Header-Content-Length": "0"}
    ),
    "bytes left over": Case(
        INFER, b'{"inputs":[]}123', "3 bytes after", headers={"Inference-Header-Content-Length": "13"}
    ),
    "compressed body": Case("/predict", b"xx", "Content-Encoding", 415, {"Content-Encoding": "gzip"}),
    "body over the limit": Case("/predict", b" " * (LIMIT + 1), f"more than {LIMIT} bytes", 413),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_malformed_request_is_refused_and_the_connection_stays_usable(
    agent: Agent, client: Client, case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        answer = client.post(case.path, case.body, dict(case.headers))

    assert answer.status == case.status
    assert list(answer.json) == ["error"]
    assert case.says in answer.json["error"]
    assert "\n" not in answer.json["error"]
    assert len(answer.json["error"]) < 400
    assert client.still_open()
    assert client.post("/predict", {"features": [3, 3, 3, 3]}).json["score"] == 9.0
    assert not caplog.records  # a client's mistake is not an event of ours
    assert agent.http is not None
    assert agent.http.body_bytes == 0


def test_a_body_of_17_megabytes_is_refused_at_the_default_limit(agent: Agent) -> None:
    client = Client(agent.listen().port)
    answer = client.post("/predict", b"[" + b" " * (17 << 20))
    assert (answer.status, answer.json) == (413, {"error": "body: more than 16777216 bytes"})
    assert client.still_open()
    client.close()


def test_an_endless_chunked_body_is_cut_off(agent: Agent) -> None:
    port = agent.listen(max_body_bytes=1000).port
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        raw.sendall((b"400\r\n" + b"x" * 1024 + b"\r\n") * 20)
        answer = raw.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"Connection: close" in answer
