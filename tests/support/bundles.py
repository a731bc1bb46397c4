"""Tiny real bundles: a real ONNX model with real rules, golden vectors and drift baseline, built in code.

The model's score is the mean of squares of the row, a missing value (NaN) counting as 0: a row of ones
scores 1, a row of threes scores 9. Calibration rows lie in [-1, 1]; the threshold of 4 is a row of twos.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from edge_agent.contract import baseline as baselines
from edge_agent.contract import golden as goldens
from edge_agent.contract.bundle import MODEL, RULES, Bundle, write_bundle
from edge_agent.contract.golden import Array, Golden
from edge_agent.contract.manifest import Datatype, Decision, Manifest, Task, TensorSpec
from edge_agent.contract.version import Version
from edge_agent.drift.binning import baseline_of
from edge_agent.rules.evaluate import Centre, Distance, RuleSet

THRESHOLD = 4.0
CALIBRATION_ROWS = 200
OPSET = 17
IR_VERSION = 8  # read by every onnxruntime since 1.12


def feature_names(features: int = 4) -> tuple[str, ...]:
    """``f0``, ``f1``, ...: the names of a tiny bundle's columns."""
    return tuple(f"f{index}" for index in range(features))


def expected_score(rows: np.ndarray) -> np.ndarray:
    """What the tiny model answers for (n, features) rows, in float64."""
    return np.mean(np.square(np.nan_to_num(rows.astype(np.float64), nan=0.0)), axis=1)


def tiny_bundle(
    folder: Path,
    name: str = "demo",
    version: str = "1.0.0",
    features: int = 4,
    threshold: float = THRESHOLD,
    bad: bool = False,
    *,
    non_finite_above: float | None = None,
    rules: str | None = None,
    fixed_batch: int | None = None,
) -> Bundle:
    """Write a bundle into ``folder`` (made if absent, expected empty).

    With ``bad`` the golden vectors do not agree with the model: the self-test of an update refuses it. With
    ``non_finite_above`` the model passes its golden vectors, but answers NaN for scores above that value: it
    fails in service. ``rules`` is another rules.yaml than the fitting one. With ``fixed_batch`` the model
    takes so many rows and no other number of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = feature_names(features)
    rows = np.random.default_rng(7).uniform(-1, 1, (CALIBRATION_ROWS, features)).astype(np.float32)
    scores = expected_score(rows)
    inputs = rows[:8]
    outputs = scores[:8].astype(np.float32) + np.float32(10.0 if bad else 0.0)
    golden = Golden(
        inputs=(Array("features", Datatype.FP32, inputs.shape, inputs.tobytes()),),
        outputs=(Array("score", Datatype.FP32, outputs.shape, outputs.tobytes()),),
        absolute=1e-5,
        relative=1e-5,
    )
    manifest = Manifest(
        name=name,
        version=Version(version),
        task=Task.ANOMALY,
        inputs=(TensorSpec("features", Datatype.FP32, (fixed_batch or -1, features), features=names),),
        outputs=(TensorSpec("score", Datatype.FP32, (fixed_batch or -1,)),),
        members={},
        decision=Decision("score", threshold, spread=1.0),
        precision="fp32",
    )
    files = {
        MODEL: _model(features, version, non_finite_above, fixed_batch or "batch"),
        RULES: (_rules(names, threshold).to_yaml() if rules is None else rules).encode(),
        goldens.FILE_NAME: goldens.encode(golden),
        baselines.FILE_NAME: baselines.encode(baseline_of(rows, names, scores)),
    }
    return write_bundle(folder, manifest, files)


def _rules(names: tuple[str, ...], threshold: float) -> RuleSet:
    """The same measure as the model: without missing values, rules and model decide alike."""
    distance = Distance(
        limit=threshold**0.5, features={name: Centre(centre=0.0, scale=1.0) for name in names}
    )
    return RuleSet(features=names, default="fail", distance=distance)


def _model(features: int, version: str, non_finite_above: float | None, batch: int | str) -> bytes:
    nodes = [
        helper.make_node("IsNaN", ["features"], ["missing"]),
        helper.make_node("Where", ["missing", "zero", "features"], ["imputed"]),
        helper.make_node("Mul", ["imputed", "imputed"], ["squares"]),
        helper.make_node("ReduceMean", ["squares"], ["mean"], axes=[1], keepdims=0),
    ]
    constants = {"zero": 0.0}
    if non_finite_above is None:
        nodes.append(helper.make_node("Identity", ["mean"], ["score"]))
    else:
        constants |= {"limit": non_finite_above, "nan": np.nan}
        nodes.append(helper.make_node("Greater", ["mean", "limit"], ["beyond"]))
        nodes.append(helper.make_node("Where", ["beyond", "nan", "mean"], ["score"]))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [batch, features])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, [batch])],
        [
            numpy_helper.from_array(np.array(value, np.float32), constant)
            for constant, value in constants.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_version=version)
    model.ir_version = IR_VERSION
    data: bytes = model.SerializeToString()
    return data
