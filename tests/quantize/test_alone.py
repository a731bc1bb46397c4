"""The graph with a switch: what one layer in INT8 costs, without a file for each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from quantize import compare, runtime
from quantize.alone import open_alone
from quantize.calibrate import calibrate
from quantize.int8 import static_recipe, write_int8
from quantize.plan import Mode, plan_of
from tests.quantize import models
from tests.quantize.test_search import Case


def attention(path: Path) -> Path:
    """An embedding, an LSTM with two outputs that are read, and a MatMul of its sequence."""
    random = np.random.default_rng(4)
    weights = {
        "table": random.standard_normal((600, 32)).astype(np.float32),
        "W": (random.standard_normal((1, 64, 32)) * 0.2).astype(np.float32),
        "R": (random.standard_normal((1, 64, 16)) * 0.2).astype(np.float32),
        "M": (random.standard_normal((16, 8)) * 0.3).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["steps"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["steps", "W", "R"], ["all", "last"], hidden_size=16),
        helper.make_node("Transpose", ["all"], ["front"], perm=[2, 0, 1, 3]),
        helper.make_node("MatMul", ["front", "M"], ["y"]),
        helper.make_node("Transpose", ["last"], ["end"], perm=[1, 0, 2]),
    ]
    inputs = [("ids", TensorProto.INT64, ["N", 6])]
    outputs = [("y", ["N", 6, 1, 8]), ("end", ["N", 1, 16])]
    return models.save(path, nodes, weights, inputs, outputs)


UNITS = np.logspace(-2, 3, models.WIDTH, dtype=np.float32)
DATA = {
    "dense": (models.autoencoder, lambda: models.rows(40) / UNITS),
    "images": (models.convolution, lambda: models.images(40)),
    "recurrent": (attention, lambda: np.random.default_rng(8).integers(0, 600, (40, 6))),
}


@pytest.mark.parametrize("kind", DATA)
def test_each_form_switched_on_alone_gives_what_the_file_with_that_layer_gives(kind, tmp_path):
    model, data = DATA[kind]
    case = Case(model(tmp_path / "m.onnx"), models.write_rows(tmp_path / "x.npz", data()))
    proto, inputs = case.model.proto, case.rows.inputs
    plan = plan_of(proto)
    recipe = static_recipe(plan, calibrate(case.model, plan.watched, case.rows).ranges())
    together = open_alone(proto, plan, recipe)
    expected = runtime.run_all(runtime.open_session(proto), inputs)
    off = runtime.run_all(together.switched(None), inputs)
    assert compare.outputs(expected, off).sqnr > 120
    assert len(together.forms) >= 3
    for layer, mode in together.forms:
        modes = {other.node: Mode.FLOAT for other in plan.layers} | {layer.node: mode}
        written = write_int8(proto, plan, replace(recipe, modes=modes))
        one = runtime.run_all(runtime.open_session(written), inputs)
        other = runtime.run_all(together.switched((layer, mode)), inputs)
        noise = compare.outputs(expected, one).sqnr
        assert noise < 100
        # Where the INT8 form of the file begins before a Flatten its range is that of what is flattened.
        assert compare.outputs(expected, other).sqnr == pytest.approx(noise, abs=0.5), (layer.name, mode)
