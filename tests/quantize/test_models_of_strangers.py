"""Models that nobody here has seen: each becomes a bundle that holds, or is refused in one sentence.

The graphs below are what exporters and people write. The operators are those of the tests that come with
``onnx``: a sample here, all of them with ``make test-operators`` (``EDGE_OPERATORS=all``).
"""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_agent.contract import bundle
from edge_agent.contract.manifest import Task
from quantize import compare, runtime
from quantize.calibrate import calibrate
from quantize.cli import main
from quantize.config import Impute, PrepareConfig
from quantize.inspect import facts_of, text_of
from quantize.int8 import static_recipe, write_int8
from quantize.load import load_model, load_rows
from quantize.normalise import normalise
from quantize.plan import plan_of
from quantize.prepare import prepare
from quantize.verify import verify_bundle
from tests.quantize import models
from tests.quantize.models import quantize_fast as quantize

ALL = os.environ.get("EDGE_OPERATORS") == "all"
# Imported one by one: all of them take ten seconds to make.
OPERATORS = (
    "add", "argmax", "attention", "averagepool", "batch_normalization", "cast", "concat", "constantofshape",
    "conv", "convtranspose", "det", "gather", "gemm", "gru", "if_", "layernormalization", "loop", "lstm",
    "matmul", "maxpool", "negativeloglikelihoodloss", "nonmaxsuppression", "nonzero", "reducemean", "reshape",
    "resize", "scan", "softmax", "split", "topk", "unsqueeze", "ai_onnx_ml.binarizer",
    "ai_onnx_ml.label_encoder",
)  # fmt: skip
WIDTH = 16


def dense_graph(*more: onnx.NodeProto, reads: str = "x", batch: str | int = "N") -> onnx.ModelProto:
    """x [N, 16] -> y [N, 4] through 16-64-4; ``more`` nodes come after. No output but y."""
    nodes = [
        helper.make_node("Gemm", [reads, "W0", "b0"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "W1", "b1"], ["y"]),
        *more,
    ]
    weights = models.dense([WIDTH, 64, 4])
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 4])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def saved(path: Path, model: onnx.ModelProto) -> Path:
    onnx.save(model, path)
    return path


def table(path: Path, name: str = "x", width: int = WIDTH) -> Path:
    values = np.random.default_rng(1).standard_normal((100, width)).astype(np.float32)
    np.savez(path, **{name: values})
    return path


def refusal(capsys: pytest.CaptureFixture[str], out: Path) -> str:
    """The one line that says why, after nothing was left behind."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("quantize-model: ")]
    assert len(lines) == 1
    assert "a fault of quantize-model" not in lines[0]
    assert not out.exists()
    return lines[0]


def assert_close(folder: Path, model: Path, rows: dict[str, np.ndarray]) -> None:
    """The bundle's outputs on rows that it has not seen are those of the model, within 25 dB."""
    wanted = runtime.run(runtime.open_session(model), rows)
    for name, got in runtime.run(runtime.open_session(folder / "model.onnx"), rows).items():
        assert got.size == wanted[name].size
        noise = got.ravel().astype(np.float64) - wanted[name].ravel()
        assert (noise**2).sum() <= 10**-2.3 * (wanted[name].astype(np.float64) ** 2).sum()


# -- names, shapes, order ---------------------------------------------------------------------------------


def test_an_input_called_like_the_labels_is_an_input(tmp_path):
    weights = models.dense([WIDTH, 32])
    nodes = [helper.make_node("Gemm", ["y", "W0", "b0"], ["z"])]
    model = models.save(
        tmp_path / "m.onnx", nodes, weights, [("y", TensorProto.FLOAT, ["N", WIDTH])], [("z", ["N", 32])]
    )
    data = table(tmp_path / "rows.npz", "y")
    assert quantize(model, data, tmp_path / "out") == 0
    with np.load(data) as rows:
        np.savez(tmp_path / "labelled.npz", y=rows["y"], label=np.arange(100) % 2)
    common = ["--validation", str(tmp_path / "labelled.npz")]
    assert quantize(model, data, tmp_path / "labelled", *common) == 0


def test_an_output_that_says_no_shape_gets_the_one_that_comes_out(tmp_path):
    weights = models.dense([WIDTH, 64, 32])
    nodes = [
        helper.make_node("Gemm", ["x", "W0", "b0"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "W1", "b1"], ["y"]),
    ]
    path = models.save(
        tmp_path / "m.onnx", nodes, weights, [("x", TensorProto.FLOAT, ["N", WIDTH])], [("y", ["N", 32])]
    )
    model = onnx.load(path)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, path)
    data = table(tmp_path / "rows.npz")
    assert quantize(path, data, tmp_path / "out") == 0
    fresh = np.random.default_rng(2).standard_normal((50, WIDTH)).astype(np.float32)
    assert_close(tmp_path / "out" / "unit-1.2.3", path, {"x": fresh})


def test_a_table_without_a_fixed_width_gets_no_missing_values_in_its_golden_vectors(tmp_path):
    model = dense_graph()
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            dim.Clear()
    assert quantize(saved(tmp_path / "m.onnx", model), table(tmp_path / "rows.npz"), tmp_path / "out") == 0


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_of_nothing_is_one_that_varies(tmp_path, size):
    model = dense_graph()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = size
    assert quantize(saved(tmp_path / "m.onnx", model), table(tmp_path / "rows.npz"), tmp_path / "out") == 0


def test_nodes_in_any_order_are_put_in_order(tmp_path):
    model = dense_graph()
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    assert quantize(saved(tmp_path / "m.onnx", model), table(tmp_path / "rows.npz"), tmp_path / "out") == 0


def test_remarks_of_the_exporter_at_every_node_are_left_out(tmp_path):
    model = dense_graph()
    for node in model.graph.node:
        node.doc_string = "a stack trace " * 50
        entry = node.metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.stack_trace", "File model.py, line 1 " * 50
    entry = model.metadata_props.add()
    entry.key, entry.value = "names", "ok,broken"
    loaded = load_model(saved(tmp_path / "m.onnx", model)).proto
    assert "trace" not in str(loaded)
    assert loaded.metadata_props[0].value == "ok,broken"


def test_tables_that_are_made_in_the_graph_do_not_become_weights(tmp_path):
    """A filter bank of 512 x 64 from two vectors: 131 kB that a file of some kilobytes did not have."""
    nodes = [
        helper.make_node("MatMul", ["column", "row"], ["angles"]),
        helper.make_node("Sin", ["angles"], ["bank"]),
        helper.make_node("MatMul", ["x", "bank"], ["features"]),
        helper.make_node("Gemm", ["features", "W0", "b0"], ["y"]),
    ]
    weights = {
        "column": np.linspace(0, 1, 512, dtype=np.float32).reshape(512, 1),
        "row": np.linspace(1, 8, 64, dtype=np.float32).reshape(1, 64),
        **models.dense([64, 8]),
    }
    inputs = [("x", TensorProto.FLOAT, ["N", 512])]
    path = models.save(tmp_path / "m.onnx", nodes, weights, inputs, [("y", ["N", 8])])
    rows = np.random.default_rng(0).standard_normal((20, 512)).astype(np.float32)
    normal = normalise(load_model(path), {"x": rows})
    assert normal.proto.ByteSize() < 1.2 * path.stat().st_size
    assert any(node.op_type == "Sin" for node in normal.proto.graph.node)


def test_a_matrix_that_many_layers_read_is_in_the_file_once(tmp_path):
    """A recurrent net unrolled over time: forty steps with the same weights."""
    random = np.random.default_rng(0)
    weights = {
        "W": (random.standard_normal((64, 64)) / 8).astype(np.float32),
        "b": np.zeros(64, np.float32),
        **{
            f"{name}2": values
            for name, values in zip(("W", "b"), models.dense([64, 64]).values(), strict=True)
        },
    }
    nodes, tensor = [], "x"
    for step in range(40):
        nodes.append(helper.make_node("Gemm", [tensor, "W", "b"], [f"g{step}"]))
        nodes.append(helper.make_node("Tanh", [f"g{step}"], [f"t{step}"]))
        tensor = f"t{step}"
    nodes.append(helper.make_node("Gemm", [tensor, "W2", "b2"], ["y"]))
    inputs = [("x", TensorProto.FLOAT, ["N", 64])]
    path = models.save(tmp_path / "m.onnx", nodes, weights, inputs, [("y", ["N", 64])])
    data = load_rows(table(tmp_path / "rows.npz", width=64), load_model(path).inputs)
    model = prepare(load_model(path), data, PrepareConfig(impute=Impute.NONE))
    plan = plan_of(model.proto)
    written = write_int8(
        model.proto, plan, static_recipe(plan, calibrate(model, plan.watched, data).ranges())
    )
    matrices = [list(tensor.dims) for tensor in written.graph.initializer if len(tensor.dims) == 2]
    assert matrices == [[64, 64], [64, 64]]


def test_names_of_hundreds_of_letters_are_cut_inside_the_graph_only(tmp_path):
    long = ";".join(["model_1/batch_normalization_3/FusedBatchNormV3"] * 8)
    model = dense_graph()
    renamed = {name: f"{long}/{name}" for name in ("h", "r", "W0", "W1", "y")}
    for node in model.graph.node:
        node.name = f"{long}/node/{node.output[0]}"
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for part in (*model.graph.initializer, *model.graph.output):
        part.name = renamed.get(part.name, part.name)
    path = saved(tmp_path / "m.onnx", model)
    loaded = load_model(path).proto
    assert loaded.graph.output[0].name == f"{long}/y"
    inside = {name for node in loaded.graph.node for name in (node.name, *node.input, *node.output)}
    assert max(map(len, inside - {f"{long}/y"})) <= 64
    assert len(inside) == 11
    assert quantize(path, table(tmp_path / "rows.npz"), tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("dims", "axis"),
    [([WIDTH, "N"], 1), (["steps", "batch_size", 4], 1), ([1, "points", 3], 0), (["N", "batches_no", 2], 1)],
    ids=str,
)
def test_the_batch_is_where_its_name_says(tmp_path, dims, axis):
    place = helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)
    rank = len(dims)
    order = [axis, *(other for other in range(rank) if other != axis)]
    graph = helper.make_graph(
        [helper.make_node("Transpose", ["x"], ["y"], perm=order)],
        "test",
        [place],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [dims[place] for place in order])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    loaded = load_model(saved(tmp_path / "m.onnx", model))
    assert dict(loaded.batch_axis) == ({"x": axis} if axis else {})
    assert loaded.inputs[0].shape == tuple(
        size if isinstance(size, int) else -1 for size in (dims[place] for place in order)
    )


def test_an_output_of_steps_before_the_batch_is_turned_round(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0, 2])],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", "time", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["time", "rows", 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert dict(load_model(saved(tmp_path / "m.onnx", model)).batch_axis) == {"y": 1}


def test_an_input_that_is_handed_through_is_no_reconstruction(tmp_path):
    model = dense_graph()
    model.graph.output.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", WIDTH]))
    path = saved(tmp_path / "m.onnx", model)
    assert quantize(path, table(tmp_path / "rows.npz"), tmp_path / "out") == 0
    manifest = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3").manifest
    assert manifest.task is Task.RAW
    assert manifest.decision is None
    assert [output.name for output in manifest.outputs] == ["y", "x"]


def test_one_number_for_all_rows_is_dropped_beside_other_outputs(tmp_path):
    model = dense_graph(helper.make_node("ReduceMean", ["y"], ["mean"], keepdims=0))
    model.graph.output.append(helper.make_tensor_value_info("mean", TensorProto.FLOAT, []))
    loaded = load_model(saved(tmp_path / "m.onnx", model))
    assert loaded.outputs == ("y",)
    assert "outputs with one number for all rows dropped: mean" in loaded.notes


def test_a_model_of_other_domains_only_has_an_operator_set(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Binarizer", ["x"], ["y"], domain="ai.onnx.ml", threshold=0.5)],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", WIDTH])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("ai.onnx.ml", 1)], ir_version=8)
    path = saved(tmp_path / "m.onnx", model)
    data = table(tmp_path / "rows.npz")
    assert quantize(path, data, tmp_path / "out", "--score", "none") == 0


# -- as much as is found ----------------------------------------------------------------------------------


def test_class_numbers_alone_are_compared_as_names(tmp_path):
    before = {"class": np.array([1, 2, 3, 1000], np.int64)}
    near = compare.outputs(before, {"class": np.array([1, 2, 3, 1001], np.int64)})
    assert near.sqnr == pytest.approx(6.02, abs=0.01)  # a quarter differs
    assert near.agreement == 0.75
    assert compare.outputs(before, before).sqnr == compare.IDENTICAL
    pixels = {"image": np.full(100, 200, np.uint8)}
    assert compare.outputs(pixels, {"image": np.full(100, 201, np.uint8)}).sqnr > 40


def test_another_number_of_detections_is_another_answer():
    found = {"boxes": np.ones((5, 4), np.float32)}
    assert compare.outputs(found, {"boxes": np.ones((4, 4), np.float32)}).sqnr == -compare.IDENTICAL


def test_an_output_of_as_many_numbers_as_are_found_is_no_score_and_has_no_size(tmp_path):
    model = dense_graph(
        helper.make_node("Greater", ["y", "zero"], ["positive"]),
        helper.make_node("Reshape", ["positive", "flat"], ["which"]),
        helper.make_node("Compress", ["y", "which"], ["found"]),
    )
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0), "zero"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1]), "flat"))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("found", TensorProto.FLOAT, [None]))
    path = saved(tmp_path / "m.onnx", model)
    assert quantize(path, table(tmp_path / "rows.npz"), tmp_path / "out") == 0
    (output,) = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3").manifest.outputs
    assert (output.name, output.shape) == ("found", (-1,))


# -- refused in one sentence ------------------------------------------------------------------------------


def only_a_mean(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("ReduceMean", ["y"], ["mean"], keepdims=0))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("mean", TensorProto.FLOAT, []))


def noise(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("RandomNormalLike", ["y"], ["noise"]))
    model.graph.node.append(helper.make_node("Add", ["y", "noise"], ["z"]))
    model.graph.output[0].name = "z"


def dropout(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "ratio"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "training"))
    model.graph.node.append(helper.make_node("Dropout", ["y", "ratio", "training"], ["z"]))
    model.graph.output[0].name = "z"


def nan_weight(model: onnx.ModelProto) -> None:
    values = numpy_helper.to_array(model.graph.initializer[0]).copy()
    values[0, :] = np.nan
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "W0"))


def two_numbers(model: onnx.ModelProto) -> None:
    for name in "ab":
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
    model.graph.node.append(helper.make_node("Clip", ["y", "a", "b"], ["z"]))
    model.graph.output[0].name = "z"


def no_dimensions(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.ClearField("shape")


def test_inspect_says_why_nothing_came_out_on_random_rows(tmp_path):
    model = dense_graph()
    noise(model)
    assert "draws random numbers (RandomNormalLike)" in text_of(
        facts_of(saved(tmp_path / "m.onnx", model), {})
    )


def test_inspect_finds_a_width_that_only_the_weights_know(tmp_path):
    model = dense_graph()
    model.graph.input[0].type.tensor_type.shape.dim[1].Clear()
    int8 = facts_of(saved(tmp_path / "m.onnx", model), {})["int8"]
    assert int8["layers"] == {"Gemm": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (only_a_mean, "output 'mean' is one number for all rows"),
        (noise, "draws random numbers (RandomNormalLike)"),
        (dropout, "draws random numbers (Dropout)"),
        (nan_weight, "no finite number in output 'y' on the data: its weights hold NaN ('W0')"),
        (no_dimensions, "input 'x' does not say its dimensions"),
        (two_numbers, "inputs 'a', 'b' have no batch dimension"),
        (two_numbers, "give a value with --set a=VALUE --set b=VALUE"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(tmp_path, capsys, change, message):
    model = dense_graph()
    change(model)
    path = saved(tmp_path / "m.onnx", model)
    assert quantize(path, table(tmp_path / "rows.npz"), tmp_path / "out") == 1
    assert message in refusal(capsys, tmp_path / "out")


def test_inputs_of_different_numbers_of_rows_are_listed(tmp_path, capsys):
    nodes = [helper.make_node("MatMul", ["a", "b"], ["y"])]
    inputs = [("a", TensorProto.FLOAT, [4, 8]), ("b", TensorProto.FLOAT, [8, 3])]
    model = models.save(tmp_path / "m.onnx", nodes, {}, inputs, [("y", [4, 3])])
    random = np.random.default_rng(0)
    arrays = {
        "a": random.standard_normal((64, 8)).astype(np.float32),
        "b": random.standard_normal((64, 3)).astype(np.float32),
    }
    np.savez(tmp_path / "rows.npz", **arrays)
    assert quantize(model, tmp_path / "rows.npz", tmp_path / "out") == 1
    assert "different numbers of rows (a 4, b 8)" in refusal(capsys, tmp_path / "out")


def test_parts_of_less_than_the_batch_that_a_model_insists_on_are_too_few(tmp_path, capsys):
    nodes = [
        helper.make_node("Gemm", ["x", "W0", "b0"], ["h"]),
        helper.make_node("Reshape", ["h", "blocks"], ["y"]),
    ]
    weights = {**models.dense([WIDTH, 32]), "blocks": np.array([32, 8, 4])}
    inputs = [("x", TensorProto.FLOAT, [32, WIDTH])]
    path = models.save(tmp_path / "m.onnx", nodes, weights, inputs, [("y", [32, 8, 4])])
    assert quantize(path, table(tmp_path / "rows.npz"), tmp_path / "out") == 1
    assert "the model takes 32 at a time: give 2 times as many rows" in refusal(capsys, tmp_path / "out")


def test_a_vector_for_every_row_is_no_obstacle(tmp_path):
    weights = {"W": models.dense([WIDTH, 32])["W0"]}
    nodes = [helper.make_node("MatMul", ["x", "W"], ["y"])]
    path = models.save(
        tmp_path / "m.onnx", nodes, weights, [("x", TensorProto.FLOAT, [WIDTH])], [("y", [32])]
    )
    np.savez(tmp_path / "rows.npz", x=np.random.default_rng(0).standard_normal(208).astype(np.float32))
    assert models.quantize(path, tmp_path / "rows.npz", tmp_path / "out") == 0


# -- every operator ---------------------------------------------------------------------------------------


def operator_models() -> list[tuple[str, onnx.ModelProto, list[np.ndarray]]]:
    """The models of onnx's own tests with their first inputs: one of each module, or all."""
    from onnx.backend.test.case import node

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of the tests are about overflow
        if ALL:
            cases = list(node.collect_testcases())
        else:
            cases = []
            for name in OPERATORS:
                made = len(node._NodeTestCases)
                importlib.import_module(f"{node.__name__}.{name}")
                cases += node._NodeTestCases[made : made + 1]
    return [(case.name, case.model, list(case.data_sets[0][0])) for case in cases if case.data_sets]


def rows_like(example: np.ndarray, count: int) -> np.ndarray:
    """``count`` rows around an example, the first dimension of which is taken for the batch."""
    example = np.asarray(example)
    if not example.ndim or not example.size or example.dtype.kind not in "fiub":
        return np.zeros((count, *example.shape[1:]), np.float32)
    values = np.concatenate([example] * -(-count // len(example)))[:count]
    if values.dtype.kind != "f":
        return values
    factor = 1 + 0.3 * np.random.default_rng(0).standard_normal(values.shape)
    return (values * factor).astype(example.dtype)


@pytest.mark.parametrize(
    ("model", "examples"), [pytest.param(model, data, id=name) for name, model, data in operator_models()]
)
def test_any_operator_becomes_a_bundle_or_is_refused_in_a_sentence(tmp_path, capsys, model, examples):
    path = saved(tmp_path / "m.onnx", model)
    named = zip(model.graph.input, examples, strict=False)
    arrays = {value.name: rows_like(example, 48) for value, example in named}
    np.savez(tmp_path / "rows.npz", **arrays)
    assert text_of(facts_of(path, {}))
    capsys.readouterr()
    command = [str(path), "--calibration", str(tmp_path / "rows.npz"), "--name", "unit", "--version", "1.0.0"]
    code = main([*command, "--out", str(tmp_path / "out"), "--fast", "--score", "none"])
    if code == 1:
        refusal(capsys, tmp_path / "out")
        return
    assert code == 0
    assert verify_bundle(tmp_path / "out" / "unit-1.0.0").complaint is None
