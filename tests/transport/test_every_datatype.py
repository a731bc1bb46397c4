"""Every element type goes in and comes out unchanged: JSON, binary and raw, by a stock client and by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton

from edge_agent.contract.manifest import Datatype
from edge_agent.serving.tensors import numpy_dtype
from tests.transport.agent import Agent, Client, running
from tests.transport.raw_models import ELEMENT, echo_bundle

VALUES: dict[str, list[Any]] = {
    "b": [True, False, True, True, False, False],
    "u": [0, 1, 2, 100, 254, 255],
    "i": [0, 1, -1, 100, 127, -128],
    "f": [0.0, -0.5, 1.5, 0.333251953125, 65504.0, -65504.0],
}


def _values(datatype: Datatype) -> np.ndarray[Any, Any]:
    dtype = numpy_dtype(datatype)
    values = np.array(VALUES[dtype.kind], dtype)
    if dtype.kind in "iu":
        values[-1], values[0] = np.iinfo(dtype).max, np.iinfo(dtype).min
    return values.reshape(2, 3)


def _name(datatype: Datatype) -> str:
    return f"echo-{datatype.value.lower()}"


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    folder = tmp_path_factory.mktemp("models")
    with running() as agent:
        for datatype in ELEMENT:
            name = _name(datatype)
            agent.serve(echo_bundle(folder / name, name, ("x", datatype, (-1, 3))))
        agent.serve(
            echo_bundle(
                folder / "pair", "pair", ("a", Datatype.FP16, (-1, 2)), ("b", Datatype.INT64, (-1, -1, 2))
            )
        )
        agent.serve(echo_bundle(folder / "long", "long", ("x", Datatype.INT16, (-1, -1))))
        agent.listen()
        yield agent


@pytest.fixture
def client(agent: Agent) -> Iterator[Client]:
    assert agent.http is not None
    client = Client(agent.http.port)
    yield client
    client.close()


@pytest.fixture
def stock(agent: Agent) -> Iterator[triton.InferenceServerClient]:
    assert agent.http is not None
    client = triton.InferenceServerClient(f"127.0.0.1:{agent.http.port}")
    yield client
    client.close()


def test_the_table_of_types_is_complete() -> None:
    assert set(ELEMENT) == set(Datatype)


# tritonclient sends and reads FP16 as binary only, as the protocol has it.
WAYS = [
    pytest.param(datatype, binary_in, binary_out, id=f"{datatype.value} {how_in} in, {how_out} out")
    for datatype in ELEMENT
    for binary_in, how_in in ((True, "binary"), (False, "json"))
    for binary_out, how_out in ((True, "binary"), (False, "json"))
    if datatype is not Datatype.FP16 or (binary_in and binary_out)
]


@pytest.mark.parametrize(("datatype", "binary_in", "binary_out"), WAYS)
def test_tritonclient_gets_back_what_it_sent(
    stock: triton.InferenceServerClient, datatype: Datatype, binary_in: bool, binary_out: bool
) -> None:
    values = _values(datatype)
    tensor = triton.InferInput("x", values.shape, datatype.value)
    tensor.set_data_from_numpy(values, binary_data=binary_in)

    result = stock.infer(
        _name(datatype), [tensor], outputs=[triton.InferRequestedOutput("x_out", binary_data=binary_out)]
    )

    got = result.as_numpy("x_out")
    assert got.dtype == values.dtype
    np.testing.assert_array_equal(got, values)


@pytest.mark.parametrize("datatype", ELEMENT, ids=lambda datatype: datatype.value)
def test_a_raw_body_is_a_row_of_any_type(client: Client, datatype: Datatype) -> None:
    row = _values(datatype)[:1]
    answer = client.post(
        f"/v2/models/{_name(datatype)}/infer", row.tobytes(), {"Inference-Header-Content-Length": "0"}
    )
    assert answer.status == 200, answer.body
    size = int(answer.headers["inference-header-content-length"])
    (output,) = json.loads(answer.body[:size])["outputs"]
    assert (output["datatype"], output["shape"]) == (datatype.value, [1, 3])
    assert answer.body[size:] == row.tobytes()


def test_fp16_may_also_be_written_as_numbers(client: Client) -> None:
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP16", "data": [0.5, -2, 65504]}
    answer = client.post("/v2/models/echo-fp16/infer", {"inputs": [tensor]})
    assert answer.json["outputs"][0]["data"] == [0.5, -2.0, 65504.0]
    beyond = client.post("/v2/models/echo-fp16/infer", {"inputs": [{**tensor, "data": [0.5, -2, 1e6]}]})
    assert (beyond.status, "too large for FP16" in beyond.json["error"]) == (400, True)


def test_a_raw_body_of_a_model_with_one_varying_dimension_takes_its_length_from_it(client: Client) -> None:
    values = np.arange(7, dtype="<i2")
    raw = {"Inference-Header-Content-Length": "0"}
    answer = client.post("/v2/models/long/infer", values.tobytes(), raw)
    size = int(answer.headers["inference-header-content-length"])
    assert json.loads(answer.body[:size])["outputs"][0]["shape"] == [1, 7]
    assert answer.body[size:] == values.tobytes()
    odd = client.post("/v2/models/long/infer", b"abc", raw)
    assert (odd.status, "3 bytes" in odd.json["error"]) == (400, True)


def test_a_raw_body_of_a_model_with_two_inputs_is_refused(client: Client) -> None:
    answer = client.post("/v2/models/pair/infer", b"\0" * 8, {"Inference-Header-Content-Length": "0"})
    assert (answer.status, "takes 2" in answer.json["error"]) == (400, True)


def test_a_raw_body_that_is_announced_as_json_is_refused(client: Client) -> None:
    answer = client.post(
        "/v2/models/echo-fp32/infer",
        b'{"inputs":[]',  # as long as a row of three floats
        {"Inference-Header-Content-Length": "0", "Content-Type": "application/json"},
    )
    assert (answer.status, "Content-Type" in answer.json["error"]) == (400, True)


def test_binary_and_json_tensors_may_be_mixed_and_outputs_chosen(
    stock: triton.InferenceServerClient,
) -> None:
    a, b = np.array([[1, 2]], np.float16), np.arange(6, dtype=np.int64).reshape(1, 3, 2)
    first = triton.InferInput("a", a.shape, "FP16")
    first.set_data_from_numpy(a, binary_data=True)
    second = triton.InferInput("b", b.shape, "INT64")
    second.set_data_from_numpy(b, binary_data=False)

    both = stock.infer(
        "pair",
        [first, second],
        outputs=[
            triton.InferRequestedOutput("b_out", binary_data=False),
            triton.InferRequestedOutput("a_out", binary_data=True),
        ],
    )
    np.testing.assert_array_equal(both.as_numpy("a_out"), a)
    np.testing.assert_array_equal(both.as_numpy("b_out"), b)

    only = stock.infer("pair", [first, second], outputs=[triton.InferRequestedOutput("b_out")])
    assert [output["name"] for output in only.get_response()["outputs"]] == ["b_out"]
