"""Activation functions that exporters spell out are put together, and nothing else is."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantize import activations

# Steps name their inputs: x, a constant, or the number of an earlier step. Then: how many nodes are left.
FORMS = {
    "hard-swish, divided": ("Add x three; Clip 0 zero six; Mul x 1; Div 2 six", 2),
    "hard-swish, multiplied": ("Add three x; Clip 0 zero six; Mul 1 x; Mul 2 sixth", 2),
    "gelu, halved last": ("Div x root; Erf 0; Add 1 one; Mul x 2; Mul 3 half", 1),
    "gelu, halved first": ("Mul x inverse; Erf 0; Add 1 one; Mul x half; Mul 3 2", 1),
    "swish": ("Sigmoid x; Mul x 0", 1),
    "not of the same tensor": ("Add x three; Clip 0 zero six; Mul 1 1; Div 2 six", 4),
    "another constant": ("Add x one; Clip 0 zero six; Mul x 1; Div 2 six", 4),
    "another root": ("Div x three; Erf 0; Add 1 one; Mul x 2; Mul 3 half", 5),
}
CONSTANTS = {
    "zero": 0.0, "one": 1.0, "three": 3.0, "six": 6.0, "half": 0.5, "sixth": 1 / 6,
    "root": math.sqrt(2), "inverse": math.sqrt(0.5),
}  # fmt: skip


def model_of(steps: list[str], outputs=()) -> onnx.ModelProto:
    nodes = []
    for index, step in enumerate(steps):
        kind, *names = step.split()
        inputs = [f"t{name}" if name.isdigit() else name for name in names]
        nodes.append(helper.make_node(kind, inputs, [f"t{index}"]))
    made = [*outputs, f"t{len(steps) - 1}"]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 8]) for name in made],
        [numpy_helper.from_array(np.float32(value), name) for name, value in CONSTANTS.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(proto: onnx.ModelProto, rows: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": rows})[-1]


@pytest.mark.parametrize("form", FORMS)
def test_a_spelled_out_activation_becomes_one_or_two_nodes_and_computes_the_same(form):
    text, left = FORMS[form]
    steps = text.split(";")
    proto = model_of(steps)
    rows = np.random.default_rng(0).uniform(-6, 6, (64, 8)).astype(np.float32)
    expected = run(proto, rows)
    changes = activations.fuse(proto)
    onnx.checker.check_model(proto)
    assert (len(proto.graph.node), changes) == (left, int(left < len(steps)))
    assert np.allclose(run(proto, rows), expected, atol=2e-6)


def test_an_activation_whose_inside_is_read_elsewhere_stays_as_it_is():
    steps = FORMS["hard-swish, divided"][0].split(";")
    for inside in ("t0", "t1", "t2"):
        proto = model_of(steps, outputs=(inside,))
        assert activations.fuse(proto) == 0
        assert len(proto.graph.node) == len(steps)
