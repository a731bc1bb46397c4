"""Accuracy back without training: equalized channels, weights rounded for the nearest outputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantize import compare, recover, runtime
from quantize.calibrate import calibrate
from quantize.int8 import static_recipe, write_int8
from quantize.plan import plan_of
from tests.quantize import models
from tests.quantize.test_search import Case

KINDS = [
    {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
    {"kernel_shape": [3, 3], "pads": [0, 1, 2, 1], "strides": [2, 1]},
    {"kernel_shape": [3, 3], "dilations": [2, 2]},
    {"kernel_shape": [2, 3], "auto_pad": "SAME_UPPER", "strides": [2, 2]},
    {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "group": 4},
    {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "group": 8},
]


def convolution(path: Path, **attributes) -> Path:
    random = np.random.default_rng(1)
    groups = attributes.get("group", 1)
    weights = {
        "K": random.standard_normal((8, 8 // groups, *attributes["kernel_shape"])).astype(np.float32),
        "k": random.standard_normal(8).astype(np.float32),
    }
    nodes = [helper.make_node("Conv", ["x", "K", "k"], ["y"], **attributes)]
    return models.save(
        path, nodes, weights, [("x", TensorProto.FLOAT, ["N", 8, 9, 10])], [("y", ["N", 8, "H", "W"])]
    )


@pytest.mark.parametrize("attributes", KINDS, ids=str)
def test_the_samples_of_a_convolution_are_what_it_multiplies_with_its_weights(attributes, tmp_path):
    images = np.random.default_rng(2).standard_normal((12, 8, 9, 10)).astype(np.float32)
    data = models.write_rows(tmp_path / "images.npz", images)
    case = Case(convolution(tmp_path / "conv.onnx", **attributes), data)
    proto = case.model.proto
    (layer,) = plan_of(proto).layers
    node = proto.graph.node[layer.node]
    weight = next(numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == layer.weight)
    bias = next(numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == layer.bias)
    samples = recover._samples(images, node, layer, weight.shape)
    groups = samples.shape[0]
    outputs = np.einsum("gsi,goi->sgo", samples, weight.reshape(groups, -1, samples.shape[2]))
    expected = runtime.run_all(runtime.open_session(proto), {"x": images})["y"]
    by_position = np.moveaxis(expected, 1, -1).reshape(-1, 8) - bias
    by_position = recover._evenly(by_position)
    assert np.allclose(outputs.reshape(-1, 8), by_position, atol=1e-4)


@pytest.mark.parametrize("attributes", KINDS, ids=str)
def test_weights_rounded_by_least_squares_give_nearer_outputs(attributes, tmp_path):
    random = np.random.default_rng(3)
    mixing = random.standard_normal((8, 8))
    images = np.einsum("ij,njhw->nihw", mixing, random.standard_normal((200, 8, 9, 10))) + 2
    data = models.write_rows(tmp_path / "images.npz", images.astype(np.float32))
    case = Case(convolution(tmp_path / "conv.onnx", **attributes), data)
    assert gain(case) > 0.5 if attributes.get("group", 1) < 8 else gain(case) > -0.5


def test_inputs_that_hardly_vary_around_a_large_number_have_a_covariance_still(tmp_path):
    random = np.random.default_rng(4)
    weights = {"W": random.standard_normal((64, 32)).astype(np.float32), "b": np.zeros(32, np.float32)}
    nodes = [helper.make_node("Gemm", ["x", "W", "b"], ["y"])]
    path = models.save(
        tmp_path / "m.onnx", nodes, weights, [("x", TensorProto.FLOAT, ["N", 64])], [("y", ["N", 32])]
    )
    latent = random.standard_normal((600, 3)) @ random.standard_normal((3, 64))
    values = (random.uniform(5, 50, 64) + 1e-3 * latent).astype(np.float32)
    case = Case(path, models.write_rows(tmp_path / "rows.npz", values))
    plan = plan_of(case.model.proto)
    ranges = calibrate(case.model, plan.watched, case.parts.ranges).ranges()
    recipe = static_recipe(plan, ranges)
    (rounded,) = recover.round_weights(case.model, case.model.proto, plan, recipe, case.parts.ranges).values()
    assert rounded.bias is not None
    assert np.isfinite(rounded.bias).all()


def test_dense_weights_rounded_by_least_squares_give_nearer_outputs(tmp_path):
    case = Case(
        models.autoencoder(tmp_path / "ae.onnx"), models.write_rows(tmp_path / "x.npz", unit_rows(600))
    )
    assert gain(case) > 2


def unit_rows(count: int) -> np.ndarray:
    rows = models.rows(count)
    return (rows - rows.mean(axis=0)) / rows.std(axis=0)


def gain(case: Case) -> float:
    """dB of the weights alone, on rows that had no part in rounding: activations stay exact."""
    proto = case.model.proto
    plan = plan_of(proto)
    ranges = calibrate(case.model, plan.watched, case.parts.ranges).ranges()
    recipe = static_recipe(plan, ranges)
    rounded = recover.round_weights(case.model, proto, plan, recipe, case.parts.ranges)
    assert set(rounded) == {layer.node for layer in plan.layers}
    name = next(iter(case.parts.judgement.inputs))
    rows = {name: case.parts.judgement.inputs[name]}
    expected = runtime.run_all(runtime.open_session(proto), rows)
    found = []
    for weights in ({}, rounded):
        exact = type(proto)()
        exact.CopyFrom(proto)
        written = write_int8(proto, plan, replace(recipe, rounded=weights))
        tensors = {t.name: numpy_helper.to_array(t) for t in written.graph.initializer}
        for layer in plan.layers:
            for tensor in exact.graph.initializer:
                if tensor.name == layer.weight:
                    scale = tensors[f"{layer.weight}_scale"]
                    shape = [-1 if axis == layer.axis else 1 for axis in range(len(tensor.dims))]
                    values = tensors[f"{layer.weight}_q"] * scale.reshape(shape)
                    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
                if tensor.name == layer.bias and layer.node in weights:
                    tensor.CopyFrom(numpy_helper.from_array(weights[layer.node].bias, tensor.name))
        got = runtime.run_all(runtime.open_session(exact), rows)
        found.append(compare.outputs(expected, got).sqnr)
    return found[1] - found[0]


# -- equalization -----------------------------------------------------------------------------------------


def chain(path: Path) -> Path:
    """Convolutions whose channels differ a thousandfold: dense, depthwise, pooled, dense."""
    random = np.random.default_rng(4)
    spread = np.logspace(-1.5, 1.5, 16).astype(np.float32)

    def kernel(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)

    weights = {
        "K0": kernel(16, 3, 3, 3) * spread[:, None, None, None],
        "k0": random.standard_normal(16).astype(np.float32) * spread,
        "K1": kernel(16, 1, 3, 3) / spread[:, None, None, None] * spread[::-1, None, None, None],
        "K2": kernel(8, 16, 1, 1) / spread[None, ::-1, None, None],
    }
    nodes = [
        helper.make_node("Conv", ["image", "K0", "k0"], ["c0"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "K1"], ["c1"], pads=[1, 1, 1, 1], group=16),
        helper.make_node("LeakyRelu", ["c1"], ["l1"]),
        helper.make_node("MaxPool", ["l1"], ["p1"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p1", "K2"], ["y"]),
    ]
    inputs = [("image", TensorProto.FLOAT, ["N", 3, 16, 16])]
    return models.save(path, nodes, weights, inputs, [("y", ["N", 8, 8, 8])])


def test_channels_of_very_different_ranges_are_evened_out_without_changing_the_function(tmp_path):
    data = models.write_rows(tmp_path / "images.npz", models.images(60))
    case = Case(chain(tmp_path / "chain.onnx"), data)
    proto = case.model.proto
    plan = plan_of(proto)
    axes = recover.channel_axes(proto, plan)
    assert len(axes) == 2
    found = calibrate(case.model, plan.watched, case.rows, axes=axes)
    evened = recover.equalize(proto, plan, found.channels)
    expected = runtime.run_all(runtime.open_session(proto), case.rows.inputs)["y"]
    assert compare.sqnr(expected, runtime.run_all(runtime.open_session(evened), case.rows.inputs)["y"]) > 110
    sqnr = {}
    for name, graph in (("before", proto), ("after", evened)):
        ranges = calibrate(case.model, plan.watched, case.rows, proto=graph).ranges()
        written = write_int8(graph, plan, static_recipe(plan, ranges))
        got = runtime.run_all(runtime.open_session(written), case.rows.inputs)["y"]
        sqnr[name] = compare.sqnr(expected, got)
    assert sqnr["after"] > sqnr["before"] + 10


def test_no_scale_is_moved_where_something_else_reads_the_channels(tmp_path):
    weights = models.dense([models.WIDTH, 16, 16])
    through = [
        helper.make_node("Gemm", ["x", "W0", "b0"], ["h"]),
        helper.make_node("{kind}", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "W1", "b1"], ["y"]),
    ]
    inputs = [("x", TensorProto.FLOAT, ["N", models.WIDTH])]
    for kind, outputs, pairs in (
        ("Relu", [("y", ["N", 16])], 1),
        ("Sigmoid", [("y", ["N", 16])], 0),
        ("Relu", [("y", ["N", 16]), ("r", ["N", 16])], 0),
    ):
        through[1].op_type = kind
        path = models.save(tmp_path / f"{kind}.onnx", through, weights, inputs, outputs)
        import onnx

        proto = onnx.load(path)
        assert len(recover.pairs_of(proto, plan_of(proto))) == pairs, kind
