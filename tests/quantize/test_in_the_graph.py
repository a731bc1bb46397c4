"""Imputation, scaling and every kind of score are ONNX nodes; numpy says what they should give."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from edge_agent.contract import bundle
from edge_agent.contract.manifest import Task
from quantize.config import Impute, PrepareConfig, Scale, Score
from quantize.errors import BadData, BadModel
from quantize.load import load_model, load_rows
from quantize.prepare import PreparedModel, prepare
from tests.quantize import models
from tests.quantize.models import quantize_fast as quantize


def run(model: PreparedModel, rows: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(
        model.proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": rows}), strict=True))


def prepared(path, data, **config) -> PreparedModel:
    source = load_model(path)
    return prepare(source, load_rows(data, source.inputs), PrepareConfig(**config))


def reconstruction(path, rows: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": rows.astype(np.float32)})[0]


def quartiles(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, middle, high = np.quantile(rows.astype(np.float64), (0.25, 0.5, 0.75), axis=0)
    return middle, high - low


SCALES = {
    Scale.NONE: lambda rows: (0.0, 1.0),
    Scale.STANDARD: lambda rows: (rows.mean(axis=0), rows.std(axis=0)),
    Scale.MINMAX: lambda rows: (rows.min(axis=0), np.ptp(rows, axis=0)),
    Scale.ROBUST: quartiles,
}
ERRORS = {
    Score.MSE: lambda error: (error**2).mean(axis=1),
    Score.MAE: lambda error: np.abs(error).mean(axis=1),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("score", ERRORS)
def test_the_score_is_the_reconstruction_error_of_the_scaled_row(autoencoder, calibration, scale, score):
    rows, known = models.rows(50, seed=9), models.rows(200)
    offset, width = SCALES[scale](known.astype(np.float64))
    scaled = (rows - offset) / width
    expected = ERRORS[score](reconstruction(autoencoder, scaled) - scaled)
    got = run(prepared(autoencoder, calibration, scale=scale, score=score), rows)["score"]
    assert np.allclose(got, expected, rtol=2e-3)


def test_the_weighted_score_counts_every_feature_by_what_is_usual_for_it(autoencoder, calibration):
    known, rows = models.rows(200), models.rows(50, seed=9)
    offset, width = SCALES[Scale.STANDARD](known.astype(np.float64))

    def squares(raw: np.ndarray) -> np.ndarray:
        scaled = (raw - offset) / width
        return (reconstruction(autoencoder, scaled) - scaled) ** 2

    usual = squares(known).mean(axis=0)
    weights = 1 / np.maximum(usual, 0.05 * np.median(usual))
    model = prepared(autoencoder, calibration, scale=Scale.STANDARD, score=Score.WEIGHTED)
    assert np.allclose(run(model, rows)["score"], (squares(rows) * weights).mean(axis=1), rtol=2e-3)
    assert run(model, known)["score"].mean() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(
    ("config", "stands_in"),
    [
        ({"impute": Impute.MEDIAN}, np.median),
        ({"impute": Impute.MEAN}, lambda column: column.mean()),
        ({"impute": Impute.CONSTANT, "constant": -7.5}, lambda column: -7.5),
    ],
)
def test_what_stands_in_for_a_missing_value(autoencoder, calibration, config, stands_in):
    model = prepared(autoencoder, calibration, scale=Scale.STANDARD, **config)
    row = models.rows(1, seed=5)
    holed, filled = row.copy(), row.copy()
    holed[0, 4] = np.nan
    filled[0, 4] = stands_in(models.rows(200)[:, 4].astype(np.float64))
    assert run(model, holed)["score"] == run(model, filled)["score"]


def test_a_constant_that_stands_in_does_not_bend_the_scale(autoencoder, tmp_path):
    rows = models.rows(200)
    holed = rows.copy()
    holed[::2, 4] = np.nan
    data = models.write_rows(tmp_path / "holed.npz", holed)
    model = prepared(
        autoencoder, data, scale=Scale.STANDARD, impute=Impute.CONSTANT, constant=0.0, score=Score.MSE
    )
    factor = next(t for t in model.proto.graph.initializer if t.name == "factor")
    from onnx import numpy_helper

    measured = rows[1::2, 4].astype(np.float64)
    assert numpy_helper.to_array(factor)[0, 4] == pytest.approx(1 / measured.std(), rel=1e-4)


def test_missing_values_that_nothing_stands_in_for_say_so(autoencoder, tmp_path):
    rows = models.rows(50)
    rows[3, 2] = np.nan
    with pytest.raises(BadData, match="constant:VALUE"):
        prepared(autoencoder, models.write_rows(tmp_path / "holed.npz", rows), impute=Impute.NONE)


# -- classifiers ------------------------------------------------------------------------------------------


def classifier(path, *, softmax: bool):
    weights = models.dense([models.WIDTH, 64, 3])
    nodes = [
        helper.make_node("Gemm", ["x", "W0", "b0"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "W1", "b1"], ["logits"]),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["logits"], ["p"], axis=1))
    output = "p" if softmax else "logits"
    return models.save(
        path, nodes, weights, [("x", TensorProto.FLOAT, ["N", models.WIDTH])], [(output, ["N", 3])]
    )


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("has_softmax", [True, False], ids=["probabilities", "logits"])
@pytest.mark.parametrize("fail_class", [0, 2])
def test_the_score_of_a_classifier_is_the_probability_of_the_class_that_fails(
    tmp_path, calibration, has_softmax, fail_class
):
    path = classifier(tmp_path / "classes.onnx", softmax=has_softmax)
    model = prepared(path, calibration, scale=Scale.STANDARD, fail_class=fail_class)
    rows, known = models.rows(50, seed=9), models.rows(200)
    raw = reconstruction(path, (rows - known.mean(axis=0)) / known.std(axis=0))
    expected = raw if has_softmax else softmax(raw)
    got = run(model, rows)
    assert model.task is Task.CLASSIFICATION
    assert np.allclose(got["score"], expected[:, fail_class], atol=1e-5)
    table = got["p" if has_softmax else "probabilities"]
    assert np.allclose(table, expected, atol=1e-5)


def test_argmax_gives_the_class_and_fails_when_it_is_chosen(tmp_path, calibration):
    path = classifier(tmp_path / "classes.onnx", softmax=False)
    model = prepared(path, calibration, scale=Scale.STANDARD, score=Score.ARGMAX, fail_class=1)
    got = run(model, models.rows(50, seed=9))
    assert got["class"].dtype == np.int64
    assert np.array_equal(got["class"], got["logits"].argmax(axis=1))
    assert np.array_equal(got["score"], (got["class"] == 1).astype(np.float32))


def test_a_classifier_without_a_class_that_fails_has_classes_and_no_decision(tmp_path, calibration):
    path = classifier(tmp_path / "classes.onnx", softmax=False)
    assert quantize(path, calibration, tmp_path / "out", "--scale", "standard", "--score", "softmax") == 0
    manifest = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3").manifest
    assert manifest.task is Task.CLASSIFICATION
    assert manifest.decision is None
    assert [(t.name, t.shape) for t in manifest.outputs] == [("probabilities", (-1, 3))]


def test_the_bundle_of_a_classifier_decides_at_one_half(tmp_path, calibration):
    path = classifier(tmp_path / "classes.onnx", softmax=True)
    assert quantize(path, calibration, tmp_path / "out", "--scale", "standard", "--fail-class", "2") == 0
    made = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3")
    assert made.manifest.task is Task.CLASSIFICATION
    assert made.manifest.decision.output == "score"
    assert made.manifest.decision.threshold == 0.5
    assert {t.name for t in made.manifest.outputs} == {"p", "score"}
    assert "--fail-class 2" in made.manifest.provenance.command


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fail_class": 3}, "has 3 classes, 0 to 2"),
        ({"fail_class": -1}, "has 3 classes, 0 to 2"),
        ({"fail_class": 1, "score": Score.MSE}, "is for a classifier"),
    ],
)
def test_a_class_that_does_not_exist_or_a_score_that_does_not_fit(tmp_path, calibration, config, message):
    with pytest.raises(BadModel, match=message):
        prepared(classifier(tmp_path / "classes.onnx", softmax=True), calibration, **config)


def test_a_fail_class_of_a_model_without_classes_lists_its_outputs(tmp_path, calibration):
    with pytest.raises(BadModel, match=r"outputs are risk \[64, 1\]"):
        prepared(models.scorer(tmp_path / "scorer.onnx"), calibration, fail_class=1)
