"""The example end to end, and the MLPerf Tiny autoencoder where the shared data is at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from edge_agent.contract import bundle
from edge_agent.contract.manifest import Manifest
from examples import dataset
from examples.train_autoencoder import OUTPUT
from quantize.cli import main

SHARED = Path(os.environ.get("EDGE_SHARED_DATA", Path(__file__).parents[2].parent / "shared")) / "data"


def scores(path: Path, rows: np.ndarray, name: str = "x") -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["score"], {name: rows})[0]


def build(folder: Path, version: str, *, factor: float = 1.0, options: tuple[str, ...] = ()) -> bundle.Bundle:
    folder.mkdir(exist_ok=True)
    calibration = dataset.write_calibration(folder / f"calibration-{version}.npz", factor=factor)
    validation = dataset.write_validation(folder / "validation.npz")
    command = [str(OUTPUT), "--calibration", str(calibration), "--scale", "standard"]
    command += ["--name", "cells", "--version", version, "--out", str(folder / "bundles"), "--quiet"]
    if factor == 1.0:
        command += ["--validation", str(validation)]
    assert main([*command, *options]) == 0
    return bundle.open_bundle(folder / "bundles" / f"cells-{version}")


def failed(manifest: Manifest, made: bundle.Bundle, rows: np.ndarray) -> np.ndarray:
    assert manifest.decision is not None
    return scores(made.member("model.onnx"), rows) > manifest.decision.threshold


def test_the_example_detects_bad_rows_about_as_well_as_in_fp32(tmp_path):
    made = build(tmp_path, "1.0.0")
    report = json.loads(made.read("report.json"))
    assert report["comparison"]["auc"] > 0.93
    assert abs(report["comparison"]["auc"] - report["comparison"]["auc_reference"]) < 0.005
    assert report["comparison"]["agreement"] > 0.97
    assert report["fallback"]["auc"] > 0.9
    assert report["fallback"]["false_alarms"] < 0.1
    assert made.path.joinpath("model.onnx").stat().st_size < OUTPUT.stat().st_size / 3.5
    split = dataset.load()
    decided = failed(made.manifest, made, split.held_out)
    assert decided[split.labels == 0].mean() < 0.08
    assert decided[split.labels == 1].mean() > 0.5


def test_missing_values_of_the_example_are_answered_with_finite_scores(tmp_path):
    made = build(tmp_path, "1.0.0")
    rows = dataset.with_missing(dataset.load().held_out, 0.2)
    assert np.isfinite(scores(made.member("model.onnx"), rows)).all()


def test_wrong_units_pass_the_self_test_and_fail_in_life(tmp_path):
    """What the demo rolls out as version 3: only probation on live rows can find it."""
    good, bad = build(tmp_path, "1.0.0"), build(tmp_path, "3.0.0", factor=0.25)
    rows = dataset.load().calibration
    assert failed(good.manifest, good, rows).mean() < 0.05
    assert failed(bad.manifest, bad, rows).mean() > 0.9


def test_wrong_units_are_pointed_out_where_labelled_rows_show_them(tmp_path, capsys):
    calibration = dataset.write_calibration(tmp_path / "wrong.npz", factor=0.25)
    validation = dataset.write_validation(tmp_path / "validation.npz")
    command = [str(OUTPUT), "--calibration", str(calibration), "--validation", str(validation)]
    command += [
        "--scale",
        "standard",
        "--name",
        "cells",
        "--version",
        "3.0.0",
        "--out",
        str(tmp_path),
        "--quiet",
    ]
    assert main(command) == 0
    assert "same units?" in capsys.readouterr().out


def test_the_committed_model_is_the_one_the_script_trains(tmp_path):
    import onnx

    committed = onnx.load(OUTPUT)
    assert [tuple(t.dims) for t in committed.graph.initializer if t.name.startswith("W")] == [
        (30, 512), (512, 256), (256, 16), (16, 256), (256, 512), (512, 30),
    ]  # fmt: skip


def test_the_parts_of_the_example_data_share_no_row():
    split = dataset.load()
    parts = (split.train, split.calibration, split.held_out)
    rows = [tuple(row) for part in parts for row in part.tolist()]
    assert len(rows) == len(set(rows)) == 569
    assert split.labels.sum() == 212


def test_mlperf_tiny_anomaly_detection_keeps_its_published_score(tmp_path):
    folder = SHARED / "mlperf_tiny_ad"
    if not folder.exists():
        pytest.skip(f"the shared data is not at {folder} (set EDGE_SHARED_DATA)")
    windows = folder / "sample_windows.npz"
    command = [str(folder / "ad01_fp32.onnx"), "--calibration", str(windows), "--name", "toycar"]
    assert main([*command, "--version", "1.0.0", "--out", str(tmp_path), "--quiet"]) == 0
    made = bundle.open_bundle(tmp_path / "toycar-1.0.0")
    model = made.member("model.onnx")
    assert model.stat().st_size < 300_000
    with np.load(windows) as data:
        rows, published = data["X"], data["score_fp32"]
    assert published.mean() == pytest.approx(9.4913, abs=1e-4)
    assert scores(model, rows).mean() == pytest.approx(9.4913, rel=0.01)

    from quantize import runtime
    from quantize.config import PrepareConfig
    from quantize.load import load_model, load_rows
    from quantize.prepare import prepare

    source = load_model(folder / "ad01_fp32.onnx")
    prepared = prepare(source, load_rows(windows, source.inputs), PrepareConfig())
    reference = runtime.run_all(runtime.open_session(prepared.proto), {"x": rows})["score"]
    assert reference.mean() == pytest.approx(9.4913, abs=1e-4)
