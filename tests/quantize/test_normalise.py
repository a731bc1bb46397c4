"""Passes: what they do to a graph, and that the graph still computes what it computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantize.load import load_model
from quantize.normalise import NormalForm, normalise
from tests.quantize import models

RANDOM = np.random.default_rng(0)


def run(model: onnx.ModelProto | Path, rows: np.ndarray) -> np.ndarray:
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"]).run(None, {"x": rows})[0]


def normal(path: Path, rows: np.ndarray) -> NormalForm:
    """Normalise, and check against the file as it was."""
    form = normalise(load_model(path), {"x": rows})
    expected, got = run(path, rows), run(form.proto, rows)
    assert np.abs(got - expected).max() <= 1e-5 * max(np.abs(expected).max(), 1e-3)
    return form


def operators(form: NormalForm) -> list[str]:
    return [node.op_type for node in form.proto.graph.node]


def noise(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def constants(**values: np.ndarray | float) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, np.float32) for name, value in values.items()}


@pytest.mark.parametrize("layer", ["Conv", "ConvTranspose", "depthwise"])
def test_sub_mul_add_chains_and_batch_norm_become_the_weights_of_a_convolution(tmp_path, layer):
    kind = "Conv" if layer == "depthwise" else layer
    weight = {"Conv": noise(6, 4, 3, 3), "ConvTranspose": noise(4, 6, 3, 3), "depthwise": noise(6, 1, 3, 3)}[
        layer
    ]
    channels = 6 if layer == "depthwise" else 4
    attributes = {"group": 6} if layer == "depthwise" else {}
    weights = constants(
        K=weight, mean=noise(1, 6, 1, 1), scale=noise(6, 1, 1), shift=noise(1, 6, 1, 1), half=0.5,
        g=noise(6), b=noise(6), m=noise(6), v=np.abs(noise(6)) + 0.1,
    )  # fmt: skip
    nodes = [
        helper.make_node(kind, ["x", "K"], ["c"], **attributes),
        helper.make_node("Sub", ["c", "mean"], ["d"]),
        helper.make_node("Mul", ["scale", "d"], ["e"]),
        helper.make_node("Add", ["e", "shift"], ["f"]),
        helper.make_node("Div", ["f", "half"], ["h"]),
        helper.make_node("BatchNormalization", ["h", "g", "b", "m", "v"], ["i"]),
        helper.make_node("Relu", ["i"], ["y"]),
    ]
    path = models.save(
        tmp_path / "chain.onnx", nodes, weights, [("x", TensorProto.FLOAT, ["N", channels, 8, 8])],
        [("y", ["N", 6, "h", "w"])],
    )  # fmt: skip
    assert operators(normal(path, noise(20, channels, 8, 8))) == [kind, "Relu"]


def test_affine_chains_become_the_weights_of_a_dense_layer(tmp_path):
    weights = constants(W=noise(8, 5), mean=noise(5), scale=noise(1, 5), one=1.0, shift=noise(5))
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["a"]),
        helper.make_node("Sub", ["a", "mean"], ["b"]),
        helper.make_node("Mul", ["b", "scale"], ["c"]),
        helper.make_node("Sub", ["one", "c"], ["d"]),
        helper.make_node("Neg", ["d"], ["e"]),
        helper.make_node("Add", ["e", "shift"], ["y"]),
    ]
    path = models.save(
        tmp_path / "dense.onnx", nodes, weights, [("x", TensorProto.FLOAT, ["N", 8])], [("y", ["N", 5])]
    )
    form = normal(path, noise(20, 8))
    assert operators(form) == ["Gemm"]
    bias = next(t for t in form.proto.graph.initializer if t.name == form.proto.graph.node[0].input[2])
    assert list(bias.dims) == [5]


def test_a_matmul_over_sequences_keeps_one_addition(tmp_path):
    weights = constants(W=noise(8, 5), scale=noise(5), shift=noise(5))
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["a"]),
        helper.make_node("Mul", ["a", "scale"], ["b"]),
        helper.make_node("Add", ["b", "shift"], ["y"]),
    ]
    path = models.save(
        tmp_path / "seq.onnx", nodes, weights, [("x", TensorProto.FLOAT, ["N", 7, 8])], [("y", ["N", 7, 5])]
    )
    assert operators(normal(path, noise(20, 7, 8))) == ["MatMul", "Add"]


@pytest.mark.parametrize(
    ("name", "shape"), [("over rows", (7, 1)), ("over the width", (1, 1, 1, 8)), ("full", (1, 6, 8, 8))]
)
def test_constants_that_are_not_one_number_a_channel_stay_where_they_are(tmp_path, name, shape):
    if name == "over rows":
        weights = constants(W=noise(8, 5), s=noise(*shape))
        nodes = [helper.make_node("MatMul", ["x", "W"], ["a"]), helper.make_node("Mul", ["a", "s"], ["y"])]
        sizes, outputs = ["N", 7, 8], ["N", 7, 5]
    else:
        weights = constants(K=noise(6, 4, 1, 1), s=noise(*shape))
        nodes = [helper.make_node("Conv", ["x", "K"], ["a"]), helper.make_node("Mul", ["a", "s"], ["y"])]
        sizes, outputs = ["N", 4, 8, 8], ["N", 6, 8, 8]
    path = models.save(
        tmp_path / "m.onnx", nodes, weights, [("x", TensorProto.FLOAT, sizes)], [("y", outputs)]
    )
    assert operators(normal(path, noise(20, *sizes[1:])))[-1] == "Mul"


def test_what_another_node_reads_too_is_not_folded_away(tmp_path):
    weights = constants(W=noise(8, 5), s=noise(5))
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["a"]),
        helper.make_node("Mul", ["a", "s"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    path = models.save(
        tmp_path / "m.onnx", nodes, weights, [("x", TensorProto.FLOAT, ["N", 8])], [("y", ["N", 5])]
    )
    assert operators(normal(path, noise(20, 8))) == ["MatMul", "Mul", "Add"]


def test_reshapes_and_transposes_that_do_nothing_are_removed(tmp_path):
    weights = constants(W=noise(8, 5)) | {
        "flat": np.array([-1, 8], np.int64),
        "cube": np.array([-1, 2, 4], np.int64),
        "axis": np.array([1], np.int64),
    }
    nodes = [
        helper.make_node("Identity", ["x"], ["i"]),
        helper.make_node("Reshape", ["i", "cube"], ["c"]),
        helper.make_node("Transpose", ["c"], ["t"], perm=[0, 2, 1]),
        helper.make_node("Transpose", ["t"], ["u"], perm=[0, 2, 1]),
        helper.make_node("Reshape", ["u", "flat"], ["f"]),
        helper.make_node("Cast", ["f"], ["g"], to=TensorProto.FLOAT),
        helper.make_node("Dropout", ["g"], ["h"]),
        helper.make_node("MatMul", ["h", "W"], ["m"]),
        helper.make_node("Unsqueeze", ["m", "axis"], ["n"]),
        helper.make_node("Squeeze", ["n", "axis"], ["o"]),
        helper.make_node("Identity", ["o"], ["y"]),
        helper.make_node("Relu", ["m"], ["nobody_reads"]),
    ]
    path = models.save(
        tmp_path / "m.onnx", nodes, weights, [("x", TensorProto.FLOAT, ["N", 8])], [("y", ["N", 5])]
    )
    left = operators(normal(path, noise(20, 8)))
    assert not {"Identity", "Transpose", "Cast", "Dropout", "Relu"} & set(left)
    assert len(left) <= 4


@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23])
def test_any_opset_ends_at_17_or_stays_above(tmp_path, opset):
    path = models.autoencoder(tmp_path / "ae.onnx", opset=opset)
    form = normal(path, models.rows(20))
    assert max(opset, 17) == next(entry.version for entry in form.proto.opset_import if entry.domain == "")
    assert operators(form) == ["Gemm", "Relu", "Gemm", "Relu", "Gemm"]


def test_constants_of_every_form_become_initializers(tmp_path):
    nodes = [
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Constant", [], ["shape"], value_ints=[-1, 8]),
        helper.make_node("Constant", [], ["W"], value=numpy_helper.from_array(noise(8, 3))),
        helper.make_node("Mul", ["W", "two"], ["W2"]),
        helper.make_node("Reshape", ["x", "shape"], ["r"]),
        helper.make_node("MatMul", ["r", "W2"], ["y"]),
    ]
    path = models.save(
        tmp_path / "m.onnx", nodes, {}, [("x", TensorProto.FLOAT, ["N", 2, 4])], [("y", ["N", 3])]
    )
    form = normal(path, noise(20, 2, 4))
    assert operators(form) == ["Reshape", "MatMul"]


def test_sizes_that_are_known_are_folded_and_the_batch_is_not(tmp_path):
    """PyTorch's way to flatten: Shape, Gather, Concat, Reshape."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Gather", ["s", "one"], ["c"]),
        helper.make_node("Gather", ["s", "two"], ["d"]),
        helper.make_node("Mul", ["c", "d"], ["cd"]),
        helper.make_node("Concat", ["n", "cd"], ["flat"], axis=0),
        helper.make_node("Reshape", ["x", "flat"], ["r"]),
        helper.make_node("MatMul", ["r", "W"], ["y"]),
    ]
    weights = constants(W=noise(8, 3)) | {
        name: np.array([index], np.int64) for index, name in enumerate(("zero", "one", "two"))
    }
    path = models.save(
        tmp_path / "m.onnx", nodes, weights, [("x", TensorProto.FLOAT, ["N", 2, 4])], [("y", ["N", 3])]
    )
    form = normal(path, noise(20, 2, 4))
    assert "Mul" not in operators(form)
    assert run(form.proto, noise(1, 2, 4)).shape == (1, 3)
    assert run(form.proto, noise(7, 2, 4)).shape == (7, 3)


def test_rows_that_influence_each_other_are_not_made_a_batch(tmp_path):
    """The first dimension is a sequence: its rows cannot be run in batches of any size."""
    nodes = [
        helper.make_node("CumSum", ["x", "axis"], ["c"]),
        helper.make_node("Tanh", ["c"], ["y"]),
    ]
    path = models.save(
        tmp_path / "m.onnx", nodes, {"axis": np.array(0, np.int64)}, [("x", TensorProto.FLOAT, [1, 4])],
        [("y", [1, 4])],
    )  # fmt: skip
    assert normalise(load_model(path), {"x": noise(20, 4)}).fixed_batch == 1


def test_every_pass_says_what_it_did_and_how_close_it_stayed(tmp_path):
    path = models.autoencoder(tmp_path / "ae.onnx", opset=11, matmul=True, constants=True)
    passes = normal(path, models.rows(20)).passes
    assert passes
    assert all(step.kept and step.sqnr is not None and step.sqnr > 120 for step in passes)
    assert any("opset 11 converted to 17" in str(step) for step in passes)
