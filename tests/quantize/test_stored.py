"""Weights that are INT8 in the file and float when it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from quantize import bargains, compare, recover, runtime
from quantize.bargains import Form
from quantize.cost import GENERIC, TARGETS, arm_graph, cost_of
from quantize.int8 import Recipe, write_int8
from quantize.plan import Layer, Mode, plan_of
from tests.quantize import models
from tests.quantize.test_search import Case, residual


def recurrent(path: Path) -> Path:
    """A GRU, which has no INT8 kernel, and a transposed convolution, which has none either."""
    random = np.random.default_rng(3)
    weights = {
        "W": (random.standard_normal((1, 96, 12)) * 0.2).astype(np.float32),
        "R": (random.standard_normal((1, 96, 32)) * 0.2).astype(np.float32),
        "K": (random.standard_normal((32, 8, 4)) * 0.1).astype(np.float32),
        "axis": np.array([1], np.int64),
    }
    nodes = [
        helper.make_node("Transpose", ["x"], ["steps"], perm=[1, 0, 2]),
        helper.make_node("GRU", ["steps", "W", "R"], ["all"], hidden_size=32),
        helper.make_node("Squeeze", ["all", "axis"], ["sequence"]),
        helper.make_node("Transpose", ["sequence"], ["front"], perm=[1, 2, 0]),
        helper.make_node("ConvTranspose", ["front", "K"], ["y"], strides=[2]),
    ]
    inputs = [("x", TensorProto.FLOAT, ["N", 6, 12])]
    return models.save(path, nodes, weights, inputs, [("y", ["N", 8, "T"])])


SERIES = np.random.default_rng(5).standard_normal((60, 6, 12)).astype(np.float32)
KINDS = {
    "dense": (models.autoencoder, models.rows(60) / np.logspace(-2, 3, models.WIDTH, dtype=np.float32)),
    "images": (residual, models.images(60)),
    "recurrent": (recurrent, SERIES),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_that_runs_is_that_of_fp32_at_a_fraction_of_the_file(kind, tmp_path):
    model, rows = KINDS[kind]
    case = Case(model(tmp_path / "m.onnx"), models.write_rows(tmp_path / "x.npz", rows))
    proto, plan = case.model.proto, plan_of(case.model.proto)
    modes = plan.resting()
    assert set(modes.values()) <= {Mode.STORED, Mode.FLOAT}
    assert sum(mode is Mode.STORED for mode in modes.values()) >= 2
    written = write_int8(proto, plan, Recipe(modes=modes, ranges={}))
    before, after = (
        cost_of(arm_graph(graph, tmp_path / "arm.onnx"), case.sizes, TARGETS[GENERIC])
        for graph in (proto, written)
    )
    assert after.kernels == before.kernels
    assert after.seconds == pytest.approx(before.seconds)
    weights = sum(layer.parameters for layer in plan.layers if modes[layer.node] is Mode.STORED)
    assert len(written.SerializeToString()) < len(proto.SerializeToString()) - 2 * weights
    expected = runtime.run_all(runtime.open_session(proto), case.rows.inputs)
    got = runtime.run_all(runtime.open_session(written), case.rows.inputs)
    assert 30 < compare.outputs(expected, got).sqnr < 100


def test_least_squares_weights_and_their_bias_are_stored(tmp_path):
    model, rows = KINDS["dense"]
    case = Case(model(tmp_path / "m.onnx"), models.write_rows(tmp_path / "x.npz", rows))
    proto, plan = case.model.proto, plan_of(case.model.proto)
    plain = Recipe(modes=plan.resting(), ranges={})
    rounded = recover.round_weights(case.model, proto, plan, plain, case.parts.ranges)
    expected = runtime.run_all(runtime.open_session(proto), case.rows.inputs)
    found = []
    for recipe in (plain, replace(plain, rounded=rounded)):
        written = write_int8(proto, plan, recipe)
        found.append(
            compare.outputs(expected, runtime.run_all(runtime.open_session(written), case.rows.inputs))
        )
    assert found[1].sqnr > found[0].sqnr + 1


def test_weights_that_two_nodes_read_are_in_the_file_once(tmp_path):
    weights = {"W": np.random.default_rng(1).standard_normal((models.WIDTH, models.WIDTH)).astype(np.float32)}
    weights["W"] = np.tile(weights["W"], (1, 1))
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["a"]),
        helper.make_node("Tanh", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "W"], ["y"]),
    ]
    inputs = [("x", TensorProto.FLOAT, ["N", 64])]
    weights = {"W": np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)}
    path = models.save(tmp_path / "twice.onnx", nodes, weights, inputs, [("y", ["N", 64])])
    proto = onnx.load(path)
    written = write_int8(proto, plan_of(proto), Recipe(modes=plan_of(proto).resting(), ranges={}))
    assert [tensor.data_type for tensor in written.graph.initializer].count(TensorProto.INT8) == 1


# -- which layers leave INT8 first --------------------------------------------------------------------------


def layer(node: int) -> Layer:
    return Layer(node, f"layer {node}", "Gemm", "x", "W", None, 1, "y", (Mode.STATIC,), 100)


def test_the_form_with_the_most_noise_taken_away_for_its_loss_comes_first():
    noisy = [Form(Mode.STATIC, 10, 0), Form(Mode.STORED, 1, 2), Form(Mode.FLOAT, 0, 10)]
    quiet = [Form(Mode.STATIC, 2, 0), Form(Mode.STORED, 1.9, 5), Form(Mode.FLOAT, 0, 6)]  # above the hull
    steps = bargains.steps_of([(layer(0), noisy), (layer(1), quiet)])
    assert [(step.layer.node, step.mode) for step in steps] == [
        (0, Mode.STORED), (1, Mode.FLOAT), (0, Mode.FLOAT),
    ]  # fmt: skip
    assert [step.saves for step in steps] == [9, 2, 1]
    assert bargains.modes_after({0: Mode.STATIC, 1: Mode.STATIC}, steps[:2]) == {
        0: Mode.STORED,
        1: Mode.FLOAT,
    }


def test_a_form_that_does_not_load_is_left_at_once():
    forms = [Form(Mode.STATIC, np.inf, 0), Form(Mode.STORED, 1, 9), Form(Mode.FLOAT, 0, 10)]
    other = [Form(Mode.STATIC, 5, 0), Form(Mode.FLOAT, 0, 0.001)]
    steps = bargains.steps_of([(layer(0), forms), (layer(1), other)])
    assert (steps[0].layer.node, steps[0].mode) == (0, Mode.STORED)


def test_as_many_steps_as_bring_the_sum_of_noises_below_what_is_allowed():
    forms = [
        (layer(node), [Form(Mode.STATIC, noise, 0), Form(Mode.FLOAT, 0, 1)])
        for node, noise in enumerate((4, 2, 1))
    ]
    steps = bargains.steps_of(forms)
    assert [bargains.enough(steps, 0, wanted) for wanted in (7, 6, 3, 1, 0)] == [0, 1, 1, 2, 3]
    assert bargains.enough(steps, 0.5, 1) == 3


@pytest.mark.parametrize(("rows", "stored"), [(4096, True), (4097, False)])
def test_weights_that_a_device_does_not_fold_when_it_loads_the_file_are_not_stored(rows, stored):
    weight = TensorProto(
        name="W", data_type=TensorProto.FLOAT, dims=[rows, 4096]
    )  # 64 MiB; its data are not asked
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4096])],
        [weight],
    )
    (layer,) = plan_of(helper.make_model(graph)).layers
    assert (Mode.STORED in layer.modes) is stored
