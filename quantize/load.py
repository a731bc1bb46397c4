"""Step 1: read the model, and refuse what cannot become a bundle.

Invariants of a ``FloatModel``: onnxruntime loads it; nothing in it is quantized; every input and output is a
tensor with the batch as its first dimension; floats go in and come out as float32; inputs that were fixed
(``--set``) are constants. How it got there is exact: casts, transpositions and constants, no arithmetic.
Everything else that makes a graph quantizable is done, and proven, in ``normalise``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from edge_agent.contract.digest import Digest
from quantize import runtime
from quantize.data import Input, Rows, both_classes, good_rows, load_data, load_rows
from quantize.errors import BadModel
from quantize.graph import all_nodes, drop_remarks, opset_of, rename_reads, shorten_names, sort_nodes, unique
from quantize.rewrite import OPSET
from quantize.weights import WeightFile

__all__ = [
    "FloatModel",
    "Input",
    "Rows",
    "both_classes",
    "good_rows",
    "load_data",
    "load_model",
    "load_rows",
    "read_model",
]

MAX_BYTES: Final = (1 << 31) - 1  # a protobuf message, which is what onnxruntime is given
_QUANTIZED: Final = (
    "QuantizeLinear", "DequantizeLinear", "QLinear", "ConvInteger", "MatMulInteger", "QGemm", "MatMulNBits",
    "DynamicQuantize", "QAttention", "QMoE", "QOrdered", "GatherBlockQuantized",
)  # fmt: skip
# Domains whose operators onnxruntime brings kernels for; anything else needs a library that devices lack.
_KNOWN_DOMAINS: Final = (
    "", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc",
    "ai.onnx.training", "ai.onnx.preview.training",
)  # fmt: skip
_CONVERTED: Final = (".joblib", ".pkl", ".pickle", ".skops", ".pt2")
_OTHER_FLOATS: Final = (TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
_ONE_NUMBER: Final = "is one number for all rows, expected [N, ...]: export the model without it"
# Names of dimensions that say which one is the batch: for certain, and where the first one has a fixed size.
_SURELY_BATCH: Final = re.compile(r".*batch.*", re.IGNORECASE)
_MAYBE_BATCH: Final = re.compile(r"n|b|bs", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatModel:
    """The FP32 model as it came, with a batch in front and float32 at its doors."""

    proto: onnx.ModelProto
    original: onnx.ModelProto  # before anything was changed: what every change is proven against
    inputs: tuple[Input, ...]
    digest: Digest  # of the file, with its external data
    size: int  # bytes of the file, with its external data
    notes: tuple[str, ...]
    fixed: Mapping[str, np.ndarray] = field(default_factory=dict)  # inputs that became constants
    batch_axis: Mapping[str, int] = field(default_factory=dict)  # of the original, where it is not the first
    outputs: tuple[str, ...] = ()  # of the original, that are kept
    folder: Path | None = None  # where large weights and scratch files are; None: in memory

    def run_original(
        self, session: runtime.Session, inputs: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Run a session of ``original`` with inputs as ``proto`` takes them; outputs as ``proto`` gives them.

        Raises:
            BadModel: onnxruntime raised while running.
        """
        kinds = {value.name: value.type.tensor_type.elem_type for value in self.original.graph.input}
        feeds = dict(self.fixed)
        for name, values in inputs.items():
            moved = np.moveaxis(values, 0, self.batch_axis.get(name, 0))
            feeds[name] = moved.astype(helper.tensor_dtype_to_np_dtype(kinds[name]), copy=False)
        results = {}
        for name, values in runtime.run(session, feeds).items():
            if name in self.outputs:
                if not values.ndim:
                    raise BadModel(f"output {name!r} {_ONE_NUMBER}")
                floats = values.astype(np.float32) if values.dtype in (np.float16, np.float64) else values
                results[name] = np.moveaxis(floats, self.batch_axis.get(name, 0), 0)
        return results


def load_model(
    path: Path,
    settings: Mapping[str, float] | None = None,
    *,
    trust: bool = False,
    folder: Path | None = None,
) -> FloatModel:
    """Read and check an FP32 model: ONNX, or what ``convert`` makes ONNX of.

    Args:
        path: the file.
        settings: values for inputs that become constants (``--set``).
        trust: whether files that run code when they are read may be read.
        folder: where large weights are kept while the model is in use; None: in memory.

    Raises:
        OSError: ``folder`` cannot be written.
        BadModel: no such file, not ONNX, already quantized, operators without a kernel,
            external data outside the folder, or onnxruntime cannot load it.
    """
    proto, digest, size = read_model(path, trust=trust)
    notes = [f"converted from {path.suffix} to ONNX"] if path.suffix in _CONVERTED else []
    _refuse(path, proto)
    _no_empty_dimensions(proto.graph)
    if folder is not None:
        proto = WeightFile(folder).take(proto)
    original = onnx.ModelProto()
    original.CopyFrom(proto)

    _complete(proto, runtime.open_session(original))
    _real_inputs_only(proto.graph)
    fixed = _fix_inputs(path, proto, settings or {}, notes)
    kept = _rows_only(path, proto, notes)
    axes = _batch_first(proto, notes)
    _float32_doors(proto, notes)
    inputs = _inputs_of(path, proto)
    return FloatModel(
        proto=proto,
        original=original,
        inputs=inputs,
        digest=digest,
        size=size,
        notes=tuple(notes),
        fixed=fixed,
        batch_axis=axes,
        outputs=kept,
        folder=folder,
    )


# -- reading ----------------------------------------------------------------------------------------------


def read_model(path: Path, *, trust: bool = False) -> tuple[onnx.ModelProto, Digest, int]:
    """Read a file, its external data included, as it is.

    Returns:
        the model, and digest and bytes of what was read.

    Raises:
        BadModel: no such file, not ONNX, or its external data is missing or outside its folder.
    """
    try:
        return _read(path, trust)
    except OSError as error:
        raise BadModel(f"model {path}: {error.strerror or error}") from error


def _read(path: Path, trust: bool) -> tuple[onnx.ModelProto, Digest, int]:
    if path.suffix in _CONVERTED:
        from quantize import convert  # scikit-learn and PyTorch are extras

        digest = Digest.of_file(path)
        proto = convert.to_onnx(path, trust=trust)
        return proto, digest, proto.ByteSize()
    if path.is_dir():
        raise BadModel(f"model {path} is a folder: give the .onnx file in it")
    size = path.stat().st_size
    try:
        proto = onnx.load(path, load_external_data=False)
    except OSError:
        raise
    except Exception as error:  # protobuf raises types of its own
        raise BadModel(f"model {path} is not a valid ONNX file: {runtime.one_line(error)}") from error
    if not proto.graph.node:
        raise BadModel(f"model {path} is not a valid ONNX model: its graph is empty")
    for node in all_nodes(proto):
        # protobuf hands out bytes where a text is not UTF-8: a damaged file
        if not all(isinstance(text, str) for text in (node.op_type, node.domain, *node.input, *node.output)):
            raise BadModel(f"model {path} is not a valid ONNX file: it holds names that are not text")
    digest, external = _external_data(path, proto)
    if size + external > MAX_BYTES:
        raise BadModel(f"model {path} has {(size + external) / 1e9:.1f} GB, at most 2 GB can be quantized")
    return proto, digest, size + external


def _external_data(path: Path, proto: onnx.ModelProto) -> tuple[Digest, int]:
    """Bring weights in other files into the model. They cannot be outside its folder.

    Returns:
        the digest of everything read, and the bytes of the other files.
    """
    folder = path.parent.resolve()
    digest = Digest.of_file(path)
    files: dict[Path, str] = {}
    for tensor in _all_tensors(proto):
        if not external_data_helper.uses_external_data(tensor):
            continue
        location = external_data_helper.ExternalDataInfo(tensor).location
        file = (folder / location).resolve()  # follows links, too
        if not location or not file.is_relative_to(folder):
            raise BadModel(
                f"model {path}: external data of {tensor.name!r} is at {location!r}, outside its folder"
            )
        if not file.is_file():
            raise BadModel(
                f"model {path}: its external data {location!r} is missing: it belongs beside the model"
            )
        files[file] = location
    if not files:
        return digest, 0
    try:
        external_data_helper.load_external_data_for_model(proto, str(folder))
    except Exception as error:
        raise BadModel(f"model {path}: external data cannot be read: {runtime.one_line(error)}") from error
    for tensor in _all_tensors(proto):
        if tensor.data_location == TensorProto.EXTERNAL:
            del tensor.external_data[:]
            tensor.data_location = TensorProto.DEFAULT
    together = hashlib.sha256(digest.encode())
    for file, location in sorted(files.items(), key=lambda item: item[1]):
        together.update(f"\n{location} {Digest.of_file(file)}".encode())
    return Digest("sha256:" + together.hexdigest()), sum(file.stat().st_size for file in files)


def _all_tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    yield from proto.graph.initializer
    for node in all_nodes(proto):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for graph in (attribute.g, *attribute.graphs):
                yield from graph.initializer


def _refuse(path: Path, proto: onnx.ModelProto) -> None:
    nodes = list(all_nodes(proto))
    quantized = sorted({node.op_type for node in nodes if node.op_type.startswith(_QUANTIZED)})
    if quantized:
        raise BadModel(f"model {path} is already quantized ({', '.join(quantized)}): give the FP32 model")
    local = {(function.domain, function.name) for function in proto.functions}
    custom = sorted(
        {
            f"{node.domain}.{node.op_type}"
            for node in nodes
            if node.domain not in _KNOWN_DOMAINS and (node.domain, node.op_type) not in local
        }
    )
    if custom:
        raise BadModel(
            f"model {path} has custom operators that onnxruntime has no kernel for: {', '.join(custom)}: "
            "export it without them"
        )


# -- doors ------------------------------------------------------------------------------------------------


def _no_empty_dimensions(graph: onnx.GraphProto) -> None:
    """Some exporters write 0 or -1 where a size varies, which onnxruntime takes at its word."""
    for value in graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_value") and dim.dim_value <= 0:
                dim.Clear()


def _complete(proto: onnx.ModelProto, session: runtime.Session) -> None:
    """Add what onnxruntime does without (the order of the nodes, an operator set, shapes of outputs).

    What it ignores goes: remarks of the exporter, names longer than anybody reads. Remarks on the model as a
    whole stay, programs read them.
    """
    sort_nodes(proto.graph)
    drop_remarks(proto.graph)
    shorten_names(proto.graph)
    if not opset_of(proto):  # a model of other domains' operators only
        proto.opset_import.append(helper.make_opsetid("", OPSET))
    known = {output.name: output.shape for output in session.get_outputs()}
    for value in proto.graph.output:
        tensor = value.type.tensor_type
        if value.type.HasField("tensor_type") and known.get(value.name) and not tensor.shape.dim:
            value.CopyFrom(helper.make_tensor_value_info(value.name, tensor.elem_type, known[value.name]))


def _real_inputs_only(graph: onnx.GraphProto) -> None:
    """Files of IR 3 list every initializer as an input too: a caller could then replace the weights."""
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    del graph.input[:]
    graph.input.extend(inputs)


def _fix_inputs(
    path: Path, proto: onnx.ModelProto, settings: Mapping[str, float], notes: list[str]
) -> dict[str, np.ndarray]:
    """Inputs with a given value become constants."""
    graph = proto.graph
    fixed = {}
    for name, value in settings.items():
        entry = next((entry for entry in graph.input if entry.name == name), None)
        if entry is None:
            names = ", ".join(repr(entry.name) for entry in graph.input)
            raise BadModel(f"model {path} has no input {name!r} to set, its inputs are {names}")
        tensor = entry.type.tensor_type
        dims = [dim.dim_value if dim.HasField("dim_value") else 1 for dim in tensor.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        constant = np.full(dims, value).astype(dtype)
        if (
            not np.array_equal(constant.astype(np.float64), np.full(dims, value, np.float64))
            and dtype.kind != "f"
        ):
            raise BadModel(f"model {path}: input {name!r} takes {dtype}, which cannot be {value:g}")
        fixed[name] = constant
        graph.initializer.append(numpy_helper.from_array(constant, name))
        notes.append(f"input {name} fixed to {value:g}")
    left = [entry for entry in graph.input if entry.name not in fixed]
    del graph.input[:]
    graph.input.extend(left)
    return fixed


def _rows_only(path: Path, proto: onnx.ModelProto, notes: list[str]) -> tuple[str, ...]:
    """Outputs that are numbers for every row.

    Maps of class names and texts, as scikit-learn exports them, are dropped, and so is one number for all
    rows (a loss, a rate) beside others.
    """
    graph = proto.graph
    kept: list[onnx.ValueInfoProto] = []
    single: list[onnx.ValueInfoProto] = []
    dropped: list[str] = []
    for value in graph.output:
        tensor = value.type.tensor_type
        producer = next((node for node in graph.node if value.name in node.output), None)
        if value.type.HasField("tensor_type") and tensor.elem_type != TensorProto.STRING:
            (single if tensor.HasField("shape") and not tensor.shape.dim else kept).append(value)
        elif producer is not None and producer.op_type == "ZipMap":
            # The probabilities by class name: the same numbers without the names are what it reads.
            kept.append(helper.make_tensor_value_info(producer.input[0], TensorProto.FLOAT, [None, None]))
            producer.op_type, producer.domain = "Identity", ""
            del producer.attribute[:]
        else:
            dropped.append(value.name)
    if single and not kept:
        raise BadModel(f"model {path}: output {single[0].name!r} {_ONE_NUMBER}")
    if not kept:
        raise BadModel(f"model {path} has no output of numbers, only {', '.join(dropped)}")
    if dropped:
        notes.append(f"outputs that are not numbers dropped: {', '.join(dropped)}")
    if single:
        notes.append(f"outputs with one number for all rows dropped: {_names(single)}")
    del graph.output[:]
    graph.output.extend(kept)
    return tuple(value.name for value in kept)


def _batch_first(proto: onnx.ModelProto, notes: list[str]) -> dict[str, int]:
    """Inputs and outputs whose batch is not their first dimension (states of recurrent nets) are transposed.

    The batch is the first dimension of the first input, unless another one of it is called so; another
    tensor has it elsewhere if its own first dimension has another size and exactly one later dimension is
    like the batch: of its name, its size, or just as nameless.
    """
    graph = proto.graph
    first = next((value for value in graph.input if value.type.tensor_type.shape.dim), None)
    if first is None:
        return {}
    batch = _batch_of([_dim(dim) for dim in first.type.tensor_type.shape.dim])
    is_first = batch == _dim(first.type.tensor_type.shape.dim[0])
    moved: dict[str, int] = {}
    for value in (*graph.input, *graph.output):
        dims = [_dim(dim) for dim in value.type.tensor_type.shape.dim]
        if len(dims) < 2 or dims[0] == batch:
            continue
        if is_first and not (isinstance(dims[0], int) or (batch and dims[0])):
            continue  # neither sizes nor names tell them apart
        places = [place for place, dim in enumerate(dims) if dim == batch]
        if len(places) == 1:
            moved[value.name] = places[0]
    _outputs_like_inputs(graph, moved)
    for name, axis in moved.items():
        _transpose_door(graph, name, axis)
        notes.append(f"{name}: batch moved from dimension {axis} to the front")
    return moved


def _batch_of(dims: list[int | str]) -> int | str:
    """The size or name of the batch among the dimensions of the first input."""
    names = [dim for dim in dims if isinstance(dim, str) and dim]
    batches = [name for name in names if _SURELY_BATCH.fullmatch(name)]
    if isinstance(dims[0], int) and dims[0] > 1 and len(names) == 1:
        batches += [name for name in names if _MAYBE_BATCH.fullmatch(name)]
    return batches[0] if batches else dims[0]


def _names(values: Iterable[onnx.ValueInfoProto]) -> str:
    return ", ".join(value.name for value in values)


def _outputs_like_inputs(graph: onnx.GraphProto, moved: dict[str, int]) -> None:
    """An output that is called like a moved input (state, stateN) and says nothing else is moved like it."""
    for value in graph.output:
        dims = value.type.tensor_type.shape.dim
        if not dims or isinstance(_dim(dims[0]), int):
            continue
        for entry in graph.input:
            alike = value.name.lower().startswith(entry.name.lower())
            if entry.name in moved and alike and len(dims) == len(entry.type.tensor_type.shape.dim):
                moved.setdefault(value.name, moved[entry.name])


def _transpose_door(graph: onnx.GraphProto, name: str, axis: int) -> None:
    inside = unique(graph, f"{name}_inside")
    value = next(value for value in (*graph.input, *graph.output) if value.name == name)
    dims = value.type.tensor_type.shape.dim
    rank = len(dims)
    order = [axis, *(place for place in range(rank) if place != axis)]
    sizes = [onnx.TensorShapeProto.Dimension() for _ in dims]
    for size, place in zip(sizes, order, strict=True):
        size.CopyFrom(dims[place])
    del value.type.tensor_type.shape.dim[:]
    value.type.tensor_type.shape.dim.extend(sizes)
    if value.name in {entry.name for entry in graph.input}:
        rename_reads(graph, name, inside)
        back = [order.index(place) for place in range(rank)]
        graph.node.insert(0, helper.make_node("Transpose", [name], [inside], f"{name}_door", perm=back))
        return
    _rename_output(graph, name, inside)
    graph.node.append(helper.make_node("Transpose", [inside], [name], f"{name}_door", perm=order))


def _float32_doors(proto: onnx.ModelProto, notes: list[str]) -> None:
    """Float16 and float64 inputs and outputs become float32 with a Cast behind the door."""
    graph = proto.graph
    kinds = set()
    for value in list(graph.input):
        kind = value.type.tensor_type.elem_type
        if kind in _OTHER_FLOATS:
            kinds.add(TensorProto.DataType.Name(kind))
            inside = unique(graph, f"{value.name}_cast")
            rename_reads(graph, value.name, inside)
            graph.node.insert(0, helper.make_node("Cast", [value.name], [inside], inside, to=kind))
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for value in list(graph.output):
        kind = value.type.tensor_type.elem_type
        if kind in _OTHER_FLOATS:
            kinds.add(TensorProto.DataType.Name(kind))
            inside = unique(graph, f"{value.name}_cast")
            _rename_output(graph, value.name, inside)
            graph.node.append(helper.make_node("Cast", [inside], [value.name], inside, to=TensorProto.FLOAT))
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    if kinds:
        notes.append(f"inputs and outputs of {', '.join(sorted(kinds))} are FLOAT now")


def _rename_output(graph: onnx.GraphProto, name: str, inside: str) -> None:
    for node in graph.node:
        for index, output in enumerate(node.output):
            if output == name:
                node.output[index] = inside
    rename_reads(graph, name, inside)


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str:
    """The size of a dimension, or its name; "" where it varies without one."""
    size = _size(dim)
    return size if size > 0 else dim.dim_param


def _size(dim: onnx.TensorShapeProto.Dimension) -> int:
    """The size of a dimension; -1 where it varies (some exporters write 0 or -1 for that)."""
    return dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else -1


def _inputs_of(path: Path, proto: onnx.ModelProto) -> tuple[Input, ...]:
    found = []
    single: list[str] = []
    for value in proto.graph.input:
        tensor = value.type.tensor_type
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)) if tensor.elem_type else None
        if dtype is None or dtype.kind not in "fiub":
            kind = TensorProto.DataType.Name(tensor.elem_type) if tensor.elem_type else "not a tensor"
            raise BadModel(f"model {path}: input {value.name!r} is {kind}, expected numbers")
        shape = tuple(_size(dim) for dim in tensor.shape.dim)
        if not tensor.HasField("shape"):
            raise BadModel(
                f"model {path}: input {value.name!r} does not say its dimensions: "
                "export it with them, such as [N, 16]"
            )
        if not shape:
            single.append(value.name)
        found.append(Input(value.name, dtype, shape))
    if not found:
        raise BadModel(f"model {path} has no inputs")
    sizes = {entry.name: entry.shape[0] for entry in found if entry.shape and entry.shape[0] > 0}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise BadModel(
            f"model {path}: its inputs have different numbers of rows ({listed}): every input needs one for "
            "each row of the data, or a value with --set"
        )
    if single:
        raise BadModel(
            f"model {path}: {'inputs' if len(single) > 1 else 'input'} {', '.join(map(repr, single))} "
            f"{'have' if len(single) > 1 else 'has'} no batch dimension, expected [N, ...]: give a value "
            f"with {' '.join(f'--set {name}=VALUE' for name in single)}"
        )
    return tuple(found)
