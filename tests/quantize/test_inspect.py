"""``quantize-model --inspect``: what a model is and what would be done; writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from quantize.cli import main
from tests.quantize import models
from tests.quantize.test_load import branches


def facts(capsys, *words: str) -> dict:
    assert main([*words, "--inspect", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_dense_model_is_described(tmp_path, capsys):
    path = models.autoencoder(tmp_path / "ae.onnx", opset=11, constants=True)
    found = facts(capsys, str(path))
    weights = 4 * (2 * 12 * 64 + 64 * 64)
    assert found["opset"] == {"ai.onnx": 11}
    assert found["inputs"] == [{"name": "x", "type": "FLOAT", "shape": ["N", 12]}]
    assert found["operators"] == {"Constant": 6, "Gemm": 3, "Relu": 2}
    assert found["parameter_bytes"] == {"Gemm": weights + 4 * (64 + 64 + 12)}
    assert found["int8"]["layers"] == {"Gemm": 3}
    assert found["int8"]["int8_parameter_bytes"] == weights
    assert found["refused"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["ae.onnx"]


def test_weights_inside_branches_are_counted_and_a_setting_shows_what_it_does(tmp_path, capsys):
    path = branches(tmp_path / "both.onnx")
    found = facts(capsys, str(path))
    assert "--set sr=VALUE" in found["refused"]
    assert [body["operator"] for body in found["subgraphs"]] == ["If"]
    assert found["parameter_bytes"]["Gemm"] == 2 * 4 * (12 * 256 + 256 + 256 + 1)
    fixed = facts(capsys, str(path), "--set", "sr=16000")
    assert fixed["int8"]["layers"] == {"Gemm": 2}
    assert fixed["int8"]["parameter_bytes"] == 4 * (12 * 256 + 256 + 256 + 1)


def test_a_model_that_is_refused_is_described_with_the_reason(tmp_path, capsys):
    node = helper.make_node("TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 1]) for name in ("x", "y")]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "tree.onnx")
    assert main([str(tmp_path / "tree.onnx"), "--inspect"]) == 0
    assert "Cannot be quantized: " in capsys.readouterr().out


def test_a_file_that_is_no_model_is_one_line(tmp_path, capsys):
    (tmp_path / "model.onnx").write_bytes(b"no")
    assert main([str(tmp_path / "model.onnx"), "--inspect"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_text_for_people_names_inputs_weights_and_what_would_be_done(tmp_path, capsys):
    path = models.convolution(tmp_path / "cnn.onnx")
    assert main([str(path), "--inspect"]) == 0
    text = capsys.readouterr().out
    assert "input    image  FLOAT [N, 3, 16, 16]" in text
    assert "INT8: 2 Conv, 1 Gemm" in text


def test_usage_errors_name_what_is_missing(capsys):
    import pytest

    for words, missing in (([], "MODEL"), (["m.onnx"], "--calibration, --name, --version, --out")):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        assert missing in capsys.readouterr().err


def test_inspection_of_real_files_does_not_touch_data(tmp_path: Path, capsys):
    path = models.scorer(tmp_path / "scorer.onnx", batch=1)
    found = facts(capsys, str(path))
    assert found["fixed_batch"] is None
    assert np.prod(found["model_inputs"][0]["shape"]) == models.WIDTH
