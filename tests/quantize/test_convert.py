"""scikit-learn and PyTorch files: converted where the extra is installed, and pickles only when trusted."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from edge_agent.contract import baseline, bundle
from edge_agent.contract.manifest import Task
from quantize.cli import main
from quantize.errors import BadModel
from quantize.load import load_model
from tests.quantize import models
from tests.quantize.models import quantize_fast as quantize

WIDTH = 10
SKLEARN = all(importlib.util.find_spec(name) for name in ("skl2onnx", "skops"))
needs_sklearn = pytest.mark.skipif(not SKLEARN, reason="skl2onnx and skops (extra sklearn) are not installed")


class Bomb:
    """What a hostile pickle is: something that runs when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def rows(count: int = 300) -> np.ndarray:
    units = np.logspace(-1, 2, WIDTH)
    return (np.random.default_rng(0).standard_normal((count, WIDTH)) * units).astype(np.float32)


@pytest.fixture(scope="module")
def pipeline():
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = rows()
    network = MLPClassifier(hidden_layer_sizes=(64, 64), max_iter=400, random_state=0)
    return make_pipeline(StandardScaler(), network).fit(x, x[:, 0] > 0)


@pytest.mark.parametrize("suffix", [".joblib", ".pkl", ".pt2"])
def test_a_pickle_is_not_even_opened_without_trust(tmp_path, suffix):
    import joblib

    joblib.dump(Bomb(tmp_path / "ran"), tmp_path / f"model{suffix}")
    with pytest.raises(BadModel, match="give --trust"):
        load_model(tmp_path / f"model{suffix}")
    assert not (tmp_path / "ran").exists()


def test_a_file_that_is_missing_says_so_before_anything_else(tmp_path):
    with pytest.raises(BadModel, match="No such file"):
        load_model(tmp_path / "absent.skops")


@needs_sklearn
def test_a_scikit_learn_classifier_becomes_a_bundle_that_agrees_with_it(tmp_path, pipeline):
    from skops import io

    io.dump(pipeline, tmp_path / "press.skops")
    x = rows()
    good = models.write_rows(tmp_path / "good.npz", x[x[:, 0] <= 0])
    every = models.write_rows(tmp_path / "all.npz", x, y=x[:, 0] > 0)
    options = ("--fail-class", "1", "--validation", str(every))
    assert quantize(tmp_path / "press.skops", good, tmp_path / "out", *options) == 0
    made = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3")
    assert made.manifest.task is Task.CLASSIFICATION
    session = onnxruntime.InferenceSession(made.member("model.onnx"), providers=["CPUExecutionProvider"])
    score = session.run(["score"], {"X": x})[0]
    assert np.abs(score - pipeline.predict_proba(x)[:, 1]).max() < 0.05
    assert ((score > 0.5) == pipeline.predict(x)).mean() > 0.99


@needs_sklearn
def test_a_trusted_pickle_is_converted(tmp_path, pipeline):
    import joblib

    joblib.dump(pipeline, tmp_path / "press.joblib")
    loaded = load_model(tmp_path / "press.joblib", trust=True)
    assert [(entry.name, entry.shape) for entry in loaded.inputs] == [("X", (-1, WIDTH))]
    assert "converted from .joblib to ONNX" in loaded.notes


@needs_sklearn
def test_a_skops_file_with_types_that_may_do_harm_names_them(tmp_path, capsys):
    from skops import io

    io.dump(Bomb(tmp_path / "ran"), tmp_path / "model.skops")
    assert main([str(tmp_path / "model.skops"), "--inspect"]) == 1
    line = capsys.readouterr().err
    assert "Path.touch" in line or "Bomb" in line
    assert not (tmp_path / "ran").exists()


@needs_sklearn
@pytest.mark.parametrize("kind", ["isolation forest", "one-class SVM in a pipeline"])
def test_an_outlier_detector_becomes_a_bundle_whose_score_rises_with_the_outlier(tmp_path, kind, capsys):
    """It has nothing to make INT8 of: the bundle carries it as it is, with threshold, rules and baseline."""
    import joblib
    from sklearn.ensemble import IsolationForest
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import OneClassSVM

    forest = IsolationForest(n_estimators=5, random_state=0)
    detector = forest if kind == "isolation forest" else make_pipeline(StandardScaler(), OneClassSVM(nu=0.05))
    joblib.dump(detector.fit(rows()), tmp_path / "detector.joblib")
    data = models.write_rows(tmp_path / "x.npz", rows())
    assert quantize(tmp_path / "detector.joblib", data, tmp_path / "out", "--trust") == 0
    made = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3")
    manifest = made.manifest
    assert (manifest.task, manifest.precision) == (Task.ANOMALY, "fp32")
    assert manifest.decision is not None
    assert {bundle.RULES, baseline.FILE_NAME} <= set(manifest.members)
    far = rows(8) + 10 * rows(300).std(axis=0)
    session = onnxruntime.InferenceSession(made.member("model.onnx"))
    (scores,) = session.run([manifest.decision.output], {"X": far})
    np.testing.assert_allclose(scores.reshape(-1), -detector.decision_function(far), rtol=1e-3, atol=1e-4)
    assert (scores > manifest.decision.threshold).all()
    assert "Nothing in it can be INT8: the bundle carries the FP32 model." in capsys.readouterr().out


@needs_sklearn
@pytest.mark.parametrize(("option", "own"), [("auto", True), ("none", True), ("median", False)])
def test_missing_values_are_left_to_a_pipeline_that_has_an_imputer(tmp_path, option, own):
    import joblib
    from sklearn.impute import SimpleImputer
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = rows()
    imputer = SimpleImputer(strategy="constant", fill_value=5.0)  # far from any median
    network = MLPClassifier(hidden_layer_sizes=(64, 64), max_iter=200, random_state=0)
    pipeline = make_pipeline(StandardScaler(), imputer, network).fit(x, x[:, 0] > 0)
    joblib.dump(pipeline, tmp_path / "press.joblib")
    holed = x.copy()
    holed[::3, 4] = np.nan
    holed[1::7, 0] = np.nan
    data = models.write_rows(tmp_path / "x.npz", holed)
    options = ("--trust", "--fail-class", "1", "--impute", option)
    assert quantize(tmp_path / "press.joblib", data, tmp_path / "out", *options) == 0
    made = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3")
    (score,) = onnxruntime.InferenceSession(made.member("model.onnx")).run(["score"], {"X": holed})
    far = np.abs(score.reshape(-1) - pipeline.predict_proba(holed)[:, 1])
    assert far[~np.isnan(holed).any(axis=1)].max() < 0.1
    assert (far[np.isnan(holed[:, 0])].max() < 0.1) == own


@needs_sklearn
@pytest.mark.parametrize("thing", [{"a": 1}, "untrained"])
def test_what_is_no_fitted_estimator_is_refused(tmp_path, thing):
    import joblib
    from sklearn.linear_model import LinearRegression

    joblib.dump(LinearRegression() if thing == "untrained" else thing, tmp_path / "model.joblib")
    with pytest.raises(BadModel, match="expected a fitted scikit-learn estimator"):
        load_model(tmp_path / "model.joblib", trust=True)


@pytest.mark.skipif(SKLEARN, reason="the extra sklearn is installed")
def test_without_the_extra_the_message_says_how_to_install_it(tmp_path):
    (tmp_path / "model.skops").write_bytes(b"PK")
    with pytest.raises(BadModel, match=r"pip install 'edge-inference\[sklearn\]'"):
        load_model(tmp_path / "model.skops")


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed")
def test_without_torch_a_pt2_says_how_to_install_it(tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"PK")
    with pytest.raises(BadModel, match=r"pip install 'edge-inference\[torch\]'"):
        load_model(tmp_path / "model.pt2", trust=True)


@pytest.mark.timeout(600)  # exporting imports all of torch and takes a minute by itself on two cores
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch (extra torch) is not installed")
def test_an_exported_pytorch_program_becomes_a_bundle(tmp_path):
    import torch

    network = torch.nn.Sequential(
        torch.nn.Linear(WIDTH, 64), torch.nn.ReLU(), torch.nn.Linear(64, WIDTH)
    ).eval()  # fmt: skip
    batch = torch.export.Dim("batch")
    program = torch.export.export(network, (torch.zeros(2, WIDTH),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "ae.pt2")
    x = rows()
    data = models.write_rows(tmp_path / "rows.npz", x)
    assert quantize(tmp_path / "ae.pt2", data, tmp_path / "out", "--scale", "standard", "--trust") == 0
    made = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3")
    assert made.manifest.task is Task.ANOMALY
    session = onnxruntime.InferenceSession(made.member("model.onnx"), providers=["CPUExecutionProvider"])
    scaled = ((x - x.mean(axis=0)) / x.std(axis=0)).astype(np.float32)
    with torch.no_grad():
        expected = ((network(torch.from_numpy(scaled)).numpy() - scaled) ** 2).mean(axis=1)
    got = session.run(["score"], {session.get_inputs()[0].name: x})[0]
    assert np.corrcoef(got, expected)[0, 1] > 0.99
