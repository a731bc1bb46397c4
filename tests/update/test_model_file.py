"""A model file that reaches out of its bundle is refused before onnxruntime opens it."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edge_agent.contract.bundle import MODEL, write_bundle
from edge_agent.errors import EngineError, UpdateRejected
from edge_agent.store.state import Result
from edge_agent.update.model_file import check_model
from tests.support.bundles import tiny_bundle
from tests.update.devices import Device, Publisher


def model_with(nodes: list[onnx.NodeProto], tensors: list[onnx.TensorProto]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])], tensors,
    )  # fmt: skip
    return helper.make_model(graph)


def external(location: str) -> onnx.TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    return tensor


def inside_a_graph(tensor: onnx.TensorProto) -> onnx.NodeProto:
    """A branch of a branch: where a check of the top-level initializers alone does not look."""
    constant = helper.make_node("Constant", [], ["y"], value=tensor)
    branch = helper.make_graph([constant], "branch", [], [])
    inner = helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    return helper.make_node(
        "If", ["x"], ["y"], then_branch=helper.make_graph([inner], "outer", [], []), else_branch=branch
    )


def saved(path: Path, model: onnx.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def test_the_models_we_make_are_accepted(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    check_model(bundle.member(MODEL), bundle.manifest.members)


def test_weights_in_a_member_of_the_bundle_are_accepted(tmp_path: Path) -> None:
    check_model(saved(tmp_path / MODEL, model_with([], [external("model.onnx.data")])), {"model.onnx.data"})


@pytest.mark.parametrize("location", ["/etc/passwd", "../../blobs/x", "sub/model.onnx.data", "other.bin", ""])
@pytest.mark.parametrize("place", ["initializer", "attribute", "function"])
def test_weights_outside_the_bundle_are_refused_wherever_they_hide(
    tmp_path: Path, location: str, place: str
) -> None:
    tensor = external(location)
    if place == "initializer":
        model = model_with([], [tensor])
    elif place == "attribute":
        model = model_with([inside_a_graph(tensor)], [])
    else:
        model = model_with([], [])
        node = helper.make_node("Constant", [], ["y"], value=tensor)
        model.functions.append(helper.make_function("own", "F", ["x"], ["y"], [node], []))
    with pytest.raises(UpdateRejected, match="no member") as caught:
        check_model(saved(tmp_path / MODEL, model), {"model.onnx.data"})
    assert caught.value.reason == "external_data"


def test_a_sparse_tensor_is_looked_into(tmp_path: Path) -> None:
    model = model_with([], [])
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(external("/etc/passwd"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, np.int64)))
    with pytest.raises(UpdateRejected, match="/etc/passwd"):
        check_model(saved(tmp_path / MODEL, model), ())


def test_operators_of_a_custom_library_are_refused(tmp_path: Path) -> None:
    node = helper.make_node("Evil", ["x"], ["y"], domain="example.custom")
    with pytest.raises(UpdateRejected, match=r"example\.custom") as caught:
        check_model(saved(tmp_path / MODEL, model_with([node], [])), ())
    assert caught.value.reason == "custom_operators"


def test_functions_that_the_model_defines_itself_are_no_custom_operators(tmp_path: Path) -> None:
    model = model_with([helper.make_node("F", ["x"], ["y"], domain="own")], [])
    body = helper.make_node("Identity", ["x"], ["y"])
    model.functions.append(helper.make_function("own", "F", ["x"], ["y"], [body], []))
    check_model(saved(tmp_path / MODEL, model), ())


def test_graphs_nested_without_end_are_refused(tmp_path: Path) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    for _ in range(25):  # each is three messages deep
        node = helper.make_node("If", ["x"], ["y"], then_branch=helper.make_graph([node], "g", [], []))
    with pytest.raises(EngineError, match="nested"):
        check_model(saved(tmp_path / MODEL, model_with([node], [])), ())


@pytest.mark.parametrize("data", [b"", b"\xff" * 20, b"<html></html>", b"\x3a\x05ab"])
def test_what_is_no_model_is_one_sentence(tmp_path: Path, data: bytes) -> None:
    (tmp_path / MODEL).write_bytes(data)
    with pytest.raises(EngineError, match="no ONNX model"):
        check_model(tmp_path / MODEL, ())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 400), at=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_damaged_model_is_accepted_or_refused_and_nothing_else(
    tmp_path: Path, cut: int, at: int, byte: int
) -> None:
    data = bytearray(model_with([inside_a_graph(external("x"))], [external("y")]).SerializeToString())
    data[at % len(data)] = byte
    (tmp_path / MODEL).write_bytes(data[: len(data) - cut] if cut % 3 == 0 else data)
    with contextlib.suppress(UpdateRejected, EngineError):
        check_model(tmp_path / MODEL, {"x", "y"})


def test_a_release_that_reaches_out_of_its_bundle_is_rejected_for_good(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path / "fleet")
    device = Device(tmp_path / "store", publisher)
    good = tiny_bundle(tmp_path / "good", version="1.0.0")
    members = {name: good.read(name) for name in good.manifest.members}
    members[MODEL] = model_with([], [external("/etc/passwd")]).SerializeToString()
    (tmp_path / "bad").mkdir()
    bad = write_bundle(tmp_path / "bad", good.manifest, members)

    async def scenario() -> None:
        publisher.assign(publisher.publish_bundle(bad))
        for again in range(2):
            outcome = await device.updater.run_once()
            assert (outcome.result, outcome.reason) == (Result.REJECTED, "external_data")
            assert ("was rejected here before" in outcome.message) == bool(again)
            await device.restart()
        assert device.version() is None

    asyncio.run(scenario())
    device.store.close()
