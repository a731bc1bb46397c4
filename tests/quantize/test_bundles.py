"""What lies in the output folder afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from edge_agent.contract import baseline, bundle, golden
from edge_agent.contract.manifest import Task
from edge_agent.rules.evaluate import RuleSet
from quantize.decide import spread_of
from tests.quantize import models
from tests.quantize.models import quantize


def run(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def tensors(arrays: tuple[golden.Array, ...]) -> dict[str, np.ndarray]:
    return {a.name: np.frombuffer(a.data, np.float32).reshape(a.shape) for a in arrays}


def test_a_bundle_holds_everything_the_agent_needs(autoencoder, calibration, tmp_path):
    assert quantize(autoencoder, calibration, tmp_path / "out", "--scale", "standard") == 0

    made = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3")
    made.verify()
    manifest = made.manifest
    assert manifest.task is Task.ANOMALY
    assert [(t.name, t.shape, t.features) for t in manifest.inputs] == [
        ("x", (-1, models.WIDTH), models.NAMES)
    ]
    assert [(t.name, t.shape) for t in manifest.outputs] == [("score", (-1,))]
    assert manifest.decision is not None
    assert manifest.decision.output == "score"
    assert manifest.precision == "int8"
    assert set(manifest.members) == {
        "model.onnx", "rules.yaml", "baseline.msgpack", "golden.msgpack", "report.json",
    }  # fmt: skip
    reference = baseline.parse(made.read(baseline.FILE_NAME))
    assert [histogram.name for histogram in reference.features] == list(models.NAMES)
    assert reference.score is not None
    rules = RuleSet.parse(made.read(bundle.RULES), models.NAMES)
    assert rules.evaluate(models.rows(200)).failed.mean() <= 0.02


def test_the_tar_is_the_same_bundle(autoencoder, calibration, tmp_path):
    quantize(autoencoder, calibration, tmp_path / "out")
    (tmp_path / "unpacked").mkdir()
    unpacked = bundle.unpack(tmp_path / "out" / "unit-1.2.3.tar", tmp_path / "unpacked")
    assert unpacked.digest == bundle.open_bundle(tmp_path / "out" / "unit-1.2.3").digest


def test_the_same_command_in_two_folders_gives_the_same_digest(autoencoder, calibration, tmp_path):
    digests = set()
    for folder in ("first", "second/deeper"):
        assert quantize(autoencoder, calibration, tmp_path / folder, "--scale", "standard") == 0
        digests.add(bundle.open_bundle(tmp_path / folder / "unit-1.2.3").digest)
        tar = (tmp_path / folder / "unit-1.2.3.tar").read_bytes()
        digests.add(bundle.Digest.of_bytes(tar))
    assert len(digests) == 2  # one of the manifest, one of the tar


def test_golden_vectors_hold_missing_values_and_outliers_and_the_written_model_agrees(
    autoencoder, calibration, tmp_path
):
    quantize(autoencoder, calibration, tmp_path / "out", "--scale", "standard")
    made = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3")
    vectors = golden.parse(made.read(golden.FILE_NAME))
    inputs, expected = tensors(vectors.inputs), tensors(vectors.outputs)
    assert len(inputs["x"]) == 16
    assert np.isnan(inputs["x"]).any(axis=1).sum() == 3
    assert (inputs["x"] > models.rows(200).max(axis=0)).any()
    assert np.isfinite(expected["score"]).all()
    assert 0 < vectors.relative < 0.05
    got = run(made.member("model.onnx"), inputs)
    assert np.allclose(got["score"], expected["score"], rtol=vectors.relative, atol=vectors.absolute)


def test_missing_values_score_as_their_median(autoencoder, calibration, tmp_path):
    quantize(autoencoder, calibration, tmp_path / "out", "--scale", "standard", "--impute", "median")
    model = tmp_path / "out" / "unit-1.2.3" / "model.onnx"
    whole = models.rows(200)
    row = whole[:1].copy()
    row[0, 4] = np.nan
    filled = row.copy()
    filled[0, 4] = np.median(whole[:, 4])
    assert run(model, {"x": row})["score"] == run(model, {"x": filled})["score"]


def test_the_score_is_the_mean_squared_error_against_the_scaled_input(autoencoder, calibration, tmp_path):
    from quantize.config import PrepareConfig, Scale
    from quantize.load import load_model, load_rows
    from quantize.prepare import prepare

    source = load_model(autoencoder)
    data = load_rows(calibration, source.inputs)
    prepared = prepare(source, data, PrepareConfig(scale=Scale.MINMAX))
    onnx.save(prepared.proto, tmp_path / "prepared.onnx")
    raw = models.rows(50, seed=8)
    low, high = models.rows(200).min(axis=0), models.rows(200).max(axis=0)
    scaled = (raw - low) / (high - low)
    reconstruction = run(autoencoder, {"x": scaled})["y"]
    expected = ((reconstruction - scaled) ** 2).mean(axis=1)
    assert np.allclose(run(tmp_path / "prepared.onnx", {"x": raw})["score"], expected, rtol=1e-3)


def test_the_threshold_is_the_quantile_of_the_calibration_scores_or_the_number(
    autoencoder, calibration, tmp_path
):
    quantize(autoencoder, calibration, tmp_path / "a", "--scale", "standard", "--threshold", "quantile:0.9")
    made = bundle.open_bundle(tmp_path / "a" / "unit-1.2.3")
    scores = run(made.member("model.onnx"), {"x": models.rows(200)})["score"]
    assert made.manifest.decision.threshold == pytest.approx(np.quantile(scores, 0.9), rel=1e-6)

    quantize(autoencoder, calibration, tmp_path / "b", "--threshold", "7.5")
    assert bundle.open_bundle(tmp_path / "b" / "unit-1.2.3").manifest.decision.threshold == 7.5


def test_timings_are_beside_the_bundle_and_not_in_it(autoencoder, calibration, tmp_path, capsys):
    assert quantize(autoencoder, calibration, tmp_path / "out", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    beside = json.loads((tmp_path / "out" / "unit-1.2.3.report.json").read_bytes())
    inside = json.loads((tmp_path / "out" / "unit-1.2.3" / "report.json").read_bytes())
    assert printed == beside
    assert beside["latency"]["fp32_seconds"] > 0
    assert set(beside) - set(inside) == {"bundle", "latency", "durations_seconds", "verification"}


def test_a_version_that_exists_is_only_replaced_by_itself(autoencoder, calibration, tmp_path, capsys):
    out = tmp_path / "out"
    assert quantize(autoencoder, calibration, out) == 0
    digest = bundle.open_bundle(out / "unit-1.2.3").digest
    assert quantize(autoencoder, calibration, out) == 0
    assert quantize(autoencoder, calibration, out, "--threshold", "3") == 1
    assert "exists with another content" in capsys.readouterr().err
    assert bundle.open_bundle(out / "unit-1.2.3").digest == digest
    assert quantize(autoencoder, calibration, out, "--threshold", "3", "--overwrite") == 0
    assert bundle.open_bundle(out / "unit-1.2.3").manifest.decision.threshold == 3
    assert sorted(path.name for path in out.iterdir()) == [
        "unit-1.2.3",
        "unit-1.2.3.report.html",
        "unit-1.2.3.report.json",
        "unit-1.2.3.tar",
    ]


def test_data_as_csv_gives_the_same_model_as_npz(autoencoder, calibration, tmp_path):
    data = models.rows(200)
    lines = [",".join((*models.NAMES, "y"))]
    lines += [",".join([*(repr(float(value)) for value in row), "0"]) for row in data]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    quantize(autoencoder, tmp_path / "rows.csv", tmp_path / "csv", "--scale", "standard")
    quantize(autoencoder, calibration, tmp_path / "npz", "--scale", "standard")
    members = [bundle.open_bundle(tmp_path / kind / "unit-1.2.3").manifest.members for kind in ("csv", "npz")]
    assert members[0]["model.onnx"] == members[1]["model.onnx"]
    assert members[0]["rules.yaml"] == members[1]["rules.yaml"]


def test_the_spread_of_confidence_is_fitted_on_the_rows_for_choosing(autoencoder, calibration, tmp_path):
    rows = np.concatenate([models.rows(60, seed=21), models.bad_rows(60, seed=22)])
    labels = np.repeat([0, 1], 60)
    held = models.write_rows(tmp_path / "held.npz", rows, y=labels)
    options = ("--validation", str(held), "--scale", "standard", "--quiet")
    assert quantize(autoencoder, calibration, tmp_path / "out", *options) == 0
    made = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3")
    scores = run(made.member("model.onnx"), {"x": rows})["score"]
    decision = made.manifest.decision
    choosing = np.arange(0, 120, 2)  # labels are sorted: every other row chooses, the rest judges
    judging = choosing + 1
    spreads = [spread_of(scores[part], labels[part] > 0, decision.threshold) for part in (choosing, judging)]
    assert spreads[0] != spreads[1]
    assert decision.spread == pytest.approx(spreads[0], rel=0.01)


def test_golden_vectors_of_large_inputs_are_few(tmp_path):
    data = models.write_rows(tmp_path / "large.npz", np.resize(models.images(40), (40, 3, 96, 96)))
    weights = {"K": np.random.default_rng(3).standard_normal((8, 3, 3, 3)).astype(np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "K"], ["c"], strides=[8, 8]),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["y"]),
    ]
    inputs = [("x", TensorProto.FLOAT, ["N", 3, 96, 96])]
    model = models.save(tmp_path / "large.onnx", nodes, weights, inputs, [("y", ["N", 8])])
    assert quantize(model, data, tmp_path / "out", "--quiet") == 0
    made = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3")
    vectors = golden.parse(made.read(golden.FILE_NAME))
    assert vectors.inputs[0].shape[0] == (1 << 20) // (3 * 96 * 96 * 4)
