"""The written bundle, judged from its files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edge_agent.contract import bundle as bundles
from edge_agent.contract import golden
from edge_agent.contract.golden import Agreement
from quantize.errors import QuantizeError
from quantize.verify import layer_errors, verify_bundle
from tests.quantize import models


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    data = models.write_rows(folder / "x.npz", models.images(64))
    assert models.quantize(models.convolution(folder / "m.onnx"), data, folder / "out", "--quiet") == 0
    return folder / "out" / "unit-1.2.3"


def changed(made: Path, folder: Path, name: str, data: bytes) -> Path:
    """The bundle with one member replaced and a manifest that fits it."""
    old = bundles.open_bundle(made)
    files = {member: (made / member).read_bytes() for member in old.manifest.members} | {name: data}
    folder.mkdir()
    bundles.write_bundle(folder, old.manifest, files)
    return folder


def test_a_good_bundle_passes_every_check_in_a_fresh_process(made):
    found = verify_bundle(made)
    assert not found.failed
    assert [check.name for check in found.checks] == [
        "digests",
        "onnx.checker",
        "golden vectors, fresh process",
        "fused graph",
    ]
    assert all(check.passed for check in found.checks)


def test_golden_vectors_are_exact_where_the_graph_is_int8_from_end_to_end(made):
    assert golden.parse((made / golden.FILE_NAME).read_bytes()).agreement is Agreement.EXACT


def test_golden_vectors_have_a_tolerance_where_float_is_left(tmp_path, autoencoder, calibration):
    assert models.quantize(autoencoder, calibration, tmp_path / "out", "--scale", "standard", "--quiet") == 0
    vectors = golden.parse((tmp_path / "out" / "unit-1.2.3" / golden.FILE_NAME).read_bytes())
    assert vectors.agreement is Agreement.TOLERANCE
    assert vectors.relative > 0


def test_another_model_does_not_match_the_golden_vectors(made, tmp_path):
    proto = onnx.load(made / "model.onnx")
    weight = next(t for t in proto.graph.initializer if len(t.dims) == 4)
    values = numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(np.roll(values, 1, axis=0), weight.name))
    found = verify_bundle(changed(made, tmp_path / "b", "model.onnx", proto.SerializeToString()))
    assert found.failed
    assert found.complaint is not None
    assert found.complaint.startswith("golden vectors, fresh process")


def test_a_file_that_is_no_model_fails_and_says_where(made, tmp_path):
    found = verify_bundle(changed(made, tmp_path / "b", "model.onnx", b"nothing of the kind"))
    assert next(check.name for check in found.checks if check.passed is False) == "onnx.checker"
    assert "FAILED" in found.text


def test_an_emulator_that_does_not_start_is_a_failed_check(made, tmp_path):
    found = verify_bundle(made, emulate=tmp_path / "no-such-python")
    assert found.checks[-1].name == "golden vectors, emulated ARM64"
    assert found.checks[-1].passed is False


def test_a_bundle_with_a_wrong_digest_is_refused(made, tmp_path):
    shutil.copytree(made, tmp_path / "b")
    (tmp_path / "b" / "model.onnx").write_bytes(b"x")
    with pytest.raises(QuantizeError, match=r"bundle .*model\.onnx"):
        verify_bundle(tmp_path / "b")


def test_errors_of_layers_are_those_of_tensors_both_graphs_have(tmp_path):
    reference = onnx.load(models.autoencoder(tmp_path / "m.onnx"))
    other = onnx.ModelProto()
    other.CopyFrom(reference)
    weight = next(tensor for tensor in other.graph.initializer if tensor.name == "W1")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), "W1"))
    errors = layer_errors(reference, other, {"x": models.rows(50)})
    assert list(errors) == ["h0", "h1", "y"]
    assert errors["h0"] == 200
    assert 30 < errors["h1"] < 50
