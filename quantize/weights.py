"""Large weights are kept once, in a file; graphs hold a reference to them.

Invariants: a graph that refers to the file is run, copied and read like any other, but through this module:
``array_of`` is the one way to the numbers of an initializer, ``save`` writes a file that stands alone,
``check`` is the checker of onnx. The file only grows: nothing that a graph refers to changes. It lives as
long as the folder that it is in.

The idea: a model of 200 MB is copied a dozen times on its way (before every pass, for every set of outputs,
for every session). As ONNX external data its weights are pages of a file, which the kernel shares among all
who map them; a copy is then a few kilobytes. Below ``LARGE`` nothing changes: the small models of devices
stay whole in memory.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LARGE: Final = 1 << 20  # bytes of a tensor: below, a file and a mapping cost more than a copy
_PAGE: Final = 4096
# Locations are relative to the root of the file system: what a graph refers to does not depend on where the
# graph itself is.
ROOT: Final = Path("/")
_SHARED: Final = (
    TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16,
    TensorProto.INT64, TensorProto.INT32, TensorProto.INT8, TensorProto.UINT8,
)  # fmt: skip
# Fields of protobuf messages: number << 3 | 2, "a length and as many bytes follow".
_MODEL_GRAPH: Final = b"\x3a"
_GRAPH_INITIALIZER: Final = b"\x2a"


class WeightFile:
    """The large weights of one run, one behind the other, in the file ``weights`` of a folder."""

    def __init__(self, folder: Path) -> None:
        self._path = folder.resolve() / "weights"
        try:
            self._location: str | None = str(self._path.relative_to(ROOT))
            self._location.encode()
        except UnicodeEncodeError:
            self._location = None  # a reference is UTF-8; below such a folder weights stay in memory

    def take(self, proto: onnx.ModelProto) -> onnx.ModelProto:
        """Move the large initializers of ``proto`` into the file; returns the model to go on with.

        Raises:
            OSError: the file cannot be written.
        """
        large = [
            tensor
            for tensor in proto.graph.initializer
            if tensor.data_type in _SHARED and not is_shared(tensor) and nbytes(tensor) >= LARGE
        ]
        if self._location is None or not large:
            return proto
        for tensor in large:
            self._append(tensor)
        fresh = onnx.ModelProto()  # a message keeps the memory of what is taken out of it
        fresh.CopyFrom(proto)
        return fresh

    def _append(self, tensor: TensorProto) -> None:
        assert self._location is not None
        values = np.ascontiguousarray(numpy_helper.to_array(tensor))
        with self._path.open("ab") as file:
            offset = -(-file.tell() // _PAGE) * _PAGE
            file.write(b"\0" * (offset - file.tell()))
            file.write(values.astype(values.dtype.newbyteorder("<"), copy=False).data)
        name, kind, dims = tensor.name, tensor.data_type, list(tensor.dims)
        tensor.Clear()
        tensor.name, tensor.data_type, tensor.data_location = name, kind, TensorProto.EXTERNAL
        tensor.dims.extend(dims)
        for key, value in (("location", self._location), ("offset", offset), ("length", values.nbytes)):
            tensor.external_data.add(key=key, value=str(value))


def is_shared(tensor: TensorProto) -> bool:
    """Whether the numbers are in a file."""
    return int(tensor.data_location) == int(TensorProto.EXTERNAL)


def any_shared(graph: onnx.GraphProto) -> bool:
    """Whether any initializer's numbers are in a file."""
    return any(is_shared(tensor) for tensor in graph.initializer)


def nbytes(tensor: TensorProto) -> int:
    """What the numbers take, wherever they are."""
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return int(math.prod(tensor.dims) * np.dtype(dtype).itemsize)


def array_of(tensor: TensorProto) -> np.ndarray[Any, Any]:
    """The numbers of an initializer; read-only, mapped where they are in a file."""
    if not is_shared(tensor):
        return np.asarray(numpy_helper.to_array(tensor))
    place = {entry.key: entry.value for entry in tensor.external_data}
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).newbyteorder("<")
    mapped = np.memmap(
        ROOT / place["location"], dtype, "r", offset=int(place["offset"]), shape=tuple(tensor.dims)
    )
    return np.asarray(mapped)


def save(proto: onnx.ModelProto, path: Path) -> None:
    """Write a model with all of its weights in one file; one of them is in memory at a time.

    Raises:
        OSError: the file cannot be written.
    """
    if not any_shared(proto.graph):
        onnx.save(proto, path)
        return
    model, body = onnx.ModelProto(), onnx.GraphProto()
    model.CopyFrom(proto)
    body.CopyFrom(model.graph)
    model.ClearField("graph")
    del body.initializer[:]
    sizes = [file_size(tensor) for tensor in proto.graph.initializer]
    length = body.ByteSize() + sum(1 + len(_varint(size)) + size for size in sizes)
    with path.open("wb") as file:
        file.write(model.SerializeToString())
        file.write(_MODEL_GRAPH + _varint(length) + body.SerializeToString())
        for tensor, size in zip(proto.graph.initializer, sizes, strict=True):
            file.write(_GRAPH_INITIALIZER + _varint(size) + _whole(tensor).SerializeToString())


def _whole(tensor: TensorProto) -> TensorProto:
    return numpy_helper.from_array(array_of(tensor), tensor.name) if is_shared(tensor) else tensor


def model_size(proto: onnx.ModelProto) -> int:
    """What a model takes with all of its weights."""
    shared = (nbytes(tensor) for tensor in proto.graph.initializer if is_shared(tensor))
    return int(proto.ByteSize()) + sum(shared)


def file_size(tensor: TensorProto) -> int:
    """Bytes of the message with the numbers in it."""
    if not is_shared(tensor):
        return int(tensor.ByteSize())
    empty = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    size = nbytes(tensor)
    return int(empty.ByteSize()) + 1 + len(_varint(size)) + size  # the field raw_data


def _varint(number: int) -> bytes:
    """A number as protobuf writes it: seven bits a byte, the lowest first."""
    pieces = bytearray()
    while number > 0x7F:
        pieces.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*pieces, number])


def check(proto: onnx.ModelProto) -> None:
    """The checker of onnx. It wants external data beside the model; here it takes it as inputs of that shape.

    Raises:
        Exception: whatever the checker raises.
    """
    if not any_shared(proto.graph):
        onnx.checker.check_model(proto)
        return
    lifted = onnx.ModelProto()
    lifted.CopyFrom(proto)
    kept = [tensor for tensor in lifted.graph.initializer if not is_shared(tensor)]
    for tensor in lifted.graph.initializer:
        if is_shared(tensor):
            value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            lifted.graph.input.append(value)
    del lifted.graph.initializer[:]
    lifted.graph.initializer.extend(kept)
    onnx.checker.check_model(lifted)
