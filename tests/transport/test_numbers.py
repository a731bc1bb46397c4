"""Numbers go straight to arrays, and mean what the long way would have made of them."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.transport import numbers

FINITE = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**64 - 1)
LAYOUTS = st.sampled_from([{}, {"indent": 1}, {"separators": (",", ":")}])


@given(st.lists(FINITE, min_size=1, max_size=40), LAYOUTS)
def test_a_row_is_what_the_long_way_makes_of_it(row, layout):
    data = json.dumps(row, **layout).encode()
    expected = np.array(msgspec.json.decode(data, type=list[float]))
    assert np.array_equal(numbers.rows(data), expected)
    body = json.dumps({"features": row}, **layout).encode()
    assert np.array_equal(numbers.only_field(body, "features"), expected)


@given(st.integers(2, 5).flatmap(lambda w: st.lists(st.lists(FINITE, min_size=w, max_size=w), min_size=1)))
def test_rows_are_what_the_long_way_makes_of_them(rows):
    data = json.dumps(rows).encode()
    assert np.array_equal(numbers.rows(data), np.array(msgspec.json.decode(data, type=list[list[float]])))


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"[[]]", b"[[],[]]", b"[1,null]", b"[1,[2]]", b"[[1],2]", b"[[1,2],[3]]", b"[[[1]]]",
     b"[[1,2],[[3],4]]", b"[true]", b'["1"]', b'["["]', b"[1", b"[1]x", b"[NaN]", b"[1e400]", b"[01]",
     b"\xff", b"{}", b'{"a":[1]}', b"3", b'"[1]"', b"[" * 5000, b"[1" + b",1" * 200_000 + b"]"],
)  # fmt: skip
def test_whatever_is_not_plainly_rows_of_numbers_goes_the_long_way(data):
    assert numbers.rows(data) is None
    assert numbers.rows(b"[1, 2]").tolist() == [1, 2]


@pytest.mark.parametrize(
    "body",
    [b"{}", b"[1]", b'{"features":[1],"id":"7"}', b'{"features":[1],"features":[2]}', b'{"other":[1]}',
     b'{"features":3}', b'{"features":{"a":[1]}}', b'{"features":[1]', b'{"features":"[1]"}'],
)  # fmt: skip
def test_an_object_with_more_than_the_field_goes_the_long_way(body):
    assert numbers.only_field(body, "features") is None
    assert numbers.only_field(b'{"features":[1, 2]}', "features").tolist() == [1, 2]


def _infer(name: str, shape: list, datatype: str, data: list) -> bytes:
    tensor = {"name": name, "shape": shape, "datatype": datatype, "data": data}
    return json.dumps({"inputs": [tensor]}).encode()


@given(st.text(max_size=8), st.lists(st.integers(0, 9), max_size=3), st.lists(FINITE, min_size=1, max_size=9))
def test_the_one_input_of_a_request_is_what_the_long_way_makes_of_it(name, shape, data):
    found = numbers.only_input(_infer(name, shape, "FP32", data))
    if "[" in name:
        assert found is None
    else:
        assert (found.name, found.shape, found.datatype) == (name, shape, "FP32")
        assert np.array_equal(found.numbers, np.array(data, dtype=np.float64))


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"3", b"{}", b'{"inputs":[]}', b'{"inputs":{}}', b'{"inputs":[3]}', b'{"inputs":[{}]}',
        _infer("x", [1], "FP32", []), _infer("x", [1], "FP32", [[1]]), _infer("x", [1], "FP32", [None]),
        _infer("x", [1.0], "FP32", [1]), _infer("x", [True], "FP32", [1]), _infer("x", [[1]], "FP32", [1]),
        _infer("x", [1], "FP32", [1])[:-1], _infer("x", [1], "FP32", [1]) + b"x",
        _infer("x", [1], "FP32", [1])[:-1] + b',"id":"7"}',
        _infer("x", [1], "FP32", [1])[:-1] + b',"inputs":[]}',
        b'{"inputs":[{"name":"x","name":"y","datatype":"FP32","data":[1]}]}',
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1],"parameters":{}}]}',
        b'{"inputs":[{"name":3,"shape":[1],"datatype":"FP32","data":[1]}]}',
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1]},{}]}',
    ],
)  # fmt: skip
def test_a_request_with_more_than_one_plain_input_goes_the_long_way(body):
    assert numbers.only_input(body) is None
    assert numbers.only_input(_infer("x", [1], "FP32", [5])).numbers.tolist() == [5.0]
