"""Structured pruning: what may be narrowed, how well the rest is repaired, and what stays as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantize import compare, runtime
from quantize.channels import MULTIPLE, find_groups
from quantize.config import Budget, PrepareConfig, ShrinkConfig
from quantize.data import load_rows
from quantize.errors import BadModel
from quantize.load import load_model
from quantize.prepare import PreparedModel, prepare
from quantize.prune import prune
from quantize.repair import ridge
from quantize.widths import Sizes, allocate, pivoted
from tests.quantize import models


def prepared(path: Path, data: Path) -> tuple[PreparedModel, object]:
    source = load_model(path)
    rows = load_rows(data, source.inputs)
    return prepare(source, rows, PrepareConfig()), rows


def judged(model: PreparedModel, rows):
    inputs = model.trim(rows).inputs
    expected = runtime.run_all(runtime.open_session(model.proto), inputs)

    def judge(proto: onnx.ModelProto) -> compare.Comparison:
        return compare.outputs(expected, runtime.run_all(runtime.open_session(proto), inputs))

    return judge


def low_rank(path: Path, width: int = 96, rank: int = 8) -> Path:
    """A dense chain whose hidden activations are nearly copies of a few: most of it is not needed."""
    chance = np.random.default_rng(1)
    half = chance.standard_normal((models.WIDTH, rank)).astype(np.float32)
    copies = half[:, chance.integers(0, rank, width)] * chance.uniform(0.5, 2, width).astype(np.float32)
    weights = {
        "W0": copies,
        "b0": np.zeros(width, np.float32),
        "W1": (chance.standard_normal((5, width)) / width).astype(np.float32),
        "b1": chance.standard_normal(5).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "W0", "b0"], ["h"], "first"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "W1", "b1"], ["y"], "second", transB=1),
    ]
    inputs = [("x", TensorProto.FLOAT, ["N", models.WIDTH])]
    return models.save(path, nodes, weights, inputs, [("y", ["N", 5])])


def residual(path: Path) -> Path:
    """The hidden layer is also added to its own result: it cannot be narrowed by itself."""
    weights = models.dense([models.WIDTH, 64, 64, 4])
    nodes = [
        helper.make_node("Gemm", ["x", "W0", "b0"], ["a"]),
        helper.make_node("Relu", ["a"], ["ra"]),
        helper.make_node("Gemm", ["ra", "W1", "b1"], ["b"]),
        helper.make_node("Add", ["ra", "b"], ["s"]),
        helper.make_node("Gemm", ["s", "W2", "b2"], ["y"]),
    ]
    inputs = [("x", TensorProto.FLOAT, ["N", models.WIDTH])]
    return models.save(path, nodes, weights, inputs, [("y", ["N", 4])])


def mobile(path: Path) -> Path:
    """Pointwise, depthwise, pointwise, global pooling, classes; batch norm and SiLU on the way."""
    chance = np.random.default_rng(2)

    def normal(*shape: int) -> np.ndarray:
        return (chance.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    weights = {
        "P0": normal(48, 3, 1, 1),
        "D": normal(48, 1, 3, 3),
        "d": normal(48, 1).ravel(),
        "P1": normal(32, 48, 3, 3),
        "gain": np.abs(normal(48, 1)).ravel() + 0.5,
        "shift": normal(48, 1).ravel(),
        "mean": normal(48, 1).ravel(),
        "var": np.abs(normal(48, 1)).ravel() + 1,
        "slope": np.abs(normal(48, 1)).reshape(1, 48, 1, 1),
        "W": normal(6, 32),
        "w": normal(6, 1).ravel(),
    }
    nodes = [
        helper.make_node("Conv", ["image", "P0"], ["p"], "expand"),
        helper.make_node("BatchNormalization", ["p", "gain", "shift", "mean", "var"], ["n"]),
        helper.make_node("Sigmoid", ["n"], ["g"]),
        helper.make_node("Mul", ["n", "g"], ["silu"]),
        helper.make_node("Mul", ["silu", "slope"], ["m"]),
        helper.make_node("Conv", ["m", "D", "d"], ["dw"], "depthwise", group=48, pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["dw"], ["rd"]),
        helper.make_node("Conv", ["rd", "P1"], ["q"], "project", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["q"], ["rq"]),
        helper.make_node("GlobalAveragePool", ["rq"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["f"]),
        helper.make_node("Gemm", ["f", "W", "w"], ["classes"], "head", transB=1),
    ]
    inputs = [("image", TensorProto.FLOAT, ["N", 3, 16, 16])]
    return models.save(path, nodes, weights, inputs, [("classes", ["N", 6])])


def test_channels_that_repeat_others_go_without_loss(tmp_path: Path) -> None:
    data = models.write_rows(tmp_path / "x.npz", models.rows(300))
    model, rows = prepared(low_rank(tmp_path / "m.onnx"), data)
    pruned = prune(model, rows, judged(model, rows), Budget(), ShrinkConfig(prune=0.8))

    assert pruned.widths == (("first", 96, 16),)
    assert pruned.chosen is not None
    assert pruned.chosen.comparison.sqnr > 50
    outputs = [output.name for output in runtime.open_session(pruned.model.proto).get_outputs()]
    assert outputs == [spec.name for spec in model.outputs]


def test_the_input_model_is_left_as_it_was(tmp_path: Path) -> None:
    data = models.write_rows(tmp_path / "x.npz", models.rows(100))
    model, rows = prepared(low_rank(tmp_path / "m.onnx"), data)
    before = model.proto.SerializeToString(deterministic=True)
    prune(model, rows, judged(model, rows), Budget(), ShrinkConfig(prune=0.5))
    assert model.proto.SerializeToString(deterministic=True) == before


def test_the_repair_beats_dropping_channels(tmp_path: Path) -> None:
    data = models.write_rows(
        tmp_path / "x.npz", models.rows(400) / np.logspace(-2, 3, models.WIDTH, dtype=np.float32)
    )
    model, rows = prepared(models.autoencoder(tmp_path / "m.onnx"), data)
    judge = judged(model, rows)
    pruned = prune(model, rows, judge, Budget(), ShrinkConfig(prune=0.5))
    assert pruned.chosen is not None

    dropped = onnx.ModelProto()
    dropped.CopyFrom(model.proto)
    weights = {tensor.name: tensor for tensor in dropped.graph.initializer}
    for group, width in zip(find_groups(model.proto), pruned.chosen.widths, strict=True):
        node = dropped.graph.node[group.consumers[0].node]
        values = numpy_helper.to_array(weights[node.input[1]]).copy()
        values[np.argsort(-np.abs(values).sum(axis=1))[width:]] = 0  # the channels of the smallest weights
        weights[node.input[1]].CopyFrom(numpy_helper.from_array(values, node.input[1]))
    assert pruned.chosen.comparison.sqnr > judge(dropped).sqnr + 6


def test_channels_of_convolutions_take_what_hangs_on_them_along(tmp_path: Path) -> None:
    data = models.write_rows(tmp_path / "x.npz", models.images(64))
    model, rows = prepared(mobile(tmp_path / "m.onnx"), data)
    groups = find_groups(model.proto)
    assert [group.width for group in groups] == [48, 32]

    pruned = prune(model, rows, judged(model, rows), Budget(), ShrinkConfig(prune=0.5))
    assert pruned.chosen is not None
    assert all(width % MULTIPLE == 0 for width in pruned.chosen.widths)
    assert pruned.chosen.widths != (48, 32)
    assert pruned.chosen.comparison.sqnr > 10
    depthwise = [node for node in pruned.model.proto.graph.node if node.name == "depthwise"]
    if depthwise and pruned.chosen.widths[0] < 48:
        groups_of = {item.name: helper.get_attribute_value(item) for item in depthwise[0].attribute}
        assert groups_of["group"] == pruned.chosen.widths[0]


def test_a_flattened_image_keeps_its_values_with_their_channel(tmp_path: Path) -> None:
    data = models.write_rows(tmp_path / "x.npz", models.images(128))
    model, rows = prepared(models.convolution(tmp_path / "m.onnx"), data)
    assert [group.consumers[0].block for group in find_groups(model.proto)][-1] == 16
    pruned = prune(model, rows, judged(model, rows), Budget(), ShrinkConfig(prune=0.4))
    assert pruned.chosen is not None
    assert pruned.chosen.widths[-1] == 16
    assert pruned.chosen.comparison.sqnr > 8


def test_what_is_read_elsewhere_is_not_narrowed(tmp_path: Path) -> None:
    data = models.write_rows(tmp_path / "x.npz", models.rows(50))
    model, rows = prepared(residual(tmp_path / "m.onnx"), data)
    assert find_groups(model.proto) == ()
    with pytest.raises(BadModel, match="nothing in this model can be pruned"):
        prune(model, rows, judged(model, rows), Budget(), ShrinkConfig(prune=0.5))


def test_auto_stays_inside_half_of_the_budget(tmp_path: Path) -> None:
    data = models.write_rows(tmp_path / "x.npz", models.rows(300))
    model, rows = prepared(low_rank(tmp_path / "m.onnx", width=512, rank=20), data)
    pruned = prune(model, rows, judged(model, rows), Budget(min_sqnr=25), ShrinkConfig(prune="auto"))
    assert pruned.chosen is not None
    assert pruned.chosen.comparison.sqnr >= 28 or (pruned.chosen.comparison.agreement or 0) >= 0.995
    assert [point.bytes for point in pruned.curve] == sorted((p.bytes for p in pruned.curve), reverse=True)
    assert pruned.chosen.share < 0.6


def test_a_target_size_is_met_or_the_closest_is_said(tmp_path: Path) -> None:
    data = models.write_rows(tmp_path / "x.npz", models.rows(300))
    model, rows = prepared(low_rank(tmp_path / "m.onnx", width=512, rank=20), data)
    sizes = Sizes(model.proto, find_groups(model.proto))
    target = sizes.bytes([512]) * 2 // 3
    pruned = prune(model, rows, judged(model, rows), Budget(), ShrinkConfig(target_size=target))
    assert pruned.chosen is not None
    assert pruned.chosen.bytes <= target
    with pytest.raises(BadModel, match=r"target size 0\.0001 MB cannot be reached .* the closest is"):
        prune(model, rows, judged(model, rows), Budget(), ShrinkConfig(target_size=100))


def test_a_target_that_int8_meets_prunes_nothing(tmp_path: Path) -> None:
    data = models.write_rows(tmp_path / "x.npz", models.rows(50))
    model, rows = prepared(low_rank(tmp_path / "m.onnx"), data)
    pruned = prune(model, rows, judged(model, rows), Budget(), ShrinkConfig(target_size=10**6))
    assert pruned.model is model
    assert pruned.widths == ()


def test_the_same_rows_give_the_same_graph(tmp_path: Path) -> None:
    data = models.write_rows(tmp_path / "x.npz", models.rows(200))
    made = []
    for _ in range(2):
        model, rows = prepared(models.autoencoder(tmp_path / "m.onnx"), data)
        pruned = prune(model, rows, judged(model, rows), Budget(), ShrinkConfig(prune=0.5))
        made.append(pruned.model.proto.SerializeToString(deterministic=True))
    assert made[0] == made[1]


def test_columns_that_explain_most_come_first() -> None:
    chance = np.random.default_rng(0)
    base = chance.standard_normal((400, 4)).astype(np.float32)
    columns = np.concatenate([base, base @ chance.standard_normal((4, 12)).astype(np.float32)], axis=1)
    goal = columns @ chance.standard_normal((16, 6)).astype(np.float32)
    order, error = pivoted(columns.T @ columns, columns.T @ goal, float((goal**2).sum()))
    assert sorted(order) == list(range(16))
    assert error[0] == pytest.approx(1.0, abs=1e-3)
    assert error[4] < 1e-3
    assert (np.diff(error) <= 1e-9).all()


def test_ridge_finds_the_weights_that_made_the_outputs() -> None:
    chance = np.random.default_rng(0)
    inputs = chance.standard_normal((500, 20)).astype(np.float32)
    true = chance.standard_normal((20, 3)).astype(np.float32)
    wanted = inputs @ true + np.float32(0.5)
    weights, bias = ridge(inputs, wanted, np.zeros((20, 3), np.float32), with_bias=True)
    assert np.abs(weights - true).max() < 1e-2
    assert np.abs(bias - 0.5).max() < 1e-2


def test_fewer_rows_than_channels_stay_near_the_weights_there_were() -> None:
    chance = np.random.default_rng(0)
    inputs = chance.standard_normal((10, 40)).astype(np.float32)
    before = chance.standard_normal((40, 3)).astype(np.float32)
    weights, _ = ridge(inputs, inputs @ before, before, with_bias=False)
    assert np.abs(weights - before).max() < 1e-4


def test_the_group_that_loses_least_goes_first(tmp_path: Path) -> None:
    data = models.write_rows(tmp_path / "x.npz", models.rows(50))
    model, _ = prepared(models.autoencoder(tmp_path / "m.onnx"), data)
    groups = find_groups(model.proto)
    sizes = Sizes(model.proto, groups)
    steep, flat = np.linspace(10, 0, 65), np.linspace(0.01, 0, 65)
    widths = allocate(groups, [steep, flat], sizes.bytes, sizes.bytes([64, 32]))
    assert widths == [64, 32]


@pytest.mark.parametrize(
    ("text", "size"), [("12MB", 12_000_000), ("300kB", 300_000), ("1.5MiB", 1_572_864), ("4096", 4096)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert ShrinkConfig.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "12 parsec", "nan"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as 12MB"):
        ShrinkConfig.parse_size(text)


@pytest.mark.parametrize("text", ["0", "1", "-0.5", "much"])
def test_a_share_to_prune_lies_between_zero_and_one(text: str) -> None:
    with pytest.raises(ValueError, match="expected none, auto or a share"):
        ShrinkConfig.parse_prune(text)


def test_no_group_could_be_wider_inside_the_target(tmp_path: Path) -> None:
    data = models.write_rows(tmp_path / "x.npz", models.rows(50))
    model, _ = prepared(low_rank(tmp_path / "m.onnx", width=2048), data)
    groups = find_groups(model.proto)
    sizes = Sizes(model.proto, groups)
    target = sizes.bytes([1300])
    widths = allocate(groups, [np.linspace(1, 0, 2049)], sizes.bytes, target)
    assert sizes.bytes(widths) <= target < sizes.bytes([widths[0] + MULTIPLE])
