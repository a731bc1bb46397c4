"""A pruned dense network is brought closer to the original as a whole; others are left to least squares."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from quantize import runtime
from quantize.channels import Net, find_groups
from quantize.config import Budget, PrepareConfig, ShrinkConfig
from quantize.data import load_rows
from quantize.distil import _ACTIVATIONS, Stage, chain_of, descend, distilled
from quantize.load import load_model
from quantize.mixing import mixed, swapped
from quantize.prepare import prepare
from quantize.prune import prune
from tests.quantize import models
from tests.quantize.test_prune import judged, low_rank, mobile, prepared, residual

WIDE = (models.WIDTH, 96, 48, 96, models.WIDTH)


def autoencoder(path: Path, *, activation: str = "Relu") -> Path:
    """A dense chain with random weights, as wide inside as pruning needs."""
    chance = np.random.default_rng(7)
    weights, nodes, tensor = {}, [], "x"
    for index, (before, after) in enumerate(itertools.pairwise(WIDE)):
        weights[f"W{index}"] = (chance.standard_normal((before, after)) / np.sqrt(before)).astype(np.float32)
        weights[f"b{index}"] = (0.1 * chance.standard_normal(after)).astype(np.float32)
        last = index == len(WIDE) - 2
        made = "y" if last else f"h{index}"
        nodes.append(helper.make_node("Gemm", [tensor, f"W{index}", f"b{index}"], [made], f"layer{index}"))
        tensor = made
        if not last:
            nodes.append(helper.make_node(activation, [made], [f"a{index}"]))
            tensor = f"a{index}"
    inputs = [("x", TensorProto.FLOAT, ["N", models.WIDTH])]
    return models.save(path, nodes, weights, inputs, [("y", ["N", models.WIDTH])])


def reconstruction(proto: onnx.ModelProto, rows: np.ndarray) -> np.ndarray:
    session = runtime.open_session(proto)
    return runtime.run(session, {"x": rows})["y"]


def narrowed(proto: onnx.ModelProto, keep: int) -> onnx.ModelProto:
    """The first ``keep`` channels of the first group, and nothing repaired."""
    net, group = Net(proto), find_groups(proto)[0]
    kept = np.arange(keep)
    net.take(group.producer, 1, 1, kept)
    net.take(group.producer, 2, 0, kept)
    net.take(group.consumers[0].node, 1, 0, kept)
    return net.proto()


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu", "Sigmoid", "Tanh"])
def test_a_narrowed_network_comes_closer_on_rows_it_has_not_seen(tmp_path: Path, activation: str) -> None:
    original = onnx.load(autoencoder(tmp_path / "m.onnx", activation=activation))
    pruned = narrowed(original, 48)
    chain = chain_of(original)
    assert chain is not None
    assert [stage.activation for stage in chain.stages] == [activation, activation, activation, ""]
    before = pruned.SerializeToString()
    closer = distilled(original, pruned, chain, {"x": models.rows(300)}, 64)
    assert closer is not None
    assert pruned.SerializeToString() == before

    fresh = models.rows(200, seed=9)
    wanted = reconstruction(original, fresh)
    error = [float(((reconstruction(one, fresh) - wanted) ** 2).mean()) for one in (pruned, closer)]
    assert error[1] < error[0] / 4


def test_the_chosen_point_says_that_it_was_distilled(tmp_path: Path) -> None:
    values = np.random.default_rng(5).standard_normal((300, models.WIDTH)).astype(np.float32)
    data = models.write_rows(tmp_path / "x.npz", values)
    source = load_model(autoencoder(tmp_path / "m.onnx"))
    rows = load_rows(data, source.inputs)
    model = prepare(source, rows, PrepareConfig())
    judge = judged(model, rows)
    pruned = prune(model, rows, judge, Budget(), ShrinkConfig(prune=0.8))
    assert pruned.chosen is not None
    assert pruned.chosen.distilled
    assert pruned.chosen in pruned.curve
    # What the curve says of the chosen point is what its graph is.
    assert judge(pruned.model.proto).sqnr == pytest.approx(pruned.chosen.comparison.sqnr)
    assert not any(point.distilled for point in pruned.curve if point is not pruned.chosen)


def test_the_same_rows_give_the_same_weights() -> None:
    chance = np.random.default_rng(0)
    inputs, wanted = chance.standard_normal((2, 600, 32)).astype(np.float32)
    layers = [(chance.standard_normal((32, 32)).astype(np.float32), None)] * 2
    stages = [Stage(0, "Relu", 0), Stage(1, "", 0)]
    made = [descend(layers, stages, inputs, wanted, 20) for _ in range(2)]
    assert all((one == other).all() for (one, _), (other, _) in zip(*made, strict=True))
    assert not (made[0][0][0] == layers[0][0]).all()


def test_only_plain_dense_chains_are_distilled(tmp_path: Path) -> None:
    assert chain_of(onnx.load(residual(tmp_path / "residual.onnx"))) is None
    data = models.write_rows(tmp_path / "x.npz", models.images(32))
    model, _ = prepared(mobile(tmp_path / "mobile.onnx"), data)
    assert chain_of(model.proto) is None
    assert chain_of(onnx.load(low_rank(tmp_path / "dense.onnx"))) is not None


def test_inputs_of_any_scale_are_learnt_from_alike() -> None:
    chance = np.random.default_rng(0)
    inputs = chance.standard_normal((600, 12)).astype(np.float32)
    weight = chance.standard_normal((12, 8)).astype(np.float32)
    bias = np.zeros(8, np.float32)
    wanted = np.maximum(inputs @ chance.standard_normal((12, 8)).astype(np.float32), 0)
    factor = np.logspace(-3, 3, 12, dtype=np.float32)
    errors = []
    for scale in (np.ones(12, np.float32), factor):
        layers = [(weight / scale[:, None], bias), (np.eye(8, dtype=np.float32), bias)]
        (first, one), (second, other) = descend(
            layers, [Stage(0, "Relu", 0), Stage(1, "", 0)], inputs * scale, wanted, 200
        )
        found = np.maximum(inputs * scale @ first + one, 0) @ second + other
        errors.append(float(((found - wanted) ** 2).mean()))
    assert errors[0] < float((wanted**2).mean()) / 4
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


@pytest.mark.parametrize("name", sorted(_ACTIVATIONS))
def test_slopes_are_those_of_the_values(name: str) -> None:
    at = np.array([-2.3, -0.4, 0.3, 1.7], np.float32)
    value, slope = _ACTIVATIONS[name](at, 0.2)
    ahead, behind = (_ACTIVATIONS[name](at + step, 0.2)[0] for step in (np.float32(1e-2), np.float32(-1e-2)))
    assert np.allclose((ahead - behind) / 2e-2, slope, atol=1e-3)
    assert value.dtype == np.float32


def test_mixed_rows_keep_mean_and_covariance() -> None:
    chance = np.random.default_rng(0)
    rows = (chance.standard_normal((500, 6)) @ chance.standard_normal((6, 6)) + 5).astype(np.float32)
    made = mixed({"x": rows}, 40_000, chance)["x"]
    assert made.dtype == np.float32
    assert np.allclose(made.mean(axis=0), rows.mean(axis=0), atol=0.1)
    assert np.allclose(np.cov(made.T), np.cov(rows.T), atol=0.06 * float(np.cov(rows.T).max()))
    assert len(np.unique(made, axis=0)) == len(made)


def test_inputs_of_one_row_are_mixed_alike() -> None:
    chance = np.random.default_rng(0)
    rows = chance.standard_normal((50, 3)).astype(np.float32)
    made = mixed({"x": rows, "twice": 2 * rows.reshape(50, 3, 1)}, 100, chance)
    assert np.allclose(made["twice"][:, :, 0], 2 * made["x"], atol=1e-5)


def test_a_missing_value_stays_missing_in_what_is_mixed_of_it() -> None:
    rows = np.ones((20, 2), np.float32)
    rows[::2, 0] = np.nan
    made = mixed({"x": rows}, 100, np.random.default_rng(0))["x"]
    assert 0.5 < np.isnan(made[:, 0]).mean() < 1
    assert np.allclose(made[:, 1], 1)


def test_swapped_values_come_from_the_same_feature() -> None:
    chance = np.random.default_rng(0)
    rows = np.arange(400, dtype=np.float32).reshape(100, 4)
    made = swapped(rows, rows, chance)
    assert (made % 4 == rows % 4).all()
    share = float((made != rows).mean())
    assert 0.1 < share < 0.4
