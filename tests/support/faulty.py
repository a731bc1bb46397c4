"""A bundle whose model really raises, really gets stuck, or really answers NaN, where its input asks for it.

It scores like the tiny bundle. A row whose feature is above ``MARK`` in one column is the fault: ``f1``: an
index out of bounds, so onnxruntime raises; ``f2``: a loop of a thousand million turns for each unit; ``f3``:
not a number. Raising and hanging take the whole batch along, NaN its own row.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from onnx import TensorProto, helper, numpy_helper

from edge_agent.contract.bundle import MODEL, Bundle, write_bundle
from tests.support.bundles import IR_VERSION, OPSET, tiny_bundle

MARK = 100.0
GOOD = [0.5, 0.5, 0.5, 0.5]
RAISES, HANGS, NOT_A_NUMBER = [0.5, 200, 0.5, 0.5], [0.5, 0.5, 200, 0.5], [0.5, 0.5, 0.5, 200]


def faulty_bundle(folder: Path, *, hanging: bool, rules: str | None = None, version: str = "1.0.0") -> Bundle:
    """Write it into ``folder``; only with ``hanging`` there is a loop in its graph."""
    seed = tiny_bundle(folder.with_name(f"{folder.name}-seed"), rules=rules, version=version)
    files = {name: (seed.path / name).read_bytes() for name in seed.manifest.members}
    folder.mkdir()
    manifest = msgspec.structs.replace(seed.manifest, members={})
    return write_bundle(folder, manifest, files | {MODEL: _model(hanging)})


def _model(hanging: bool) -> bytes:
    def column(index: int) -> list[object]:
        """How far the worst row is above the mark in this column; 0 if none is."""
        name = f"f{index}"
        return [
            helper.make_node("Gather", ["features", f"at {index}"], [name], axis=1),
            helper.make_node("ReduceMax", [name], [f"{name} most"], keepdims=0),
            helper.make_node("Sub", [f"{name} most", "mark"], [f"{name} over"]),
            helper.make_node("Relu", [f"{name} over"], [f"{name} beyond"]),
        ]

    nodes = [
        helper.make_node("Mul", ["features", "features"], ["squares"]),
        helper.make_node("ReduceMean", ["squares"], ["mean"], axes=[1], keepdims=0),
        *column(1),
        helper.make_node("Cast", ["f1 beyond"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["one zero", "index"], ["raised"], axis=0),
        helper.make_node("Add", ["mean", "raised"], ["after raising"]),
        helper.make_node("Gather", ["features", "at 3"], ["last"], axis=1),
        helper.make_node("Greater", ["last", "mark"], ["is nan"]),
        helper.make_node("Where", ["is nan", "nan", "after raising"], ["after nan"]),
    ]
    if hanging:
        nodes += [
            *column(2),
            helper.make_node("Mul", ["f2 beyond", "many"], ["turns"]),
            helper.make_node("Cast", ["turns"], ["trips"], to=TensorProto.INT64),
            helper.make_node("Loop", ["trips", "", "start"], ["counted"], body=counting()),
            helper.make_node("Mul", ["counted", "start"], ["nothing"]),
            helper.make_node("Add", ["after nan", "nothing"], ["score"]),
        ]
    else:
        nodes.append(helper.make_node("Identity", ["after nan"], ["score"]))
    constants = {
        "mark": np.float32(MARK),
        "nan": np.float32(np.nan),
        "many": np.float32(1e9),
        "start": np.float32(0),
        "one zero": np.zeros(1, np.float32),
        **{f"at {index}": np.int64(index) for index in (1, 2, 3)},
    }
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "faulty",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch"])],
        [numpy_helper.from_array(np.array(value), name) for name, value in constants.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = IR_VERSION
    data: bytes = model.SerializeToString()
    return data


def counting() -> object:
    """The body of a ``Loop`` that adds one at each turn."""
    return helper.make_graph(
        [
            helper.make_node("Add", ["count", "one"], ["next"]),
            helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("trip", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("count", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, []),
        ],
        [numpy_helper.from_array(np.float32(1), "one")],
    )
