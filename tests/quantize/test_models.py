"""Models as people export them: what becomes of them, run by onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from edge_agent.config import EngineConfig
from edge_agent.contract import bundle
from edge_agent.contract.manifest import Task
from edge_agent.update.selftest import run_self_test
from quantize import compare, runtime
from quantize.calibrate import calibrate
from quantize.config import PrepareConfig, Scale
from quantize.int8 import static_recipe, write_int8
from quantize.load import load_model, load_rows
from quantize.plan import plan_of
from quantize.prepare import prepare
from quantize.validate import kernels_on_arm
from tests.quantize import models
from tests.quantize.models import quantize


def report(out: Path) -> dict:
    return json.loads((out / "unit-1.2.3" / "report.json").read_bytes())


@pytest.mark.parametrize(
    "style",
    [{"opset": 9}, {"opset": 11}, {"opset": 13}, {"matmul": True}, {"constants": True}, {"opset": 18}],
    ids=str,
)
def test_dense_models_of_any_style_become_int8_dense_kernels_only(style, calibration, tmp_path):
    model = models.autoencoder(tmp_path / "ae.onnx", **style)
    assert quantize(model, calibration, tmp_path / "out", "--scale", "standard") == 0
    found = report(tmp_path / "out")
    assert found["int8"]["precision"] == "int8"
    assert found["int8"]["kernels_on_arm64"]["QGemm"] == 3
    assert found["int8"]["dense_or_conv_left_float"] == 0
    assert "Relu" not in found["int8"]["kernels_on_arm64"]  # absorbed by the asymmetric zero point
    assert found["comparison"]["sqnr"] > 25


def test_a_convolutional_classifier_becomes_int8_end_to_end(tmp_path):
    model = models.convolution(tmp_path / "cnn.onnx")
    data = models.write_rows(tmp_path / "images.npz", models.images(64))
    assert quantize(model, data, tmp_path / "out", "--impute", "none") == 0
    made = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3")
    assert made.manifest.task is Task.RAW
    assert made.manifest.decision is None
    assert [(t.name, t.shape) for t in made.manifest.outputs] == [("classes", (-1, 4))]
    assert "rules.yaml" not in made.manifest.members
    kernels = report(tmp_path / "out")["int8"]["kernels_on_arm64"]
    assert kernels["QLinearConv"] == 2
    assert kernels["QGemm"] == 1
    assert not {"Conv", "FusedConv", "Gemm", "Relu"} & set(kernels)


def test_a_model_with_a_score_of_its_own_keeps_it_as_one_number_a_row(calibration, tmp_path):
    model = models.scorer(tmp_path / "scorer.onnx")
    assert quantize(model, calibration, tmp_path / "out", "--scale", "standard", "--score", "none") == 0
    made = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3")
    assert made.manifest.task is Task.ANOMALY
    assert [(t.name, t.shape) for t in made.manifest.outputs] == [("risk", (-1,))]
    assert made.manifest.decision.output == "risk"


def test_a_batch_that_an_exporter_fixed_varies_again(calibration, tmp_path):
    model = models.scorer(tmp_path / "scorer.onnx", batch=1)
    assert quantize(model, calibration, tmp_path / "out", "--scale", "standard") == 0
    made = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3")
    assert made.manifest.inputs[0].shape == (-1, models.WIDTH)
    session = onnxruntime.InferenceSession(made.member("model.onnx"))
    assert session.run(None, {"x": models.rows(7)})[0].shape == (7,)


def test_a_batch_that_the_graph_insists_on_is_kept_and_said(calibration, tmp_path):
    weights = models.dense([models.WIDTH, 32, 1]) | {"flat": np.array([2 * models.WIDTH], np.int64)}
    weights["back"] = np.array([2, models.WIDTH], np.int64)
    nodes = [
        helper.make_node("Reshape", ["x", "flat"], ["f"]),
        helper.make_node("Reshape", ["f", "back"], ["x2"]),
        helper.make_node("Gemm", ["x2", "W0", "b0"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "W1", "b1"], ["risk"]),
    ]
    inputs = [("x", TensorProto.FLOAT, [2, models.WIDTH])]
    model = models.save(tmp_path / "two.onnx", nodes, weights, inputs, [("risk", [2, 1])])
    assert quantize(model, calibration, tmp_path / "out", "--scale", "standard") == 0
    made = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3")
    assert made.manifest.inputs[0].shape == (2, models.WIDTH)
    assert "batches of 2" in " ".join(report(tmp_path / "out")["prepare"]["notes"])
    tested = run_self_test(made, EngineConfig())
    assert tested.passed, tested.message
    assert tested.vectors == 16  # eight runs, not one


def test_a_recurrent_model_falls_back_to_dynamic_or_float_and_says_why(tmp_path):
    random = np.random.default_rng(4)
    weights = {
        "W": (random.standard_normal((1, 128, 8)) * 0.2).astype(np.float32),
        "R": (random.standard_normal((1, 128, 32)) * 0.2).astype(np.float32),
        "B": np.zeros((1, 256), np.float32),
    }
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["t", "W", "R", "B"], ["", "h"], hidden_size=32),
        helper.make_node("Squeeze", ["h", "axis"], ["state"]),
    ]
    weights["axis"] = np.array([0], np.int64)
    inputs = [("x", TensorProto.FLOAT, ["N", 10, 8])]
    model = models.save(tmp_path / "lstm.onnx", nodes, weights, inputs, [("state", ["N", 32])])
    series = random.standard_normal((40, 10, 8)).astype(np.float32)
    data = models.write_rows(tmp_path / "series.npz", series)
    assert quantize(model, data, tmp_path / "out") == 0
    found = report(tmp_path / "out")["int8"]
    assert found["chosen"] == "dynamic int8 (MatMul, Gemm, LSTM)"
    assert found["kernels_on_arm64"]["DynamicQuantizeLSTM"] == 1
    assert found["bytes"] < model.stat().st_size
    tested = run_self_test(bundle.open_bundle(tmp_path / "out" / "unit-1.2.3"), EngineConfig())
    assert tested.passed, tested.message


def test_a_model_without_dense_or_conv_layers_is_shipped_in_float_and_said(calibration, tmp_path, capsys):
    nodes = [
        helper.make_node("Mul", ["x", "gain"], ["scaled_x"]),
        helper.make_node("ReduceSum", ["scaled_x", "axes"], ["risk"], keepdims=0),
    ]
    weights = {"gain": np.ones(models.WIDTH, np.float32), "axes": np.array([1], np.int64)}
    inputs = [("x", TensorProto.FLOAT, ["N", models.WIDTH])]
    model = models.save(tmp_path / "sum.onnx", nodes, weights, inputs, [("risk", ["N"])])
    assert quantize(model, calibration, tmp_path / "out") == 0
    assert bundle.open_bundle(tmp_path / "out" / "unit-1.2.3").manifest.precision == "fp32"
    assert "carries the FP32 model" in capsys.readouterr().out


def test_an_impossible_budget_ships_float_and_says_why_for_each_candidate(autoencoder, calibration, tmp_path):
    held_out = models.write_rows(
        tmp_path / "held_out.npz",
        np.concatenate([models.rows(60, seed=2), models.bad_rows(60)]),
        y=np.repeat([0, 1], 60),
    )
    options = ("--scale", "standard", "--validation", str(held_out), "--metric", "sqnr", "--min-sqnr", "190")
    assert quantize(autoencoder, calibration, tmp_path / "out", *options) == 0
    found = report(tmp_path / "out")["int8"]
    assert found["precision"] == "fp32"
    *passed_over, chosen = found["candidates"]
    kinds = {tried["name"].split(",")[0] for tried in passed_over}
    assert kinds == {"static int8", "dynamic int8 (MatMul", "weights int8"}
    assert all("outside the budget" in tried["problem"] for tried in passed_over)
    assert chosen["problem"] is None


def test_per_channel_survives_channels_of_very_different_weights(tmp_path, calibration):
    source = load_model(models.autoencoder(tmp_path / "ae.onnx"))
    for tensor in source.proto.graph.initializer:
        if tensor.name == "W0":
            weights = onnx.numpy_helper.to_array(tensor) * np.logspace(-4, 0, 64).astype(np.float32)
            weights[:, 5] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights.astype(np.float32), "W0"))
    source.original.CopyFrom(source.proto)
    data = load_rows(calibration, source.inputs)
    model = prepare(source, data, PrepareConfig(scale=Scale.STANDARD))
    plan = plan_of(model.proto)
    ranges = calibrate(model, plan.watched, data).ranges()
    expected = runtime.run_all(runtime.open_session(model.proto), data.inputs)["score"]
    found = {}
    for per_channel in (True, False):
        recipe = static_recipe(plan, ranges, per_channel=per_channel)
        session = runtime.open_session(write_int8(model.proto, plan, recipe))
        found[per_channel] = compare.sqnr(expected, runtime.run_all(session, data.inputs)["score"])
    assert found[True] > 30
    assert found[True] > found[False]


def test_what_a_float_node_reads_beside_an_int8_layer_stays_float(tmp_path, calibration):
    """The score compares with the scaled input itself, not with its INT8 form."""
    source = load_model(models.autoencoder(tmp_path / "ae.onnx"))
    data = load_rows(calibration, source.inputs)
    model = prepare(source, data, PrepareConfig(scale=Scale.STANDARD))
    plan = plan_of(model.proto)
    ranges = calibrate(model, plan.watched, data).ranges()
    written = write_int8(model.proto, plan, static_recipe(plan, ranges))
    error = next(node for node in written.graph.node if node.output[0] == "error")
    assert list(error.input) == ["y", "scaled"]
    onnx.save(written, tmp_path / "q.onnx")
    kernels = kernels_on_arm(tmp_path / "q.onnx", tmp_path / "arm.onnx")
    assert kernels["QuantizeLinear"] == 1
    assert "DequantizeLinear" not in kernels
