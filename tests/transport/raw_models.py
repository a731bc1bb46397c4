"""Bundles of models that decide nothing: what goes in comes out, in any element type."""

from __future__ import annotations

from pathlib import Path

from onnx import TensorProto, helper

from edge_agent.contract.bundle import MODEL, Bundle, write_bundle
from edge_agent.contract.manifest import Datatype, Manifest, Task, TensorSpec
from edge_agent.contract.version import Version

ELEMENT = {
    Datatype.BOOL: TensorProto.BOOL,
    Datatype.UINT8: TensorProto.UINT8,
    Datatype.UINT16: TensorProto.UINT16,
    Datatype.UINT32: TensorProto.UINT32,
    Datatype.UINT64: TensorProto.UINT64,
    Datatype.INT8: TensorProto.INT8,
    Datatype.INT16: TensorProto.INT16,
    Datatype.INT32: TensorProto.INT32,
    Datatype.INT64: TensorProto.INT64,
    Datatype.FP16: TensorProto.FLOAT16,
    Datatype.FP32: TensorProto.FLOAT,
    Datatype.FP64: TensorProto.DOUBLE,
}


def echo_bundle(folder: Path, name: str, *tensors: tuple[str, Datatype, tuple[int, ...]]) -> Bundle:
    """Each input ``x`` has an output ``x_out`` of the same type and shape, -1 varying."""
    folder.mkdir(parents=True)

    def value(name: str, datatype: Datatype, shape: tuple[int, ...]) -> object:
        sizes = [f"{name}_{axis}" if size == -1 else size for axis, size in enumerate(shape)]
        return helper.make_tensor_value_info(name, ELEMENT[datatype], sizes)

    graph = helper.make_graph(
        [helper.make_node("Identity", [tensor], [f"{tensor}_out"]) for tensor, _, _ in tensors],
        "echo",
        [value(*tensor) for tensor in tensors],
        [value(f"{tensor}_out", datatype, shape) for tensor, datatype, shape in tensors],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    manifest = Manifest(
        name=name,
        version=Version("1.0.0"),
        task=Task.RAW,
        inputs=tuple(TensorSpec(*tensor) for tensor in tensors),
        outputs=tuple(TensorSpec(f"{tensor}_out", datatype, shape) for tensor, datatype, shape in tensors),
        members={},
        precision="fp32",
    )
    return write_bundle(folder, manifest, {MODEL: model.SerializeToString()})
