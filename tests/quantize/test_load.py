"""ONNX as people have it: what is taken, what is refused, and that taking it changes nothing."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_agent.contract import bundle
from quantize import runtime
from quantize.errors import BadModel
from quantize.load import load_model
from quantize.normalise import normalise
from tests.quantize import models
from tests.quantize.models import quantize_fast as quantize

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", models.WIDTH])


def first_output(model: onnx.ModelProto | Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def typed(path: Path, kind: int) -> Path:
    """The autoencoder with every float of another type."""
    model = onnx.load(models.autoencoder(path))
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    onnx.save(model, path)
    return path


# -- external data ----------------------------------------------------------------------------------------


def external(path: Path) -> Path:
    model = onnx.load(models.autoencoder(path))
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_weights_in_another_file_are_read_and_part_of_the_digest(tmp_path):
    (tmp_path / "a").mkdir()
    path = external(tmp_path / "a" / "model.onnx")
    whole = load_model(models.autoencoder(tmp_path / "whole.onnx"))
    loaded = load_model(path)
    assert {t.name for t in loaded.proto.graph.initializer} == {t.name for t in whole.proto.graph.initializer}
    assert all(t.data_location == TensorProto.DEFAULT for t in loaded.proto.graph.initializer)
    assert loaded.size == path.stat().st_size + (path.parent / "weights.bin").stat().st_size
    data = bytearray((path.parent / "weights.bin").read_bytes())
    data[10] ^= 1
    (path.parent / "weights.bin").write_bytes(data)
    assert load_model(path).digest != loaded.digest


@pytest.mark.parametrize("way", ["up", "absolute", "link"])
def test_external_data_cannot_be_outside_the_folder_of_the_model(tmp_path, way):
    (tmp_path / "model").mkdir()
    path = external(tmp_path / "model" / "model.onnx")
    outside = (path.parent / "weights.bin").rename(tmp_path / "secret.bin")
    location = {"up": "../secret.bin", "absolute": str(outside), "link": "weights.bin"}[way]
    if way == "link":
        (path.parent / "weights.bin").symlink_to(outside)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BadModel, match="outside its folder"):
        load_model(path)


def test_external_data_that_is_missing_is_named(tmp_path):
    path = external(tmp_path / "model.onnx")
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(BadModel, match=r"weights\.bin.* is missing"):
        load_model(path)


def test_external_data_that_is_cut_off_is_refused(tmp_path):
    path = external(tmp_path / "model.onnx")
    data = (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "weights.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadModel):
        load_model(path)


# -- doors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE], ids=["float16", "float64"])
def test_other_floats_become_float32(tmp_path, calibration, kind):
    path = typed(tmp_path / "typed.onnx", kind)
    assert quantize(path, calibration, tmp_path / "out", "--scale", "standard") == 0
    made = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3")
    assert made.manifest.inputs[0].datatype.value == "FP32"
    assert not {10, 11} & {t.data_type for t in onnx.load(made.member("model.onnx")).graph.initializer}


def test_arithmetic_that_needs_double_precision_keeps_it(tmp_path):
    """(x + 1e9) - 1e9 is x in float64 and rounded to 64 in float32: the pass is undone, and said."""
    nodes = [
        helper.make_node("Cast", ["x"], ["d"], to=TensorProto.DOUBLE),
        helper.make_node("Mul", ["d", "step"], ["far"]),
        helper.make_node("Add", ["far", "big"], ["moved"]),
        helper.make_node("Sub", ["moved", "big"], ["back"]),
        helper.make_node("Cast", ["back"], ["y"], to=TensorProto.FLOAT),
    ]
    weights = {"big": np.array(1e9), "step": np.array(1.0)}
    path = models.save(
        tmp_path / "double.onnx", nodes, weights, [("x", TensorProto.FLOAT, ["N", 4])], [("y", ["N", 4])]
    )
    rows = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    normal = normalise(load_model(path), {"x": rows})
    undone = [step for step in normal.passes if "DOUBLE" in step.name]
    assert [step.kept for step in undone] == [False]
    assert "undone" in str(undone[0])
    assert np.allclose(first_output(normal.proto, {"x": rows}), rows, atol=1e-6)


def test_integer_inputs_stay_integers(tmp_path):
    table = np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32)
    weights = {"table": table, "W": models.dense([160, 4])["W0"], "flat": np.array([-1, 160], np.int64)}
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["vectors"]),
        helper.make_node("Reshape", ["vectors", "flat"], ["row"]),
        helper.make_node("MatMul", ["row", "W"], ["classes"]),
    ]
    path = models.save(
        tmp_path / "words.onnx",
        nodes,
        weights,
        [("ids", TensorProto.INT64, ["N", 10])],
        [("classes", ["N", 4])],
    )
    ids = np.random.default_rng(1).integers(0, 50, (60, 10))
    np.savez(tmp_path / "ids.npz", ids=ids)
    assert quantize(path, tmp_path / "ids.npz", tmp_path / "out") == 0
    made = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3")
    assert made.manifest.inputs[0].datatype.value == "INT64"
    got = first_output(made.member("model.onnx"), {"ids": ids})
    expected = first_output(path, {"ids": ids})
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


def test_several_inputs_and_outputs_and_a_batch_that_is_not_first(tmp_path):
    """A recurrent cell as exported: state [2, N, 8] in and out; in the bundle the batch is in front."""
    weights = models.dense([24, 16])
    nodes = [
        helper.make_node("Split", ["state"], ["h3", "c3"], axis=0, num_outputs=2),
        helper.make_node("Squeeze", ["h3", "axis"], ["h"]),
        helper.make_node("Squeeze", ["c3", "axis"], ["c"]),
        helper.make_node("Concat", ["x", "h", "c"], ["all"], axis=1),
        helper.make_node("Gemm", ["all", "W0", "b0"], ["next"]),
        helper.make_node("Reshape", ["next", "pairs"], ["pair"]),
        helper.make_node("Transpose", ["pair"], ["stateN"], perm=[1, 0, 2]),
        helper.make_node("ReduceSum", ["next", "last"], ["risk"], keepdims=0),
    ]
    weights |= {
        "axis": np.array([0], np.int64),
        "last": np.array([1], np.int64),
        "pairs": np.array([-1, 2, 8], np.int64),
    }
    inputs = [("x", TensorProto.FLOAT, ["N", 8]), ("state", TensorProto.FLOAT, [2, "N", 8])]
    path = models.save(
        tmp_path / "cell.onnx", nodes, weights, inputs, [("risk", ["N"]), ("stateN", [2, "N", 8])], opset=18
    )
    random = np.random.default_rng(2)
    x = random.standard_normal((40, 8)).astype(np.float32)
    state = random.standard_normal((40, 2, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, state=state)
    assert quantize(path, tmp_path / "data.npz", tmp_path / "out") == 0
    made = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3")
    assert [(t.name, t.shape) for t in made.manifest.inputs] == [("x", (-1, 8)), ("state", (-1, 2, 8))]
    assert [(t.name, t.shape) for t in made.manifest.outputs] == [("risk", (-1,)), ("stateN", (-1, 2, 8))]
    got = first_output(made.member("model.onnx"), {"x": x, "state": state})
    expected = first_output(path, {"x": x, "state": state.transpose(1, 0, 2)})
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


def test_texts_and_maps_among_the_outputs_are_dropped_and_the_numbers_kept(tmp_path):
    """What scikit-learn exports: class names, and a map of probabilities by name."""
    weights = models.dense([models.WIDTH, 2])
    nodes = [
        helper.make_node("Gemm", ["x", "W0", "b0"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["p"], axis=1),
        helper.make_node("ArgMax", ["p"], ["index"], axis=1, keepdims=0),
        helper.make_node(
            "LabelEncoder", ["index"], ["label"], domain="ai.onnx.ml",
            keys_int64s=[0, 1], values_strings=["good", "bad"],
        ),
        helper.make_node(
            "ZipMap", ["p"], ["names"], domain="ai.onnx.ml", classlabels_strings=["good", "bad"]
        ),
    ]  # fmt: skip
    maps = helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    )
    graph = helper.make_graph(
        nodes,
        "sklearn",
        [X],
        [
            helper.make_tensor_value_info("label", TensorProto.STRING, ["N"]),
            helper.make_value_info("names", maps),
        ],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    loaded = load_model(tmp_path / "m.onnx")
    assert [value.name for value in loaded.proto.graph.output] == ["p"]
    assert any("label" in note for note in loaded.notes)
    normal = normalise(loaded, {"x": models.rows(40)})
    assert first_output(normal.proto, {"x": models.rows(3)}).sum(axis=1) == pytest.approx(1)


def test_weights_that_are_inputs_too_as_in_ir_3(tmp_path, calibration):
    model = onnx.load(models.autoencoder(tmp_path / "ir3.onnx", opset=9))
    model.ir_version = 3
    for tensor in model.graph.initializer:
        value = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        model.graph.input.append(value)
    onnx.save(model, tmp_path / "ir3.onnx")
    assert [entry.name for entry in load_model(tmp_path / "ir3.onnx").inputs] == ["x"]
    assert quantize(tmp_path / "ir3.onnx", calibration, tmp_path / "out", "--scale", "standard") == 0


# -- control flow -----------------------------------------------------------------------------------------


def branches(path: Path) -> Path:
    """Two models in one: the rate chooses, as in voice detectors for 8 and 16 kHz."""
    weights = {}
    bodies = []
    for index, name in enumerate(("slow", "fast")):
        made = models.dense([models.WIDTH, 256, 1], seed=index)
        tensors = [numpy_helper.from_array(values, f"{name}_{key}") for key, values in made.items()]
        nodes = [
            helper.make_node("Gemm", ["x", f"{name}_W0", f"{name}_b0"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Gemm", ["r", f"{name}_W1", f"{name}_b1"], [f"{name}_out"]),
        ]
        out = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, ["N", 1])
        bodies.append(helper.make_graph(nodes, name, [], [out], tensors))
    nodes = [
        helper.make_node("Equal", ["sr", "sixteen"], ["is_fast"]),
        helper.make_node("If", ["is_fast"], ["risk"], then_branch=bodies[1], else_branch=bodies[0]),
    ]
    weights["sixteen"] = np.array(16000, np.int64)
    graph = helper.make_graph(
        nodes,
        "both",
        [X, helper.make_tensor_value_info("sr", TensorProto.INT64, [])],
        [helper.make_tensor_value_info("risk", TensorProto.FLOAT, ["N", 1])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8), path)
    return path


@pytest.mark.parametrize("rate", [8000, 16000])
def test_an_if_on_a_fixed_input_becomes_the_branch_it_takes(tmp_path, rate):
    path = branches(tmp_path / "both.onnx")
    rows = models.rows(200) / models.rows(200).std(axis=0)
    data = models.write_rows(tmp_path / "data.npz", rows)
    assert quantize(path, data, tmp_path / "out", "--set", f"sr={rate}") == 0
    made = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3")
    operators = {node.op_type for node in onnx.load(made.member("model.onnx")).graph.node}
    assert "If" not in operators
    assert "Gemm" in operators
    assert [t.name for t in made.manifest.inputs] == ["x"]
    assert f"--set sr={rate}" in made.manifest.provenance.command
    expected = first_output(path, {"x": rows, "sr": np.array(rate)})[:, 0]
    got = first_output(made.member("model.onnx"), {"x": rows})
    assert np.corrcoef(got, expected)[0, 1] > 0.99


def test_an_input_without_a_batch_asks_for_a_value(tmp_path):
    with pytest.raises(BadModel, match="--set sr=VALUE"):
        load_model(branches(tmp_path / "both.onnx"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rate": 1}, "no input 'rate' to set, its inputs are 'x', 'sr'"), ({"sr": 0.5}, "cannot be 0.5")],
)
def test_a_setting_that_does_not_fit_names_what_does(tmp_path, settings, message):
    with pytest.raises(BadModel, match=message):
        load_model(branches(tmp_path / "both.onnx"), settings)


def test_local_functions_are_quantized_like_nodes(tmp_path, calibration):
    weights = models.dense([models.WIDTH, 32, models.WIDTH])
    function = helper.make_function(
        "mine", "DenseRelu", ["a", "w", "b"], ["z"],
        [helper.make_node("Gemm", ["a", "w", "b"], ["g"]), helper.make_node("Relu", ["g"], ["z"])],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    nodes = [
        helper.make_node("DenseRelu", ["x", "W0", "b0"], ["h"], domain="mine"),
        helper.make_node("Gemm", ["h", "W1", "b1"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [X], [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", models.WIDTH])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=8)
    onnx.save(model, tmp_path / "functions.onnx")
    assert quantize(tmp_path / "functions.onnx", calibration, tmp_path / "out", "--scale", "standard") == 0
    made = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3")
    written = onnx.load(made.member("model.onnx"))
    assert not written.functions
    assert [node.op_type for node in written.graph.node].count("Gemm") == 2


# -- refused ----------------------------------------------------------------------------------------------


def refused(tmp_path: Path, node: onnx.NodeProto, domain: str) -> str:
    graph = helper.make_graph(
        [node], "g", [X], [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1])]
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(domain, 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    with pytest.raises(BadModel) as error:
        load_model(tmp_path / "m.onnx")
    return str(error.value)


def test_custom_operators_are_named(tmp_path):
    line = refused(tmp_path, helper.make_node("Wavelet", ["x"], ["y"], domain="acme.dsp"), "acme.dsp")
    assert "acme.dsp.Wavelet" in line
    assert "kernel" in line


def test_a_quantized_model_is_found_inside_a_branch_too(tmp_path):
    out = helper.make_tensor_value_info("z", TensorProto.UINT8, [])
    body = helper.make_graph([helper.make_node("QuantizeLinear", ["x", "s"], ["z"])], "b", [], [out])
    line = refused(tmp_path, helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body), "")
    assert "already quantized (QuantizeLinear)" in line


def test_text_inputs_are_refused(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Identity", ["t"], ["y"])], "g",
        [helper.make_tensor_value_info("t", TensorProto.STRING, ["N"])],
        [helper.make_tensor_value_info("y", TensorProto.STRING, ["N"])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "text.onnx")
    with pytest.raises(BadModel, match="no output of numbers"):
        load_model(tmp_path / "text.onnx")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(BadModel, match="is a folder"):
        load_model(tmp_path)


def test_onnxruntime_does_not_write_to_the_terminal_what_is_tried_and_fails(tmp_path, capfd):
    path = models.scorer(tmp_path / "scorer.onnx")
    session = runtime.open_session(path)
    with pytest.raises(BadModel):
        runtime.run(session, {"x": np.zeros((1, 3), np.float32)})
    assert capfd.readouterr().err == ""


def test_a_damaged_file_is_refused_in_one_line_or_still_runs(tmp_path, capfd):
    """Bytes changed and files cut at random, the structure more often than the weights."""
    random = np.random.default_rng(5)
    whole = (
        models.convolution(tmp_path / "a.onnx").read_bytes(),
        models.autoencoder(tmp_path / "b.onnx", opset=11, constants=True).read_bytes(),
    )
    survived = 0
    for turn in range(80):
        damaged = bytearray(whole[turn % 2])
        for _ in range(int(random.integers(1, 4))):
            near = int(random.integers(0, 800))
            damaged[near if random.random() < 0.5 else -1 - near] = int(random.integers(256))
        if turn % 4 == 3:
            damaged = damaged[: int(random.integers(1, len(damaged)))]
        (tmp_path / "damaged.onnx").write_bytes(damaged)
        with suppress(BadModel):
            model = load_model(tmp_path / "damaged.onnx")
            shapes = {entry.name: (12, *(abs(size) for size in entry.shape[1:])) for entry in model.inputs}
            normalise(model, {name: np.ones(shape, np.float32) for name, shape in shapes.items()})
            survived += 1
    assert survived < 60
    assert capfd.readouterr().out == ""
