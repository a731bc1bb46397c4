"""The graph that ARM64 runs: kernels, what is left over and why, bytes, arithmetic, a bound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from quantize.config import Target
from quantize.cost import TARGETS
from quantize.target import PROCESSORS, LayerCost, arm_graph, bound
from tests.quantize import models


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    data = models.write_rows(folder / "x.npz", models.images(64))
    assert models.quantize(models.convolution(folder / "m.onnx"), data, folder / "out", "--quiet") == 0
    return folder / "out" / "unit-1.2.3" / "model.onnx"


def qdq(path: Path) -> Path:
    """Q and DQ between two float nodes."""
    weights = {"s": np.float32(0.1), "z": np.int8(0), "W": np.eye(4, dtype=np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["m"]),
        helper.make_node("QuantizeLinear", ["m", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Exp", ["d"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [onnx.numpy_helper.from_array(np.asarray(values), name) for name, values in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def test_a_network_fuses_into_int8_kernels_from_end_to_end(network, tmp_path):
    found = arm_graph(network, {"image": models.images(1)}, tmp_path / "arm.onnx")
    assert found.kernels["QLinearConv"] == 2
    assert found.kernels["QGemm"] == 1
    assert found.float_layers == ()
    assert found.pure
    assert found.unexplained == 0
    assert [one.reason for one in found.left_over] == ["the input becomes int8"]
    assert not (tmp_path / "arm.onnx").exists()


def test_bytes_and_arithmetic_are_those_of_one_row(network, tmp_path):
    first, second, dense = arm_graph(network, {"image": models.images(1)}, tmp_path / "arm.onnx").layers
    assert first.macs == 16 * 16 * 16 * 3 * 9
    assert second.macs == 32 * 8 * 8 * 16 * 9
    assert dense.macs == 512 * 4
    assert second.weight_bytes >= 32 * 16 * 9 + 32 * 4
    assert second.activation_bytes == 16 * 8 * 8 + 32 * 8 * 8
    assert first.int8


def test_a_float_model_has_no_int8_kernels_and_is_not_exact(tmp_path):
    model = models.autoencoder(tmp_path / "m.onnx")
    found = arm_graph(model, {"x": models.rows(1)}, tmp_path / "arm.onnx")
    assert found.int8_kernels == 0
    assert len(found.float_layers) == 3
    assert not found.pure
    assert sum(layer.weight_bytes for layer in found.layers) == 4 * (
        12 * 64 + 64 + 64 * 64 + 64 + 64 * 12 + 12
    )


def test_q_and_dq_between_float_nodes_say_who_wants_them(tmp_path):
    found = arm_graph(qdq(tmp_path / "m.onnx"), {"x": np.ones((1, 4), np.float32)}, tmp_path / "a.onnx")
    assert {(one.node, one.reason) for one in found.left_over} == {
        ("QuantizeLinear", "MatMul gives float"),
        ("DequantizeLinear", "Exp in float"),
    }


def test_a_bound_states_bytes_and_memory_and_whether_the_weights_fit_the_cache():
    small = LayerCost("a", "QGemm", int8=True, weight_bytes=400_000, activation_bytes=1000, macs=400_000)
    large = LayerCost(
        "b", "QGemm", int8=True, weight_bytes=12_000_000, activation_bytes=1000, macs=12_000_000
    )
    fits = bound([small], Target.CORTEX_A53)
    assert fits.cached is True
    assert fits.seconds == fits.arithmetic
    streams = bound([large], Target.CORTEX_A53)
    assert streams.cached is False
    assert streams.from_memory == pytest.approx(12_001_000 / TARGETS["cortex-a53"].memory_bytes)
    assert streams.seconds == max(streams.from_memory, streams.arithmetic)
    assert bound([large], Target.GENERIC_ARM64).cached is None


def test_every_target_has_its_facts_and_its_rates():
    assert set(PROCESSORS) == set(Target)
    assert set(TARGETS) == {target.value for target in Target}
