"""Step 1: read the model and the data, and refuse what cannot become a bundle.

Invariants of a ``FloatModel``: it passed ``onnx.checker``, onnxruntime loads it, its inputs are float32 or
integer tensors, nothing in it is quantized, its opset is 17 or newer and every weight is an initializer.

Invariants of ``Rows``: one array per model input, float32 where the input is, the same number of rows in
each, of the width the model takes, no infinities, labels 0 or 1.
"""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

from edge_agent.contract.digest import Digest
from quantize import runtime
from quantize.errors import BadData, BadModel

OPSET: Final = 17  # the first that has everything needed: per-axis DequantizeLinear came with 13
MIN_ROWS: Final = 10  # as many as the drift baseline has bins
_QUANTIZED: Final = (
    "QuantizeLinear", "DequantizeLinear", "QLinear", "ConvInteger", "MatMulInteger", "QGemm", "MatMulNBits",
    "DynamicQuantize",
)  # fmt: skip
_LABELS: Final = ("y", "label")


@dataclass(frozen=True, slots=True)
class Input:
    """An input of the model. ``shape`` has -1 where a dimension varies; the first is the batch."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def tabular(self) -> bool:
        """A table of float features: (batch, features)."""
        return self.dtype == np.float32 and len(self.shape) == 2 and self.shape[1] > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatModel:
    """The FP32 model as it came, made quantizable without changing what it computes."""

    proto: onnx.ModelProto
    original: onnx.ModelProto  # before anything was changed: what every change is proven against
    inputs: tuple[Input, ...]
    digest: Digest  # of the file
    size: int  # bytes of the file
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows for the model: calibration or validation data."""

    source: str  # file name, for messages
    digest: Digest
    inputs: Mapping[str, np.ndarray]  # (n, ...) each
    labels: np.ndarray | None  # (n,) bool: True = bad
    features: tuple[str, ...] | None  # names of the columns of a tabular input

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def take(self, index: np.ndarray) -> Rows:
        """The rows at ``index`` (indices or a mask)."""
        return replace(
            self,
            inputs={name: values[index] for name, values in self.inputs.items()},
            labels=None if self.labels is None else self.labels[index],
        )


def load_model(path: Path) -> FloatModel:
    """Read and check an FP32 ONNX model.

    Raises:
        BadModel: no such file, not ONNX, already quantized, not float32, or onnxruntime cannot load it.
    """
    try:
        digest, size = Digest.of_file(path), path.stat().st_size
        proto = onnx.load(path)
        onnx.checker.check_model(proto)
    except OSError as error:
        raise BadModel(f"model {path}: {error.strerror or error}") from error
    except Exception as error:  # protobuf and the checker raise types of their own
        raise BadModel(f"model {path} is not a valid ONNX file: {runtime.one_line(error)}") from error
    if not proto.graph.node:
        raise BadModel(f"model {path} is not an ONNX model: its graph is empty")

    quantized = sorted({node.op_type for node in proto.graph.node if node.op_type.startswith(_QUANTIZED)})
    if quantized:
        raise BadModel(f"model {path} is already quantized ({', '.join(quantized)}): give the FP32 model")
    runtime.open_session(proto)
    original = onnx.ModelProto()
    original.CopyFrom(proto)
    proto, notes = _modernize(path, proto)
    _constants_to_initializers(proto.graph)
    return FloatModel(
        proto=proto,
        original=original,
        inputs=_inputs_of(path, proto),
        digest=digest,
        size=size,
        notes=tuple(notes),
    )


def _modernize(path: Path, proto: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset >= OPSET:
        return proto, []
    try:
        converted = version_converter.convert_version(proto, OPSET)
        onnx.checker.check_model(converted)
    except Exception as error:
        raise BadModel(
            f"model {path}: opset {opset} cannot be converted to {OPSET} "
            f"({runtime.one_line(error)}): export it with opset {OPSET} or newer"
        ) from error
    return converted, [f"opset {opset} converted to {OPSET}"]


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Weights as Constant nodes become initializers, where quantization finds them."""
    kept = []
    for node in graph.node:
        tensor = _constant(node) if node.op_type == "Constant" else None
        if tensor is None:
            kept.append(node)
        else:
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
    del graph.node[:]
    graph.node.extend(kept)
    # Files of IR 3 list every initializer as an input too: a caller could then replace the weights.
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    del graph.input[:]
    graph.input.extend(inputs)


def _constant(node: onnx.NodeProto) -> TensorProto | None:
    attribute = node.attribute[0]
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        tensor = TensorProto()
        tensor.CopyFrom(value)
        return tensor
    if attribute.name in ("value_float", "value_floats"):
        return numpy_helper.from_array(np.array(value, np.float32))
    if attribute.name in ("value_int", "value_ints"):
        return numpy_helper.from_array(np.array(value, np.int64))
    return None


def _inputs_of(path: Path, proto: onnx.ModelProto) -> tuple[Input, ...]:
    found = []
    for value in proto.graph.input:
        tensor = value.type.tensor_type
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)) if tensor.elem_type else None
        if dtype is None or dtype.kind not in "fiub" or (dtype.kind == "f" and dtype != np.float32):
            kind = TensorProto.DataType.Name(tensor.elem_type) if tensor.elem_type else "not a tensor"
            raise BadModel(f"model {path}: input {value.name!r} is {kind}, expected FLOAT: export it as FP32")
        dims = tensor.shape.dim
        shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims)
        if not shape:
            raise BadModel(f"model {path}: input {value.name!r} has no batch dimension, expected [N, ...]")
        found.append(Input(value.name, dtype, shape))
    if not found:
        raise BadModel(f"model {path} has no inputs")
    return tuple(found)


def load_rows(path: Path, inputs: Sequence[Input]) -> Rows:
    """Read ``.npz``, ``.npy`` or ``.csv``.

    ``.npz``: an array per model input by its name, or ``X`` for a model with one; ``y`` the labels (1 = bad)
    and ``feature_names`` if there. ``.csv``: a header of feature names; a column ``y`` or ``label`` is the
    labels; an empty cell is a missing value.

    Raises:
        BadData: missing, unreadable, of another width than the model takes, infinite, too few, labels
            that are not 0 and 1.
    """
    try:
        digest = Digest.of_file(path)
        if path.suffix == ".csv":
            arrays = _read_csv(path)
        elif path.suffix in (".npz", ".npy"):
            arrays = _read_numpy(path)
        else:
            raise BadData(f"data {path}: unknown kind {path.suffix!r}, expected .npz, .npy or .csv")
    except OSError as error:
        raise BadData(f"data {path}: {error.strerror or error}") from error
    names = arrays.get("feature_names")
    found = {entry.name: _input(path, arrays, entry, single=len(inputs) == 1) for entry in inputs}
    lengths = {name: len(values) for name, values in found.items()}
    if len(set(lengths.values())) > 1:
        raise BadData(f"data {path}: the arrays have different numbers of rows: {lengths}")
    rows = next(iter(lengths.values()))
    if rows < MIN_ROWS:
        raise BadData(f"data {path}: {rows} rows, expected at least {MIN_ROWS}")
    features = None
    if len(inputs) == 1 and inputs[0].tabular:
        features = _feature_names(path, names, inputs[0].shape[1])
    return Rows(
        source=path.name,
        digest=digest,
        inputs=found,
        labels=_labels(path, arrays.get("y"), rows),
        features=features,
    )


def _read_numpy(path: Path) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"X": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except (ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise BadData(f"data {path} cannot be read: {runtime.one_line(error)}") from error


def _read_csv(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadData(f"data {path} cannot be read: {runtime.one_line(error)}") from error
    if not lines:
        raise BadData(f"data {path} is empty, expected a header and rows")
    header = [name.strip() for name in lines[0]]
    table = np.empty((len(lines) - 1, len(header)))
    for row, line in enumerate(lines[1:]):
        if len(line) != len(header):
            raise BadData(f"data {path}: row {row + 1} has {len(line)} cells, the header has {len(header)}")
        for column, cell in enumerate(line):
            try:
                table[row, column] = float(cell) if cell.strip() else np.nan
            except ValueError as error:
                raise BadData(
                    f"data {path}: row {row + 1}, column {header[column]!r}: {cell[:40]!r} is not a number"
                ) from error
    labels = next((header.index(name) for name in _LABELS if name in header), None)
    columns = [index for index in range(len(header)) if index != labels]
    arrays = {"X": table[:, columns], "feature_names": np.array([header[index] for index in columns])}
    if labels is not None:
        arrays["y"] = table[:, labels]
    return arrays


def _input(path: Path, arrays: Mapping[str, np.ndarray], entry: Input, *, single: bool) -> np.ndarray:
    name = entry.name if entry.name in arrays else "X" if single and "X" in arrays else None
    if name is None:
        wanted = f"{entry.name!r} or 'X'" if single else repr(entry.name)
        raise BadData(f"data {path} has arrays {sorted(arrays)}, expected {wanted} (the model's input)")
    values = arrays[name]
    if values.dtype.kind not in "fiub":
        raise BadData(f"data {path}: array {name!r} is {values.dtype}, expected numbers")
    shape = entry.shape[1:]
    fits = values.ndim == len(entry.shape) and all(
        size in (-1, got) for size, got in zip(shape, values.shape[1:], strict=False)
    )
    if not fits and len(shape) == 1 and values.ndim == 2:
        raise BadData(
            f"data {path}: array {name!r} has {values.shape[1]} columns, "
            f"the model's input {entry.name!r} takes {shape[0]}"
        )
    if not fits:
        raise BadData(
            f"data {path}: array {name!r} has shape {list(values.shape)}, the model's input "
            f"{entry.name!r} takes [rows, {', '.join('any' if size < 0 else str(size) for size in shape)}]"
        )
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(values, entry.dtype)
    if cast.dtype.kind == "f" and np.isinf(cast).any():
        row = int(np.argwhere(np.isinf(cast))[0][0])
        raise BadData(
            f"data {path}: array {name!r} is infinite (in float32) in row {row + 1}: remove the row"
        )
    return cast


def _feature_names(path: Path, names: np.ndarray | None, width: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"f{index}" for index in range(width))
    found = tuple(str(name) for name in names.ravel())
    if len(found) != width:
        raise BadData(f"data {path}: {len(found)} feature_names for {width} columns")
    if len(set(found)) != width or not all(found):
        twice = next((name for name in found if not name or found.count(name) > 1), "")
        raise BadData(f"data {path}: feature name {twice!r} is empty or appears twice")
    return found


def _labels(path: Path, labels: np.ndarray | None, rows: int) -> np.ndarray | None:
    if labels is None:
        return None
    if labels.shape not in ((rows,), (rows, 1)) or labels.dtype.kind not in "fiub":
        raise BadData(
            f"data {path}: y has shape {list(labels.shape)} for {rows} rows, expected one label a row"
        )
    flat = labels.ravel()
    if not np.isin(flat, (0, 1)).all():
        raise BadData(f"data {path}: y holds {np.unique(flat)[:5].tolist()}, expected 0 (good) and 1 (bad)")
    return flat.astype(bool)


def good_rows(rows: Rows) -> Rows:
    """The rows to calibrate with: those not labelled bad, without labels.

    Raises:
        BadData: too few good rows, nothing but NaN, or a feature that is always missing (named).
    """
    if rows.labels is not None:
        rows = replace(rows.take(~rows.labels), labels=None)
        if len(rows) < MIN_ROWS:
            raise BadData(f"data {rows.source}: {len(rows)} good rows, expected at least {MIN_ROWS}")
    for name, values in rows.inputs.items():
        if values.dtype.kind != "f":
            continue
        missing = np.isnan(values)
        if missing.all():
            raise BadData(f"data {rows.source}: every value of {name!r} is missing (NaN)")
        if rows.features is not None and missing.all(axis=0).any():
            always = [
                feature for feature, gone in zip(rows.features, missing.all(axis=0), strict=True) if gone
            ]
            shown = ", ".join(always[:5]) + (f" and {len(always) - 5} more" if len(always) > 5 else "")
            raise BadData(f"data {rows.source}: always missing (NaN): {shown}: remove it from model and data")
    return rows


def both_classes(rows: Rows) -> Rows:
    """Rows whose labels, where there are any, hold good and bad rows.

    Raises:
        BadData: labels of one class.
    """
    if rows.labels is None or (rows.labels.any() and not rows.labels.all()):
        return rows
    only = "bad (1)" if rows.labels.all() else "good (0)"
    raise BadData(f"data {rows.source}: every label is {only}: an AUC needs both, or leave y out")
