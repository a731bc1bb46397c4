"""From recipes that are possible to the one that is shipped: ranges, the budget, the target, the form."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edge_agent.contract import bundle, golden
from quantize import compare, runtime
from quantize.calibrate import RULES, Range, Sketch, calibrate
from quantize.compare import Comparison
from quantize.config import Budget, Impute, Metric, PrepareConfig, Scale, Threshold
from quantize.cost import GENERIC, TARGETS, arm_graph, cost_of, sizes_of
from quantize.int8 import scale_of, static_recipe, write_int8
from quantize.load import load_data, load_model
from quantize.observe import observe
from quantize.plan import Mode, plan_of
from quantize.prepare import prepare
from quantize.search import Found, search
from quantize.validate import Judge, Parts, settle, split
from tests.quantize import models
from tests.quantize.models import quantize


class Case:
    """A model on its way to INT8, with the parts of its data."""

    def __init__(self, model: Path, data: Path, *, scale: Scale = Scale.NONE) -> None:
        source = load_model(model)
        rows, _ = load_data(data, None, source.inputs)
        self.parts: Parts = split(rows, None)
        impute = Impute.MEDIAN if scale is not Scale.NONE else Impute.NONE
        self.model = prepare(source, rows, PrepareConfig(scale=scale, impute=impute))
        self.sizes = sizes_of(self.model, rows)
        self.judge = Judge(self.model, self.parts, Threshold(), self.sizes)
        self.rows = rows

    def search(self, folder: Path, budget: Budget, **options) -> Found:
        folder.mkdir()
        observed = observe(self.model, self.parts.ranges, self.parts.selection, self.sizes)
        target = options.pop("target", TARGETS[GENERIC])
        return search(self.model, observed, self.judge, budget, folder, target=target, **options)


def uneven(path: Path) -> Path:
    """Four dense layers; one channel before the third is a thousand times the others, and hardly counts."""
    weights = models.dense([models.WIDTH, 256, 256, 256, 4])
    weights["W1"][:, 7] *= 1000
    weights["W2"][7, :] /= 1000
    nodes, tensor = [], "x"
    for index in range(4):
        out = "y" if index == 3 else f"h{index}"
        nodes.append(helper.make_node("Gemm", [tensor, f"W{index}", f"b{index}"], [out], f"dense{index}"))
        tensor = f"r{index}"
        if index < 3:  # Elu: no scale can be moved through it
            nodes.append(helper.make_node("Elu", [out], [tensor]))
    inputs = [("x", TensorProto.FLOAT, ["N", models.WIDTH])]
    return models.save(path, nodes, weights, inputs, [("y", ["N", 4])])


@pytest.fixture
def case(tmp_path, calibration) -> Case:
    return Case(uneven(tmp_path / "uneven.onnx"), calibration, scale=Scale.STANDARD)


# -- the budget -------------------------------------------------------------------------------------------


def test_only_the_layers_that_the_budget_cannot_bear_leave_static_int8(case, tmp_path):
    found = case.search(tmp_path / "search", Budget(metric=Metric.SQNR, min_sqnr=28))
    chosen = found.models[0]
    modes = {layer.name: layer.mode for layer in chosen.layers}
    assert chosen.precision == "int8"
    assert modes["dense2"] is not Mode.STATIC
    assert sum(mode is not Mode.FLOAT for mode in modes.values()) >= 2
    raised = next(layer for layer in chosen.layers if layer.name == "dense2")
    assert raised.alone_sqnr is not None
    assert raised.alone_sqnr == min(layer.alone_sqnr for layer in chosen.layers)
    assert raised.why == "costs more accuracy than it saves"
    assert settle(found, case.judge, case.parts, Budget(metric=Metric.SQNR, min_sqnr=28)).precision == "int8"


def test_every_candidate_was_run_or_says_why_not(case, tmp_path):
    found = case.search(tmp_path / "search", Budget(metric=Metric.SQNR, min_sqnr=28))
    candidates = found.models[0].candidates
    assert len({one.name for one in candidates}) == len(candidates) > 8
    assert all(one.comparison is not None or one.problem for one in candidates)
    outside = [one for one in candidates if one.comparison and one.comparison.sqnr < 28]
    assert outside
    assert all(one.problem for one in outside)


def test_the_file_of_the_chosen_candidate_is_the_one_that_was_judged(case, tmp_path):
    chosen = case.search(tmp_path / "search", Budget(metric=Metric.SQNR, min_sqnr=28)).models[0]
    named = next(one for one in chosen.candidates if one.name == chosen.name)
    assert case.judge.selection(chosen.path) == named.comparison
    assert chosen.path.stat().st_size == chosen.size == named.size
    assert chosen.recipe is not None
    again = write_int8(chosen.graph, chosen.plan, chosen.recipe)
    assert again.SerializeToString() == chosen.path.read_bytes()


def test_the_same_search_twice_chooses_the_same_bytes(case, tmp_path):
    budget = Budget(metric=Metric.SQNR, min_sqnr=28)
    first, second = (case.search(tmp_path / folder, budget).models[0] for folder in ("a", "b"))
    assert first.name == second.name
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.candidates == second.candidates


def test_fast_tries_less_and_still_ends_inside_the_budget(case, tmp_path):
    budget = Budget(metric=Metric.SQNR, min_sqnr=28)
    fast = case.search(tmp_path / "fast", budget, fast=True).models[0]
    thorough = case.search(tmp_path / "thorough", budget).models[0]
    assert len(fast.candidates) < len(thorough.candidates)
    assert case.judge.judge(fast.path, case.parts.judgement).comparison.sqnr > 25


def test_int8_that_the_target_would_not_run_faster_is_not_shipped(case, tmp_path):
    slow = replace(TARGETS[GENERIC], name="no int8 kernels", int8_macs=1e5)
    found = case.search(tmp_path / "search", Budget(min_sqnr=10), target=slow)
    assert {model.precision for model in found.models} == {"int8 weights", "fp32"}
    assert all(model.recipe is None or not model.recipe.count(Mode.STATIC) for model in found.models)
    problems = [one.problem for one in found.models[0].candidates if one.problem]
    assert any("slower than FP32 on no int8 kernels" in problem for problem in problems)


def test_if_the_final_judgement_is_less_kind_the_next_more_careful_candidate_is_taken(case, tmp_path):
    careless = case.search(tmp_path / "careless", Budget(metric=Metric.SQNR, min_sqnr=0), fast=True)
    careful = case.search(tmp_path / "careful", Budget(metric=Metric.SQNR, min_sqnr=28), fast=True)
    found = Found((careless.models[0], *careful.models))
    stricter = Budget(metric=Metric.SQNR, min_sqnr=15)
    taken = settle(found, case.judge, case.parts, stricter)
    assert taken.path == careful.models[0].path
    assert case.judge.judge(taken.path, case.parts.judgement).comparison.sqnr >= 15
    passed_over = next(one for one in taken.candidates if one.name == careless.models[0].name)
    assert "outside the budget on the rows of the final judgement" in passed_over.problem
    nothing = settle(found, case.judge, case.parts, Budget(metric=Metric.SQNR, min_sqnr=150))
    assert nothing.precision == "fp32"
    assert nothing.candidates[-1].name == "fp32"


def test_what_the_rows_of_judgement_do_not_show_of_others_does_not_count_where_something_surer_is(
    case, tmp_path
):
    careless = case.search(tmp_path / "careless", Budget(metric=Metric.SQNR, min_sqnr=0), fast=True)
    careful = case.search(tmp_path / "careful", Budget(metric=Metric.SQNR, min_sqnr=28), fast=True)
    just = case.judge.judge(careless.models[0].path, case.parts.judgement).comparison
    assert just.sqnr_low < just.sqnr
    budget = Budget(metric=Metric.SQNR, min_sqnr=(just.sqnr + just.sqnr_low) / 2)
    both = Found((careless.models[0], *careful.models))
    taken = settle(both, case.judge, case.parts, budget)
    assert taken.path == careful.models[0].path
    passed_over = next(one for one in taken.candidates if one.name == careless.models[0].name)
    assert passed_over.problem.startswith("outside the budget on the rows of the final judgement")
    alone = settle(Found((careless.models[0], careful.models[-1])), case.judge, case.parts, budget)
    assert alone.path == careless.models[0].path


@pytest.mark.parametrize(
    ("metric", "inside"),
    [
        (Metric.AUTO, True), (Metric.AUC, True), (Metric.AP, False), (Metric.F1, False),
        (Metric.ACCURACY, True), (Metric.SQNR, False), (Metric.AGREEMENT, True),
    ],
)  # fmt: skip
def test_the_metric_that_was_asked_for_decides(metric, inside):
    found = Comparison(
        rows=9, sqnr=20, agreement=0.995, auc_reference=0.9, auc=0.895, ap_reference=0.8, ap=0.7,
        accuracy_reference=0.9, accuracy=0.9, f1_reference=0.8, f1=0.7,
    )  # fmt: skip
    assert found.inside(Budget(metric=metric)) is inside


def test_average_precision_and_f1_agree_with_scikit_learn():
    from sklearn.metrics import average_precision_score, f1_score

    random = np.random.default_rng(3)
    labels = random.random(400) < 0.2
    scores = np.round(random.standard_normal(400) + labels, 1)
    assert compare.average_precision(labels, scores) == pytest.approx(average_precision_score(labels, scores))
    assert compare.f1(labels, scores > 0.5) == pytest.approx(f1_score(labels, scores > 0.5))
    assert compare.f1(labels, np.zeros(400, bool)) == 0


def test_a_metric_that_needs_labels_says_so_and_leaves_nothing(autoencoder, calibration, tmp_path, capsys):
    assert quantize(autoencoder, calibration, tmp_path / "out", "--metric", "f1") == 1
    assert "--metric f1 needs labelled rows" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_budget_of_f1_is_kept(autoencoder, calibration, tmp_path):
    rows = np.concatenate([models.rows(80, seed=2), models.bad_rows(80)])
    held_out = models.write_rows(tmp_path / "held_out.npz", rows, y=np.repeat([0, 1], 80))
    options = ("--scale", "standard", "--validation", str(held_out), "--metric", "f1", "--fast")
    assert quantize(autoencoder, calibration, tmp_path / "out", *options) == 0
    made = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3")
    found = json.loads(made.read("report.json"))["comparison"]
    assert found["f1_reference"] - found["f1"] <= 0.01
    assert "--metric f1 --fast" in made.manifest.provenance.command


# -- ranges -----------------------------------------------------------------------------------------------


def test_a_sketch_knows_the_range_exactly_and_percentiles_to_a_bin():
    random = np.random.default_rng(0)
    values = (random.standard_normal(60_000) ** 3).astype(np.float32)
    sketch = Sketch()
    for piece in np.array_split(values, 7):  # batches of different lengths
        sketch.add(piece)
    assert (sketch.low, sketch.high) == (float(values.min()), float(values.max()))
    found = sketch.percentile(0.99)
    low, high = np.quantile(values, [0.005, 0.995])
    assert found.low == pytest.approx(low, rel=0.07)
    assert found.high == pytest.approx(high, rel=0.07)


def test_the_least_error_of_a_sketch_is_that_of_the_values_themselves():
    random = np.random.default_rng(1)
    values = random.standard_t(3, 50_000).astype(np.float32)
    sketch = Sketch()
    sketch.add(values)

    def error(found: Range) -> float:
        scale, zero_point = scale_of(found, (-np.inf, np.inf), -128)
        rounded = np.clip(np.rint(values / scale) + zero_point, -128, 127) - zero_point
        return float(((rounded * scale - values).astype(np.float64) ** 2).mean())

    best = sketch.least_error()
    assert sketch.error(best) == pytest.approx(error(best), rel=0.15)
    assert error(best) < 0.95 * error(sketch.range)
    assert all(error(best) <= 1.1 * error(rule(sketch)) for rule in RULES.values())


def test_values_that_are_not_finite_are_not_part_of_a_range():
    sketch = Sketch()
    sketch.add(np.array([1.0, np.nan, -np.inf, 3.0, 0.0], np.float32))
    sketch.add(np.zeros((0, 4), np.float32))
    assert sketch.range == Range(0.0, 3.0)


def test_a_scale_never_reaches_beyond_the_clip_that_it_replaces():
    for high in np.random.default_rng(2).uniform(0.1, 50, 200):
        scale, zero_point = scale_of(Range(0.0, 2 * high), (0.0, float(high)), -128)
        assert zero_point == -128
        assert float(scale) * 255 <= high
        assert float(scale) * 255 == pytest.approx(high, rel=1e-5)


# -- the form ---------------------------------------------------------------------------------------------


def residual(path: Path) -> Path:
    """Convolutions around an addition and an average, and one whose result is an output by itself."""
    random = np.random.default_rng(5)

    def kernel(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)

    weights = {
        "K0": kernel(16, 3, 3, 3), "K1": kernel(16, 16, 3, 3), "K2": kernel(16, 16, 3, 3),
        "K3": kernel(8, 16, 1, 1), "K4": kernel(4, 16, 1, 1),
        "low": np.float32(-0.5), "high": np.float32(4.0),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["image", "K0"], ["c0"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "K1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Clip", ["c1", "low", "high"], ["l1"]),  # does not end at zero: stays a node
        helper.make_node("Conv", ["l1", "K2"], ["c2"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c2", "r0"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["r2"]),
        helper.make_node("Conv", ["r2", "K3"], ["map"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["mean"]),
        helper.make_node("Conv", ["mean", "K4"], ["classes"]),
    ]
    weights = {name: np.asarray(values) for name, values in weights.items()}
    inputs = [("image", TensorProto.FLOAT, ["N", 3, 16, 16])]
    outputs = [("map", ["N", 8, 16, 16]), ("classes", ["N", 4, 1, 1])]
    return models.save(path, nodes, weights, inputs, outputs)


def test_what_lies_between_int8_layers_is_int8_too(tmp_path):
    data = models.write_rows(tmp_path / "images.npz", models.images(40))
    case = Case(residual(tmp_path / "residual.onnx"), data)
    plan = plan_of(case.model.proto)
    ranges = calibrate(case.model, plan.watched, case.rows).ranges()
    written = write_int8(case.model.proto, plan, static_recipe(plan, ranges))
    fused = arm_graph(written, tmp_path / "arm.onnx")
    kernels = cost_of(fused, case.sizes, TARGETS[GENERIC]).kernels
    assert kernels["QLinearConv"] == 5
    assert kernels["QLinearAdd"] == 1
    assert kernels["QLinearGlobalAveragePool"] == 1
    assert kernels["Clip"] == 1
    assert not {"Conv", "FusedConv", "Relu", "Add", "GlobalAveragePool"} & set(kernels)
    expected = runtime.run_all(runtime.open_session(case.model.proto), case.rows.inputs)
    got = runtime.run_all(runtime.open_session(written), case.rows.inputs)
    assert compare.outputs(expected, got).sqnr > 20


def test_a_float_layer_in_the_middle_gets_float_and_gives_float(tmp_path):
    data = models.write_rows(tmp_path / "images.npz", models.images(40))
    case = Case(residual(tmp_path / "residual.onnx"), data)
    plan = plan_of(case.model.proto)
    ranges = calibrate(case.model, plan.watched, case.rows).ranges()
    recipe = static_recipe(plan, ranges)
    for layer in plan.layers:
        mixed = replace(recipe, modes={**recipe.modes, layer.node: Mode.FLOAT})
        written = write_int8(case.model.proto, plan, mixed)
        kernels = cost_of(arm_graph(written, tmp_path / "arm.onnx"), case.sizes, TARGETS[GENERIC]).kernels
        assert kernels["QLinearConv"] == 4, layer.name
        assert kernels.get("Conv", 0) + kernels.get("FusedConv", 0) == 1, layer.name


def test_dynamic_layers_are_close_and_quantize_while_running(autoencoder, calibration, tmp_path):
    case = Case(autoencoder, calibration, scale=Scale.STANDARD)
    plan = plan_of(case.model.proto)
    recipe = replace(static_recipe(plan, {}), modes=plan.dynamic())
    written = write_int8(case.model.proto, plan, recipe)
    assert [node.op_type for node in written.graph.node].count("DynamicQuantizeMatMul") == 3
    onnx.save(written, tmp_path / "dynamic.onnx")
    assert case.judge.few(tmp_path / "dynamic.onnx").sqnr > 15


def test_dynamic_layers_are_judged_row_by_row_as_they_run_on_the_device(autoencoder, calibration, tmp_path):
    """A run has one scale for all of its rows: beside an outlier the others would be coarse."""
    case = Case(autoencoder, calibration, scale=Scale.STANDARD)
    plan = plan_of(case.model.proto)
    recipe = replace(static_recipe(plan, {}), modes=plan.dynamic())
    session = runtime.open_session(write_int8(case.model.proto, plan, recipe))
    rows = models.rows(8)
    beside = rows.copy()
    beside[3] *= 1e4
    one, other = (runtime.run_all(session, {"x": given}, 8)["score"] for given in (rows, beside))
    others = np.arange(8) != 3
    assert one[others].tobytes() == other[others].tobytes()
    alone = np.concatenate([runtime.run(session, {"x": row[None]})["score"] for row in rows])
    assert one.tobytes() == alone.tobytes()
    assert runtime.run(session, {"x": beside})["score"][others].tobytes() != one[others].tobytes()


def test_the_unsigned_twin_computes_the_same(tmp_path):
    data = models.write_rows(tmp_path / "images.npz", models.images(40))
    case = Case(residual(tmp_path / "residual.onnx"), data)
    plan = plan_of(case.model.proto)
    recipe = static_recipe(plan, calibrate(case.model, plan.watched, case.rows).ranges())
    first, second = (
        runtime.run_all(runtime.open_session(write_int8(case.model.proto, plan, one)), case.rows.inputs)
        for one in (recipe, recipe.twin())
    )
    assert compare.outputs(first, second).sqnr > 35


def test_an_embedding_table_is_int8_with_a_scale_for_every_row(tmp_path):
    random = np.random.default_rng(7)
    spread = np.logspace(-3, 1, 600)[:, None]  # rows of very different lengths: one scale would lose most
    weights = {
        "table": (random.standard_normal((600, 64)) * spread).astype(np.float32),
        "axes": np.array([1], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("ReduceSum", ["rows", "axes"], ["y"], keepdims=0),
    ]
    inputs = [("ids", TensorProto.INT64, ["N", 8])]
    model = models.save(tmp_path / "embedding.onnx", nodes, weights, inputs, [("y", ["N", 64])])
    ids = np.sort(random.integers(0, 600, (60, 8)), axis=1)
    data = models.write_rows(tmp_path / "ids.npz", ids)
    case = Case(model, data)
    plan = plan_of(case.model.proto)
    assert [layer.kind for layer in plan.layers] == ["Gather"]
    onnx.save(write_int8(case.model.proto, plan, static_recipe(plan, {})), tmp_path / "int8.onnx")
    assert (tmp_path / "int8.onnx").stat().st_size < 0.3 * model.stat().st_size
    assert case.judge.selection(tmp_path / "int8.onnx").sqnr > 40


def test_a_maxpool_behind_a_float_layer_stays_float(tmp_path):
    """Its INT8 kernel is slow without an INT8 convolution in front; onnxruntime would move the Q there."""
    data = models.write_rows(tmp_path / "images.npz", models.images(40))
    case = Case(models.convolution(tmp_path / "m.onnx"), data)
    plan = plan_of(case.model.proto)
    recipe = static_recipe(plan, calibrate(case.model, plan.watched, case.rows).ranges())
    first = plan.layers[0]
    for modes, pooled in ((recipe.modes, "uint8"), ({**recipe.modes, first.node: Mode.FLOAT}, "float32")):
        written = write_int8(case.model.proto, plan, replace(recipe.twin(), modes=modes))
        fused = arm_graph(written, tmp_path / "arm.onnx").graph
        pool = next(node for node in fused.node if node.op_type == "MaxPool")
        maker = next(node for node in fused.node if pool.input[0] in node.output)
        quantized = maker.op_type in ("QLinearConv", "QuantizeLinear")
        assert quantized == (pooled == "uint8"), (maker.op_type, pooled)
        expected = runtime.run_all(runtime.open_session(case.model.proto), case.rows.inputs)
        got = runtime.run_all(runtime.open_session(written), case.rows.inputs)
        assert compare.outputs(expected, got).sqnr > 20


@pytest.mark.parametrize(
    ("target", "kind"), [("generic-arm64", TensorProto.INT8), ("x86-64", TensorProto.UINT8)]
)
def test_activations_are_signed_for_arm64_and_unsigned_for_x86(target, kind, tmp_path):
    data = models.write_rows(tmp_path / "images.npz", models.images(64))
    model = models.convolution(tmp_path / "m.onnx")
    assert quantize(model, data, tmp_path / "out", "--target", target, "--quiet") == 0
    made = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3")
    graph = onnx.load(made.member("model.onnx")).graph
    points = {tensor.name: tensor.data_type for tensor in graph.initializer}
    kinds = {points[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"}
    assert kinds == {kind}
    vectors = golden.parse(made.read(golden.FILE_NAME))
    # Sums of U8S8 saturate on processors without VNNI: other bits there.
    assert (vectors.agreement is golden.Agreement.EXACT) == (kind == TensorProto.INT8)
