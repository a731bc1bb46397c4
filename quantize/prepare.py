"""Step 2: put missing values, scaling and the score into the FP32 graph.

The result is the *reference*: every INT8 candidate is compared with it, and the agent sends it raw numbers.

::

    x ─ IsNaN ─ Where(substitute) ─ Sub(offset) ─ Mul(factor) ─┬─ the model ─ y ─ Sub ─ ReduceMean ─ score
                                                               └──────────────────┘

Invariants: the input keeps its name; the first dimension of every input and output varies if the model
allows it; what the model computes is not changed (``_prove`` compares with the original on calibration rows).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from edge_agent.contract.manifest import Datatype, Task, TensorSpec
from quantize import compare, runtime
from quantize.config import Impute, PrepareConfig, Scale, Score
from quantize.errors import BadData, BadModel
from quantize.load import FloatModel, Input, Rows

SCORE: Final = "score"
BATCH: Final = "N"
IR_VERSION: Final = 8  # of opset 17; newer ones are kept
_PROOF_ROWS: Final = 32
_PROOF_SQNR: Final = 100.0  # dB: rounding of float32 sums in another order, no more

_DATATYPES: Final[Mapping[str, Datatype]] = {
    "float32": Datatype.FP32, "float64": Datatype.FP64, "float16": Datatype.FP16, "bool": Datatype.BOOL,
    "int8": Datatype.INT8, "int16": Datatype.INT16, "int32": Datatype.INT32, "int64": Datatype.INT64,
    "uint8": Datatype.UINT8, "uint16": Datatype.UINT16, "uint32": Datatype.UINT32, "uint64": Datatype.UINT64,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedModel:
    """The FP32 reference graph: raw numbers in, score (or the model's own outputs) out."""

    proto: onnx.ModelProto
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    task: Task
    score: str | None  # the output that holds one score a row
    fixed_batch: int | None  # rows of every batch where the model takes no other
    notes: tuple[str, ...]

    @property
    def batch(self) -> int:
        """Rows to run at a time."""
        return self.fixed_batch or runtime.BATCH

    def trim(self, rows: Rows) -> Rows:
        """``rows``, cut to whole batches where the batch is fixed."""
        return (
            rows if self.fixed_batch is None else rows.take(np.arange(len(rows) // self.batch * self.batch))
        )


def prepare(model: FloatModel, calibration: Rows, config: PrepareConfig) -> PreparedModel:
    """Wrap ``model`` in pre-processing and score.

    Raises:
        BadModel: the options do not fit the model (MSE without a reconstruction, scaling of an image).
        BadData: NaN in the data with nothing to stand in for it, or what stands in is not finite.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    proto.ir_version = max(proto.ir_version, IR_VERSION)
    notes: list[str] = []

    _normalize(proto)
    fixed_batch = _free_batch(proto, model.inputs, calibration)
    if fixed_batch:
        notes.append(f"the model takes batches of {fixed_batch} only")
    _prove(model.original, proto, calibration, fixed_batch)

    only = model.inputs[0] if len(model.inputs) == 1 else None
    if only is not None and only.tabular:
        scaled = _preprocess(proto, only, calibration.inputs[only.name], config)
    else:
        scaled = None
        _refuse_preprocessing(config, calibration)
    score = _score(proto, only, scaled, config.score, calibration, fixed_batch or runtime.BATCH)
    onnx.checker.check_model(proto)
    return PreparedModel(
        proto=proto,
        inputs=tuple(_input_spec(entry, calibration, fixed_batch) for entry in model.inputs),
        outputs=_output_specs(proto, calibration, fixed_batch),
        task=Task.RAW if score is None else Task.ANOMALY,
        score=score,
        fixed_batch=fixed_batch,
        notes=(*model.notes, *notes),
    )


# -- normal form ------------------------------------------------------------------------------------------


def _normalize(proto: onnx.ModelProto) -> None:
    """Dense layers become Gemm with alpha = beta = 1 and a one-dimensional bias."""
    graph = proto.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    ranks = _ranks(proto)
    uses = _uses(graph)
    removed: set[str] = set()
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights and ranks.get(node.input[0]) == 2:
            _absorb_bias(graph, node, weights, uses, removed)
        elif node.op_type == "Gemm":
            _plain_gemm(graph, node, weights)
    kept = [node for node in graph.node if not (node.op_type == "Add" and node.output[0] in removed)]
    if len(kept) < len(graph.node):
        del graph.node[:]
        graph.node.extend(kept)
    drop_unused(graph)


def _absorb_bias(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    weights: Mapping[str, TensorProto],
    uses: Mapping[str, list[onnx.NodeProto]],
    removed: set[str],
) -> None:
    """``Add(MatMul(a, W), b)`` -> ``Gemm(a, W, b)``: one int8 kernel instead of two and a float detour."""
    users = uses.get(node.output[0], [])
    if len(weights[node.input[1]].dims) != 2 or len(users) != 1 or users[0].op_type != "Add":
        return
    add = users[0]
    bias = next((name for name in add.input if name in weights), None)
    columns = weights[node.input[1]].dims[1]
    if bias is None or int(np.prod(weights[bias].dims)) != columns or weights[bias].dims[-1:] != [columns]:
        return
    if node.output[0] in {value.name for value in graph.output}:
        return
    flat = numpy_helper.to_array(weights[bias]).reshape(-1)
    name = unique(graph, f"{bias}_1d")
    graph.initializer.append(numpy_helper.from_array(flat, name))
    node.op_type = "Gemm"
    node.input.append(name)
    removed.add(add.output[0])
    node.output[0] = add.output[0]
    # The Gemm stands where the MatMul stood, before every user of the Add: the order stays topological.


def _plain_gemm(graph: onnx.GraphProto, node: onnx.NodeProto, weights: Mapping[str, TensorProto]) -> None:
    attributes = {attribute.name: attribute for attribute in node.attribute}
    for factor, index in (("alpha", 1), ("beta", 2)):
        value = attributes[factor].f if factor in attributes else 1.0
        if value != 1.0 and (len(node.input) <= index or node.input[index] in weights):
            if len(node.input) > index:
                folded = numpy_helper.to_array(weights[node.input[index]]) * np.float32(value)
                node.input[index] = unique(graph, f"{node.input[index]}_{factor}")
                graph.initializer.append(numpy_helper.from_array(folded, node.input[index]))
            attributes[factor].f = 1.0
    bias = next((t for t in graph.initializer if len(node.input) > 2 and t.name == node.input[2]), None)
    weight = weights.get(node.input[1])
    if bias is not None and weight is not None and list(bias.dims) != [bias.dims[-1] if bias.dims else 0]:
        columns = weight.dims[0 if "transB" in attributes and attributes["transB"].i else 1]
        values = numpy_helper.to_array(bias)
        if values.size in (1, columns) and (values.ndim == 0 or values.shape[-1] == values.size):
            node.input[2] = unique(graph, f"{bias.name}_1d")
            full = np.broadcast_to(values.reshape(-1), (columns,)).copy()
            graph.initializer.append(numpy_helper.from_array(full, node.input[2]))


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove initializers that nothing reads."""
    read = {value.name for value in graph.output} | _names_read(graph)
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _names_read(graph: onnx.GraphProto) -> set[str]:
    names: set[str] = set()
    for node in graph.node:
        names.update(node.input)
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                names |= _names_read(subgraph) | {value.name for value in subgraph.output}
    return names


def _uses(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    uses: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in {*node.input, *(_names_read_by_subgraphs(node))}:
            uses.setdefault(name, []).append(node)
    return uses


def _names_read_by_subgraphs(node: onnx.NodeProto) -> set[str]:
    names: set[str] = set()
    for attribute in node.attribute:
        for subgraph in (attribute.g, *attribute.graphs):
            names |= _names_read(subgraph)
    return names


def _ranks(proto: onnx.ModelProto) -> dict[str, int]:
    try:
        inferred = shape_inference.infer_shapes(proto)
    except Exception:  # an exotic operator: what is unknown is left as it is
        return {}
    values = (*inferred.graph.value_info, *inferred.graph.input)
    return {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in values
        if value.type.tensor_type.HasField("shape")
    }


def unique(graph: onnx.GraphProto, name: str) -> str:
    """``name``, or with underscores until nothing in the graph is called so."""
    taken = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    taken.update(name for node in graph.node for name in (*node.input, *node.output))
    while name in taken:
        name += "_"
    return name


# -- batch ------------------------------------------------------------------------------------------------


def _free_batch(proto: onnx.ModelProto, inputs: tuple[Input, ...], rows: Rows) -> int | None:
    """Make the first dimension vary; returns its size if the graph insists on one."""
    graph = proto.graph
    del graph.value_info[:]  # what an exporter wrote about intermediate shapes may contradict the new batch
    before = onnx.ModelProto()
    before.CopyFrom(proto)
    fixed = max(entry.shape[0] for entry in inputs)
    for value in (*graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims:
            dims[0].ClearField("dim_value")
            dims[0].dim_param = BATCH
    try:
        session = runtime.open_session(proto)
        for count in (1, 3):
            outputs = runtime.run(session, {name: values[:count] for name, values in rows.inputs.items()})
            if any(output.shape[:1] != (count,) for output in outputs.values()):
                raise BadModel(f"outputs do not have a row for each of {count} rows")
    except BadModel as error:
        if fixed < 1:
            raise
        if len(rows) < fixed:
            raise BadData(
                f"data {rows.source}: {len(rows)} rows, the model takes {fixed} at a time"
            ) from error
        proto.CopyFrom(before)
        return fixed
    return None


def _prove(original: onnx.ModelProto, proto: onnx.ModelProto, rows: Rows, fixed: int | None) -> None:
    """The normal form computes what the original computed.

    Raises:
        BadModel: it does not: our bug, and better said than shipped.
    """
    batch = fixed or next((size for size in _batches(original) if size > 0), 1)
    some = rows.take(np.arange(min(len(rows), max(_PROOF_ROWS, batch)) // batch * batch))
    filled = {
        name: np.nan_to_num(values) if values.dtype.kind == "f" else values
        for name, values in some.inputs.items()
    }
    expected = runtime.run_all(runtime.open_session(original), filled, batch)
    got = runtime.run_all(runtime.open_session(proto), filled, batch)
    for name, values in expected.items():
        if values.dtype.kind == "f" and compare.sqnr(values, got[name]) < _PROOF_SQNR:
            raise BadModel(
                f"output {name!r} changed while the graph was normalized "
                f"({compare.sqnr(values, got[name]):.0f} dB): please report this model"
            )


def _batches(proto: onnx.ModelProto) -> list[int]:
    return [value.type.tensor_type.shape.dim[0].dim_value for value in proto.graph.input]


# -- before the model -------------------------------------------------------------------------------------


def _preprocess(proto: onnx.ModelProto, entry: Input, rows: np.ndarray, config: PrepareConfig) -> str:
    """Insert imputation and scaling; returns the tensor the model now reads."""
    graph = proto.graph
    nodes: list[onnx.NodeProto] = []
    tensor = entry.name
    filled = rows
    if config.impute is not Impute.NONE:
        centre = np.nanmedian if config.impute is Impute.MEDIAN else np.nanmean
        substitute = centre(rows.astype(np.float64), axis=0).astype(np.float32)
        filled = np.where(np.isnan(rows), substitute, rows)
        missing, present = unique(graph, "missing"), unique(graph, "present")
        constant = _constant(graph, "substitute", substitute)
        nodes += [
            helper.make_node("IsNaN", [tensor], [missing], missing),
            helper.make_node("Where", [missing, constant, tensor], [present], present),
        ]
        tensor = present
    elif np.isnan(rows).any():
        count = int(np.isnan(rows).any(axis=1).sum())
        raise BadData(f"{count} calibration rows have missing values (NaN): impute them with median or mean")
    if config.scale is not Scale.NONE:
        offset, factor = _scaling(filled.astype(np.float64), config.scale)
        centred, scaled = unique(graph, "centred"), unique(graph, "scaled")
        nodes += [
            helper.make_node("Sub", [tensor, _constant(graph, "offset", offset)], [centred], centred),
            helper.make_node("Mul", [centred, _constant(graph, "factor", factor)], [scaled], scaled),
        ]
        tensor = scaled
    if not nodes:
        return tensor
    _rename_reads(graph, entry.name, tensor)
    body = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *body])
    return tensor


def _scaling(rows: np.ndarray, scale: Scale) -> tuple[np.ndarray, np.ndarray]:
    """Offset and factor per feature. A constant feature keeps its unit: (x - offset) * 1."""
    if scale is Scale.STANDARD:
        offset, width = rows.mean(axis=0), rows.std(axis=0)
    else:
        offset, width = rows.min(axis=0), np.ptp(rows, axis=0)
    # Rounding leaves a constant column a width of a few float32 ulps, which would be divided by.
    constant = width <= 1e-6 * np.maximum(np.abs(offset), 1e-30)
    return offset.astype(np.float32), (1.0 / np.where(constant, 1.0, width)).astype(np.float32)


def _constant(graph: onnx.GraphProto, name: str, values: np.ndarray) -> str:
    name = unique(graph, name)
    graph.initializer.append(numpy_helper.from_array(values.reshape(1, -1), name))
    return name


def _rename_reads(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                _rename_reads(subgraph, old, new)


def _refuse_preprocessing(config: PrepareConfig, rows: Rows) -> None:
    if config.scale is not Scale.NONE:
        raise BadModel("scaling needs a model with one input of shape [N, features]: use --scale none")
    for name, values in rows.inputs.items():
        if values.dtype.kind == "f" and np.isnan(values).any():
            raise BadData(
                f"data {rows.source}: {name!r} has missing values (NaN), which only tables may have"
            )


# -- after the model --------------------------------------------------------------------------------------


def _score(
    proto: onnx.ModelProto, entry: Input | None, scaled: str | None, score: Score, rows: Rows, batch: int
) -> str | None:
    """Make the score an output; returns its name, or None where there is none."""
    graph = proto.graph
    some = {name: values[:batch] for name, values in rows.inputs.items()}
    outputs = runtime.run(runtime.open_session(proto), some)
    shapes = {name: values.shape for name, values in outputs.items()}
    reconstruction = None
    if entry is not None and scaled is not None:
        wanted = rows.inputs[entry.name][:batch].shape
        alike = [
            name for name, values in outputs.items() if values.shape == wanted and values.dtype.kind == "f"
        ]
        reconstruction = alike[0] if len(alike) == 1 and (wanted[1] > 1 or score is Score.MSE) else None
    if score is Score.MSE or (score is Score.AUTO and reconstruction):
        if reconstruction is None or scaled is None:
            listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise BadModel(
                f"score mse needs one output of the input's shape (a reconstruction), outputs are {listed}: "
                "use --score none"
            )
        return _mean_squared_error(proto, scaled, reconstruction)
    single = [name for name, shape in shapes.items() if shape[1:] in ((), (1,)) and shape]
    if len(shapes) != 1 or not single or outputs[single[0]].dtype != np.float32:
        return None
    if shapes[single[0]][1:] == (1,):
        _flatten(graph, single[0])
    return single[0]


def _mean_squared_error(proto: onnx.ModelProto, scaled: str, reconstruction: str) -> str:
    graph = proto.graph
    score, error = unique(graph, SCORE), unique(graph, "error")
    squared = unique(graph, "squared")
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    nodes = [
        helper.make_node("Sub", [reconstruction, scaled], [error], error),
        helper.make_node("Mul", [error, error], [squared], squared),
    ]
    if opset >= 18:  # axes became an input
        axes = unique(graph, "score_axes")
        graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), axes))
        nodes.append(helper.make_node("ReduceMean", [squared, axes], [score], score, keepdims=0))
    else:
        nodes.append(helper.make_node("ReduceMean", [squared], [score], score, keepdims=0, axes=[1]))
    graph.node.extend(nodes)
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(score, TensorProto.FLOAT, [BATCH]))
    return score


def _flatten(graph: onnx.GraphProto, output: str) -> None:
    """An output [N, 1] becomes [N] under its own name: one number a row."""
    column = unique(graph, f"{output}_column")
    shape = unique(graph, f"{output}_shape")
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name == output:
                node.output[index] = column
    _rename_reads(graph, output, column)
    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), shape))
    graph.node.append(helper.make_node("Reshape", [column, shape], [output], f"{output}_flat"))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, [BATCH]))


# -- the manifest's view ----------------------------------------------------------------------------------


def _input_spec(entry: Input, rows: Rows, fixed: int | None) -> TensorSpec:
    return TensorSpec(
        entry.name,
        _DATATYPES[entry.dtype.name],
        (fixed or -1, *entry.shape[1:]),
        features=rows.features if entry.tabular else None,
    )


def _output_specs(proto: onnx.ModelProto, rows: Rows, fixed: int | None) -> tuple[TensorSpec, ...]:
    """Names, types and shapes of the outputs as they come, from runs with one and with two rows."""
    session = runtime.open_session(proto)
    counts = (fixed, fixed) if fixed else (1, 2)
    first, second = (
        runtime.run(session, {name: values[:count] for name, values in rows.inputs.items()})
        for count in counts
    )
    specs = []
    for name, values in first.items():
        if values.dtype.name not in _DATATYPES:
            raise BadModel(f"output {name!r} has type {values.dtype}, which a bundle cannot carry")
        shape = tuple(a if a == b else -1 for a, b in zip(values.shape, second[name].shape, strict=True))
        specs.append(TensorSpec(name, _DATATYPES[values.dtype.name], shape))
    return tuple(specs)
