from __future__ import annotations

import numpy as np
import pytest

from edge_agent.contract.manifest import Datatype, TensorSpec
from edge_agent.errors import InvalidInput
from edge_agent.serving.tensors import conform, datatype_of, numpy_dtype, to_array, to_numpy

X = TensorSpec("x", Datatype.FP32, (-1, 3))
N = TensorSpec("n", Datatype.INT8, (-1,))


@pytest.mark.parametrize("datatype", Datatype)
def test_every_datatype_survives_the_way_into_a_golden_array_and_back(datatype):
    tensor = np.array([[0, 1], [1, 0]]).astype(numpy_dtype(datatype))
    assert datatype_of(tensor.dtype) is datatype
    again = to_numpy(to_array("t", tensor))
    assert again.dtype == tensor.dtype
    assert np.array_equal(again, tensor)


def test_numbers_of_another_type_are_cast_where_nothing_is_lost():
    feeds, rows = conform([X, N], {"x": np.ones((2, 3)), "n": np.array([1.0, -5.0])}, 10)
    assert (feeds["x"].dtype, feeds["n"].dtype, rows) == (np.float32, np.int8, 2)


@pytest.mark.parametrize(
    ("specs", "inputs", "says"),
    [
        ([X], {}, "inputs: expected x, got none"),
        ([X], {"y": np.ones((1, 3))}, "inputs: expected x, got y"),
        ([X], {"x": np.ones((1, 3)), "y": np.ones(1)}, "inputs: expected x, got x, y"),
        ([X], {"x": np.ones((1, 4))}, r"'x': expected shape \[-1, 3\], got \[1, 4\]"),
        ([X], {"x": np.ones(3)}, r"'x': expected shape \[-1, 3\], got \[3\]"),
        ([X], {"x": np.array([["a", "b", "c"]])}, "'x': expected FP32"),
        ([X], {"x": np.ones((0, 3))}, "0 rows in one request, expected 1 to 10"),
        ([X], {"x": np.ones((11, 3))}, "11 rows in one request, expected 1 to 10"),
        ([X, N], {"x": np.ones((2, 3)), "n": np.ones(3)}, "'n': 3 rows, the others have 2"),
        ([N], {"n": np.array([300.0])}, "'n': values do not fit INT8"),
        ([N], {"n": np.array([0.5])}, "'n': values do not fit INT8"),
        ([N], {"n": np.array([np.nan])}, "'n': values do not fit INT8"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(specs, inputs, says):
    with pytest.raises(InvalidInput, match=says):
        conform(specs, inputs, 10)


def test_a_value_beyond_float32_becomes_infinity_for_the_model_to_refuse():
    feeds, _ = conform([X], {"x": np.array([[1e300, 0, 0]])}, 10)
    assert np.isinf(feeds["x"][0, 0])
