"""Tensors at the edge of the model: datatypes, and requests made to fit the manifest.

``conform`` is the only door: what it returns has exactly the names, ranks, sizes and element types that the
model declares, so nothing behind it checks again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edge_agent.contract.golden import Array
from edge_agent.contract.manifest import Datatype, TensorSpec
from edge_agent.errors import InvalidInput

Tensor = npt.NDArray[Any]
Feeds = dict[str, Tensor]

_DTYPES: Final[Mapping[Datatype, np.dtype[Any]]] = {
    Datatype.BOOL: np.dtype(np.bool_),
    Datatype.UINT8: np.dtype("<u1"),
    Datatype.UINT16: np.dtype("<u2"),
    Datatype.UINT32: np.dtype("<u4"),
    Datatype.UINT64: np.dtype("<u8"),
    Datatype.INT8: np.dtype("<i1"),
    Datatype.INT16: np.dtype("<i2"),
    Datatype.INT32: np.dtype("<i4"),
    Datatype.INT64: np.dtype("<i8"),
    Datatype.FP16: np.dtype("<f2"),
    Datatype.FP32: np.dtype("<f4"),
    Datatype.FP64: np.dtype("<f8"),
}
_DATATYPES: Final[Mapping[np.dtype[Any], Datatype]] = {dtype: name for name, dtype in _DTYPES.items()}


def numpy_dtype(datatype: Datatype) -> np.dtype[Any]:
    """The numpy element type, little-endian as the protocol sends it."""
    return _DTYPES[datatype]


def datatype_of(dtype: np.dtype[Any]) -> Datatype:
    """The protocol's name of a numpy element type.

    Raises:
        InvalidInput: the protocol has no such type.
    """
    try:
        return _DATATYPES.get(dtype) or _DATATYPES[dtype.newbyteorder("<")]
    except KeyError:
        raise InvalidInput(f"element type {dtype} has no Open Inference Protocol name") from None


def to_numpy(array: Array) -> Tensor:
    """A golden array as numpy.

    Raises:
        InvalidInput: the bytes do not fill the shape.
    """
    dtype = numpy_dtype(array.datatype)
    try:
        return np.frombuffer(array.data, dtype).reshape(array.shape)
    except ValueError as error:
        raise InvalidInput(
            f"tensor {array.name!r}: {len(array.data)} bytes do not fill shape {list(array.shape)} "
            f"of {array.datatype.value}"
        ) from error


def to_array(name: str, tensor: Tensor) -> Array:
    """A numpy tensor as a golden array."""
    datatype = datatype_of(tensor.dtype)
    data = np.ascontiguousarray(tensor, numpy_dtype(datatype)).tobytes()
    return Array(name, datatype, tensor.shape, data)


def batchable(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Whether requests can be laid on top of each other: only the first dimension varies."""
    return all(spec.shape[:1] == (-1,) for spec in (*inputs, *outputs)) and not any(
        -1 in spec.shape[1:] for spec in inputs
    )


def fixed_rows(specs: Sequence[TensorSpec]) -> int | None:
    """The rows of every request where the model takes no other number of them; None where it varies."""
    if any(spec.shape[:1] == (-1,) for spec in specs):
        return None
    shape = specs[0].shape
    return shape[0] if len(shape) > 1 else 1


def conform(specs: Sequence[TensorSpec], inputs: Mapping[str, Tensor], max_rows: int) -> tuple[Feeds, int]:
    """Fit a request's tensors to the model's inputs.

    Returns the feeds, contiguous and of the declared element types, and the number of rows.

    Raises:
        InvalidInput: a tensor is missing or unknown, has the wrong rank, size or type, or the request has
            no row or more than ``max_rows``; names the tensor, what was expected and what came.
    """
    if len(specs) == 1:  # nearly always: rows that fit as they are need no more than this
        spec = specs[0]
        tensor = inputs.get(spec.name)
        if tensor is not None and len(inputs) == 1:
            shape = tensor.shape
            if (
                shape[1:] == spec.shape[1:]
                and spec.shape[:1] == (-1,)
                and shape
                and 1 <= shape[0] <= max_rows
                and tensor.dtype is _DTYPES[spec.datatype]
                and tensor.flags.c_contiguous
            ):
                return {spec.name: tensor}, shape[0]
    if len(inputs) != len(specs) or any(spec.name not in inputs for spec in specs):
        expected = ", ".join(spec.name for spec in specs)
        raise InvalidInput(f"inputs: expected {expected}, got {', '.join(inputs) or 'none'}")
    feeds: Feeds = {}
    rows = -1
    for spec in specs:
        tensor = inputs[spec.name]
        if len(tensor.shape) != len(spec.shape) or any(
            want not in (-1, got) for want, got in zip(spec.shape, tensor.shape, strict=True)
        ):
            raise InvalidInput(
                f"input {spec.name!r}: expected shape {list(spec.shape)}, got {list(tensor.shape)}"
            )
        feeds[spec.name] = _cast(spec, tensor)
        if spec.shape[:1] == (-1,):
            if rows not in (-1, tensor.shape[0]):
                raise InvalidInput(f"input {spec.name!r}: {tensor.shape[0]} rows, the others have {rows}")
            rows = tensor.shape[0]
    if rows == -1:
        return feeds, fixed_rows(specs) or 1
    if not 1 <= rows <= max_rows:
        raise InvalidInput(f"{rows} rows in one request, expected 1 to {max_rows}")
    return feeds, rows


def _cast(spec: TensorSpec, tensor: Tensor) -> Tensor:
    dtype = numpy_dtype(spec.datatype)
    if tensor.dtype == dtype:
        return np.ascontiguousarray(tensor)
    if tensor.dtype.kind not in "biuf":
        raise InvalidInput(f"input {spec.name!r}: expected {spec.datatype.value}, got {tensor.dtype}")
    # Out of range becomes infinity in a float model: the model's answer is then not finite and the rules
    # take over. An integer model has no infinity, so there it is the caller's error.
    with np.errstate(over="ignore", invalid="ignore"):
        cast = np.ascontiguousarray(tensor.astype(dtype))
    if dtype.kind in "biu" and not np.array_equal(cast, tensor):
        raise InvalidInput(f"input {spec.name!r}: values do not fit {spec.datatype.value}")
    return cast
