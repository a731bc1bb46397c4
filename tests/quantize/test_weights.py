"""Large weights are kept once: graphs refer to a file, and run, copy and save as if they held them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantize import runtime, weights
from quantize.load import load_model
from quantize.normalise import normalise
from quantize.weights import LARGE, WeightFile, array_of
from tests.quantize import models


def wide(path: Path, width: int = 1024) -> Path:
    """MatMul and Add, as an exporter writes them that knows no Gemm: 32-width-width-32."""
    held = models.dense([32, width, width, 32])
    nodes, tensor = [], "x"
    for index in range(3):
        out = "y" if index == 2 else f"h{index}"
        nodes.append(helper.make_node("MatMul", [tensor, f"W{index}"], [f"m{index}"]))
        nodes.append(helper.make_node("Add", [f"m{index}", f"b{index}"], [out]))
        tensor = out
    inputs = [("x", TensorProto.FLOAT, ["N", 32])]
    return models.save(path, nodes, held, inputs, [("y", ["N", 32])])


@pytest.fixture
def shared(tmp_path):
    """A model of 4 MB whose large weight is in a file, and the same with all in memory."""
    proto = onnx.load(wide(tmp_path / "wide.onnx"))
    return WeightFile(tmp_path).take(proto), onnx.load(tmp_path / "wide.onnx")


def test_a_graph_that_refers_to_its_weights_is_small_and_has_the_same_numbers(shared):
    small, whole = shared
    assert whole.ByteSize() > LARGE > 3 * small.ByteSize()
    for one, other in zip(small.graph.initializer, whole.graph.initializer, strict=True):
        assert one.name == other.name
        np.testing.assert_array_equal(array_of(one), numpy_helper.to_array(other))


def test_it_runs_like_the_whole_one(shared):
    feeds = {"x": models.rows(20, width=32) / 1000}
    got, wanted = (runtime.run(runtime.open_session(proto), feeds)["y"] for proto in shared)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_kernels_that_are_timed_pack_their_weights(shared):
    """Slower than on a device would be unfair to FP32: packed weights give the bits of the whole model."""
    feeds = {"x": models.rows(20, width=32) / 1000}
    got, wanted = (runtime.run(runtime.open_session(proto, timed=True), feeds)["y"] for proto in shared)
    np.testing.assert_array_equal(got, wanted)


def test_a_saved_model_stands_alone(shared, tmp_path):
    small, whole = shared
    (tmp_path / "elsewhere").mkdir()
    weights.save(small, tmp_path / "elsewhere" / "model.onnx")
    (tmp_path / "weights").unlink()
    assert onnx.load(tmp_path / "elsewhere" / "model.onnx") == whole
    assert (tmp_path / "elsewhere" / "model.onnx").stat().st_size == whole.ByteSize()


def test_a_whole_model_is_saved_as_onnx_does_it(shared, tmp_path):
    _, whole = shared
    weights.save(whole, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == whole.SerializeToString()


def test_what_a_saved_model_takes_is_known_before(shared):
    for small, whole in zip(*(proto.graph.initializer for proto in shared), strict=True):
        assert weights.file_size(small) == whole.ByteSize()


def test_the_checker_sees_what_is_wrong_with_a_graph_that_refers_to_its_weights(shared):
    small, _ = shared
    weights.check(small)
    small.graph.node[0].input[1] = "absent"
    with pytest.raises(onnx.checker.ValidationError, match="absent"):
        weights.check(small)


def test_normal_form_is_the_same_wherever_the_weights_are(tmp_path):
    path, rows = wide(tmp_path / "wide.onnx"), {"x": models.rows(40, width=32) / 1000}
    one, other = (normalise(load_model(path, folder=folder), rows).proto for folder in (None, tmp_path))
    assert [node.op_type for node in one.graph.node] == ["Gemm"] * 3
    assert list(one.graph.node) == list(other.graph.node)
    assert any(weights.is_shared(tensor) for tensor in other.graph.initializer)
    for here, there in zip(one.graph.initializer, other.graph.initializer, strict=True):
        np.testing.assert_array_equal(array_of(here), array_of(there))


def test_below_a_folder_whose_name_is_not_utf8_weights_stay_in_memory(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    model = load_model(wide(tmp_path / "wide.onnx"), folder=folder)
    assert not weights.any_shared(model.proto.graph)


def test_a_model_of_67_mb_is_prepared_in_less_than_four_times_its_size(tmp_path):
    """The interpreter and its libraries included; with weights copied it was nine times."""
    wide(tmp_path / "wide.onnx", 4096)
    script = """if True:
        import sys
        from pathlib import Path
        import numpy as np
        from quantize.load import load_model
        from quantize.normalise import normalise
        folder = Path(sys.argv[1])
        rows = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
        normalise(load_model(folder / "wide.onnx", folder=folder), {"x": rows})
        print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
    """
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < 4 * (tmp_path / "wide.onnx").stat().st_size
