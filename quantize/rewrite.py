"""The passes of ``normalise``: each changes a graph in place and says how many changes it made.

Nothing here proves anything: ``normalise`` runs the graph before and after, and undoes what does not hold.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper, inliner, numpy_helper, shape_inference, version_converter

from quantize import graph, runtime
from quantize.weights import array_of, check, model_size, nbytes

OPSET: Final = 17  # the first that has everything needed: per-axis DequantizeLinear came with 13
IR_VERSION: Final = 8  # of opset 17; newer ones are kept
_OTHER_FLOATS: Final = (TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
RANDOM: Final = (
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli",
)  # fmt: skip
# A folded constant may not be larger than what it is made of, and this: filter banks and tables that are made
# in the graph would be most of a small file. onnxruntime makes them once when it loads the model, too.
_ROOM: Final = 1 << 10  # bytes
_ROOM_SHARE: Final = 1 / 128  # of the model
_MOST_ROOM: Final = 1 << 20
_DEFAULT: Final = ("", "ai.onnx")


# -- constants and control flow ---------------------------------------------------------------------------


def inline_functions(proto: onnx.ModelProto) -> int:
    """Local functions, as PyTorch's exporter writes them, become their nodes."""
    count = len(proto.functions)
    if count:
        proto.CopyFrom(inliner.inline_local_functions(proto))
    return count


def fold(proto: onnx.ModelProto) -> int:
    """Constant nodes, everything computed from constants, and If on a constant condition."""
    changes = 0
    while True:
        step = _constants_to_initializers(proto.graph)
        step += _known_shapes(proto)
        step += _fold_constants(proto)
        step += _inline_ifs(proto.graph)
        if not step:
            return changes
        changes += step


def _constants_to_initializers(body: onnx.GraphProto) -> int:
    kept = []
    for node in body.node:
        tensor = _constant(node) if node.op_type == "Constant" and node.domain in _DEFAULT else None
        if tensor is None:
            kept.append(node)
        else:
            tensor.name = node.output[0]
            body.initializer.append(tensor)
    changes = len(body.node) - len(kept)
    if changes:
        graph.replace_nodes(body, kept)
    return changes


def _constant(node: onnx.NodeProto) -> TensorProto | None:
    attribute = next(iter(node.attribute), None)
    if attribute is None:
        return None
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


def _known_shapes(proto: onnx.ModelProto) -> int:
    """``Shape`` of a tensor of known size, and ``Gather`` of a known dimension of a shape."""
    body = proto.graph
    if not any(node.op_type == "Shape" for node in body.node):
        return 0
    shapes = _shapes(proto)
    weights = {tensor.name: tensor for tensor in body.initializer}
    made = {node.output[0]: node for node in body.node if node.op_type == "Shape" and not node.attribute}
    kept, changes = [], 0
    for node in body.node:
        value: np.ndarray | None = None
        if node.op_type == "Shape" and not node.attribute:
            dims = shapes.get(node.input[0])
            if dims is not None and all(isinstance(dim, int) for dim in dims):
                value = np.array(dims, np.int64)
        elif node.op_type == "Gather" and node.input[0] in made and node.input[1] in weights:
            dims = shapes.get(made[node.input[0]].input[0])
            index = array_of(weights[node.input[1]])
            if dims is not None and (index < len(dims)).all() and (index >= -len(dims)).all():
                picked = [dims[int(place)] for place in index.ravel()]
                if all(isinstance(dim, int) for dim in picked):
                    value = np.array(picked, np.int64).reshape(index.shape)
        if value is None:
            kept.append(node)
            continue
        body.initializer.append(numpy_helper.from_array(value, node.output[0]))
        changes += 1
    if changes:
        graph.replace_nodes(body, kept)
        _drop_dead_nodes(body)
    return changes


def _shapes(proto: onnx.ModelProto) -> dict[str, tuple[int | str | None, ...]]:
    """Shapes as far as onnx infers them: sizes, names, or None."""
    try:
        inferred = shape_inference.infer_shapes(proto, data_prop=True)
    except Exception:  # an exotic operator: what is unknown is left as it is
        inferred = proto
    found: dict[str, tuple[int | str | None, ...]] = {}
    for value in (*inferred.graph.value_info, *inferred.graph.input):
        tensor = value.type.tensor_type
        if tensor.HasField("shape"):
            found[value.name] = tuple(
                dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
                for dim in tensor.shape.dim
            )
    for weight in inferred.graph.initializer:
        found[weight.name] = tuple(weight.dims)
    return found


def _fold_constants(proto: onnx.ModelProto) -> int:
    """Compute once what only constants go into. onnxruntime computes it, so that it is what it was."""
    body = proto.graph
    refused: set[str] = set()
    while True:
        weights = {tensor.name: tensor for tensor in body.initializer}
        known, group = set(weights), []
        for node in body.node:
            if (
                node.domain in _DEFAULT
                and node.op_type not in RANDOM
                and node.output[0] not in refused
                and not graph.subgraphs(node)
                and all(name in known for name in node.input if name)
            ):
                group.append(node)
                known.update(node.output)
        if not group:
            return 0
        inside = {name for node in group for name in node.output if name}
        others = [node for node in body.node if node.output[0] not in inside]
        needed = {value.name for value in body.output}
        for node in others:
            needed |= graph.reads(node)
            for subgraph in graph.subgraphs(node):
                needed |= {value.name for value in subgraph.output}
        wanted = sorted(inside & needed)
        if not wanted:
            graph.replace_nodes(body, others)
            return len(group)
        values = _compute(proto, group, weights, wanted)
        room = min(max(_ROOM, model_size(proto) * _ROOM_SHARE), _MOST_ROOM)
        made_of = _made_of(group, weights)
        large = {name for name in wanted if values[name].nbytes > max(room, made_of[name])}
        if large:
            refused |= {node.output[0] for node in group if large & set(node.output)}
            continue
        for name in wanted:
            body.initializer.append(numpy_helper.from_array(values[name], name))
        graph.replace_nodes(body, others)
        return len(group)


def _made_of(nodes: list[onnx.NodeProto], weights: Mapping[str, TensorProto]) -> dict[str, int]:
    """Bytes of the weights that go into each output of ``nodes``."""
    into: dict[str, frozenset[str]] = {name: frozenset((name,)) for name in weights}
    for node in nodes:
        together = frozenset().union(*(into[name] for name in node.input if name))
        into.update((name, together) for name in node.output if name)
    bytes_of = {name: nbytes(weight) for name, weight in weights.items()}
    return {name: sum(bytes_of[i] for i in into[name]) for node in nodes for name in node.output if name}


def _compute(
    proto: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    weights: Mapping[str, TensorProto],
    wanted: list[str],
) -> dict[str, np.ndarray]:
    read = {name for node in nodes for name in node.input}
    body = helper.make_graph(
        nodes,
        "constants",
        [],
        [helper.make_empty_tensor_value_info(name) for name in wanted],
        [weights[name] for name in read if name in weights],
    )
    session = runtime.open_session(
        helper.make_model(body, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    )
    return runtime.run(session, {})


def _inline_ifs(body: onnx.GraphProto) -> int:
    """An If whose condition is constant becomes the branch that is taken."""
    weights = {tensor.name: tensor for tensor in body.initializer}
    for position, node in enumerate(body.node):
        if node.op_type != "If" or node.input[0] not in weights:
            continue
        taken = "then_branch" if array_of(weights[node.input[0]]).all() else "else_branch"
        branch = next(attribute.g for attribute in node.attribute if attribute.name == taken)
        own = {tensor.name for tensor in branch.initializer}
        own.update(name for inner in branch.node for name in inner.output if name)
        names = {}
        for name in sorted(own):
            names[name] = graph.unique(body, f"{node.output[0]}_{name}")
        for tensor in branch.initializer:
            tensor.name = names[tensor.name]
        for inner in branch.node:
            for index, name in enumerate(inner.output):
                if name:
                    inner.output[index] = names[name]
        for old, new in names.items():
            graph.rename_reads(branch, old, new)
        ends = [
            helper.make_node("Identity", [names.get(value.name, value.name)], [output])
            for value, output in zip(branch.output, node.output, strict=True)
            if output
        ]
        nodes = list(body.node)
        body.initializer.extend(branch.initializer)
        graph.replace_nodes(body, [*nodes[:position], *branch.node, *ends, *nodes[position + 1 :]])
        return 1
    return 0


# -- precision, opset, onnxruntime ------------------------------------------------------------------------


def float_kinds(proto: onnx.ModelProto) -> set[int]:
    """The floating types other than float32 in a model."""
    kinds = {tensor.data_type for tensor in proto.graph.initializer}
    for node in graph.all_nodes(proto):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                kinds.add(attribute.t.data_type)
            if node.op_type == "Cast" and attribute.name == "to":
                kinds.add(attribute.i)
    return kinds & set(_OTHER_FLOATS)


def to_float32(proto: onnx.ModelProto) -> int:
    """All floats become float32: what INT8 is made from, and what every machine computes fast."""
    return _graph_to_float32(proto.graph)


def _graph_to_float32(body: onnx.GraphProto) -> int:
    changes = sum(_tensor_to_float32(tensor) for tensor in body.initializer)
    for value in (*body.input, *body.output, *body.value_info):
        if value.type.tensor_type.elem_type in _OTHER_FLOATS:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            changes += 1
    for node in body.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                changes += _tensor_to_float32(attribute.t)
            is_type = attribute.name in ("to", "dtype") and node.domain in _DEFAULT
            if is_type and attribute.i in _OTHER_FLOATS:
                attribute.i = TensorProto.FLOAT
                changes += 1
        changes += sum(_graph_to_float32(subgraph) for subgraph in graph.subgraphs(node))
    return changes


def _tensor_to_float32(tensor: TensorProto) -> int:
    if tensor.data_type not in _OTHER_FLOATS:
        return 0
    with np.errstate(over="ignore"):
        values = array_of(tensor).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return 1


def simplify(proto: onnx.ModelProto, scratch: Path | None = None) -> int:
    """Basic optimizations as onnxruntime does them: folding, common subexpressions, redundant nodes.

    Args:
        proto: changed in place.
        scratch: a folder for what onnxruntime writes; None: that of temporary files.
    """
    count = len(proto.graph.node)
    domains = {node.domain for node in proto.graph.node} | set(_DEFAULT)
    with tempfile.TemporaryDirectory(prefix="quantize-", dir=scratch) as folder:
        path = Path(folder, "simple.onnx")
        runtime.open_session(proto, level=runtime.OptimizationLevel.ORT_ENABLE_BASIC, optimized=path)
        simple = onnx.load(path, load_external_data=False)
    if any(node.domain not in domains for node in simple.graph.node):
        return 0
    del simple.graph.value_info[:]
    if len(simple.graph.node) >= count or model_size(simple) > 1.05 * model_size(proto) + 4 * _ROOM:
        return 0  # nothing gained, or tables made in the graph became weights
    used = {node.domain for node in graph.all_nodes(simple)} | {""}
    imports = [entry for entry in proto.opset_import if entry.domain in used or entry.domain in _DEFAULT]
    proto.graph.CopyFrom(simple.graph)
    del proto.opset_import[:]
    proto.opset_import.extend(imports)
    return count - len(simple.graph.node)


def convert_opset(proto: onnx.ModelProto) -> int:
    """To ``OPSET``, with onnx's own converter."""
    converted = version_converter.convert_version(proto, OPSET)
    check(converted)
    proto.CopyFrom(converted)
    proto.ir_version = max(proto.ir_version, IR_VERSION)
    return 1


def raise_opset(proto: onnx.ModelProto) -> int:
    """The number alone: most operators only learned more types since. The proof says whether that holds."""
    for entry in proto.opset_import:
        if entry.domain in _DEFAULT:
            entry.version = OPSET
    check(proto)
    return 1


# -- arithmetic -------------------------------------------------------------------------------------------


def spell_out_scalers(proto: onnx.ModelProto) -> int:
    """``ai.onnx.ml.Scaler`` is ``(x - offset) * scale``."""
    body = proto.graph
    kinds = _elem_types(proto)
    nodes, changes = [], 0
    for node in body.node:
        if node.op_type != "Scaler" or kinds.get(node.input[0]) != TensorProto.FLOAT:
            nodes.append(node)
            continue
        values = {item.name: np.array(item.floats, np.float32) for item in node.attribute}
        names = []
        for part in ("offset", "scale"):
            names.append(graph.unique(body, f"{node.output[0]}_{part}"))
            body.initializer.append(numpy_helper.from_array(values[part], names[-1]))
        centred = graph.unique(body, f"{node.output[0]}_centred")
        nodes.append(helper.make_node("Sub", [node.input[0], names[0]], [centred]))
        nodes.append(helper.make_node("Mul", [centred, names[1]], [node.output[0]]))
        changes += 1
    if changes:
        graph.replace_nodes(body, nodes)
    return changes


def _elem_types(proto: onnx.ModelProto) -> dict[str, int]:
    try:
        inferred = shape_inference.infer_shapes(proto)
    except Exception:  # as above: unknown stays unknown
        inferred = proto
    values = (*inferred.graph.value_info, *inferred.graph.input)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in inferred.graph.initializer}


@dataclass(frozen=True, slots=True)
class _Affine:
    """``y * scale + shift`` per output channel, in float64 until it is folded: (channels,) each."""

    scale: np.ndarray
    shift: np.ndarray

    def then(self, other: _Affine) -> _Affine:
        return _Affine(self.scale * other.scale, self.shift * other.scale + other.shift)


def fold_affine(proto: onnx.ModelProto) -> int:
    """Add, Sub, Mul, Div, Neg and BatchNormalization with constants, after a layer, become its weights."""
    body = proto.graph
    weights = {tensor.name: tensor for tensor in body.initializer}
    shapes = _shapes(proto)
    users = graph.users(body)
    outputs = {value.name for value in body.output}
    removed: set[int] = set()
    added: dict[int, onnx.NodeProto] = {}
    changes = 0
    every = list(body.node)  # held, so that their identities stay theirs
    for node in every:
        found = _layer(node, weights, shapes)
        if found is None:
            continue
        channels, rank, axis = found
        total = _Affine(np.ones(channels), np.zeros(channels))
        chain: list[onnx.NodeProto] = []
        tensor = node.output[0]
        while tensor not in outputs and len(users.get(tensor, [])) == 1:
            following = users[tensor][0]
            step = _affine_of(following, tensor, weights, channels, rank, axis)
            if step is None:
                break
            total = total.then(step)
            chain.append(following)
            tensor = following.output[0]
        if not chain or not (np.isfinite(total.scale).all() and np.isfinite(total.shift).all()):
            continue
        if node.op_type == "MatMul" and len(chain) == 1 and (total.scale == 1).all():
            continue  # a bias: that is what it has to be
        removed.update(id(item) for item in chain)
        changes += len(chain)
        _scale_weight(body, node, weights, total, axis)
        if node.op_type != "MatMul":
            _shift_bias(body, node, weights, total, channels)
            node.output[0] = tensor
        elif total.shift.any():
            name = graph.unique(body, f"{tensor}_shift")
            body.initializer.append(numpy_helper.from_array(total.shift.astype(np.float32), name))
            added[id(node)] = helper.make_node("Add", [node.output[0], name], [tensor])
        else:
            node.output[0] = tensor
    if changes:
        nodes = []
        for node in every:
            if id(node) not in removed:
                nodes.append(node)
            if id(node) in added:
                nodes.append(added[id(node)])
        graph.replace_nodes(body, nodes)
    return changes


def _layer(
    node: onnx.NodeProto,
    weights: Mapping[str, TensorProto],
    shapes: Mapping[str, tuple[int | str | None, ...]],
) -> tuple[int, int, int] | None:
    """Output channels of a layer, the rank of its result, and the axis of the channels in it."""
    if node.domain not in _DEFAULT or len(node.input) < 2 or node.input[1] not in weights:
        return None
    weight = weights[node.input[1]]
    if weight.data_type != TensorProto.FLOAT:
        return None
    has_bias = len(node.input) > 2 and node.input[2] != ""
    if has_bias and node.input[2] not in weights:
        return None
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    if node.op_type == "Conv":
        return weight.dims[0], len(weight.dims), 1
    if node.op_type == "ConvTranspose" and attributes.get("group", 1) == 1:
        return weight.dims[1], len(weight.dims), 1
    if node.op_type == "Gemm" and attributes.get("alpha", 1.0) == 1.0 and attributes.get("beta", 1.0) == 1.0:
        columns = weight.dims[0 if attributes.get("transB", 0) else 1]
        if has_bias:
            bias = weights[node.input[2]]
            if int(np.prod(bias.dims)) not in (1, columns) or (len(bias.dims) == 2 and bias.dims[0] != 1):
                return None
        return columns, 2, 1
    if node.op_type == "MatMul" and len(weight.dims) == 2:
        shape = shapes.get(node.input[0])
        return None if shape is None or len(shape) < 2 else (weight.dims[1], len(shape), len(shape) - 1)
    return None


def _affine_of(
    node: onnx.NodeProto,
    tensor: str,
    weights: Mapping[str, TensorProto],
    channels: int,
    rank: int,
    axis: int,
) -> _Affine | None:
    if node.domain not in _DEFAULT:
        return None
    one, zero = np.ones(channels), np.zeros(channels)
    if node.op_type == "Neg":
        return _Affine(-one, zero)
    if node.op_type == "BatchNormalization" and axis == 1:
        return _batch_norm(node, tensor, weights, channels)
    if node.op_type not in ("Add", "Sub", "Mul", "Div") or len(node.input) != 2:
        return None
    other = node.input[1] if node.input[0] == tensor else node.input[0]
    if other not in weights or weights[other].data_type != TensorProto.FLOAT:
        return None
    value = _per_channel(array_of(weights[other]), channels, rank, axis)
    if value is None:
        return None
    first = node.input[0] == tensor
    if node.op_type == "Add":
        return _Affine(one, value)
    if node.op_type == "Sub":
        return _Affine(one, -value) if first else _Affine(-one, value)
    if node.op_type == "Mul":
        return _Affine(value, zero)
    return _Affine(1.0 / value, zero) if first and value.all() else None


def _batch_norm(
    node: onnx.NodeProto, tensor: str, weights: Mapping[str, TensorProto], channels: int
) -> _Affine | None:
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    if node.input[0] != tensor or attributes.get("training_mode", 0) or any(node.output[1:]):
        return None
    if any(name not in weights for name in node.input[1:5]):
        return None
    gamma, beta, mean, variance = (array_of(weights[name]).astype(np.float64) for name in node.input[1:5])
    if gamma.shape != (channels,):
        return None
    scale = gamma / np.sqrt(variance + attributes.get("epsilon", 1e-5))
    return _Affine(scale, beta - mean * scale)


def _per_channel(values: np.ndarray, channels: int, rank: int, axis: int) -> np.ndarray | None:
    """A constant as one number per channel, if broadcasting it means that."""
    if values.ndim > rank:
        return None
    if values.size == 1:
        return np.full(channels, values.item(), np.float64)
    shape = (1,) * (rank - values.ndim) + values.shape
    if shape[axis] != channels or values.size != channels:
        return None
    return values.astype(np.float64).reshape(channels)


def _scale_weight(
    body: onnx.GraphProto,
    node: onnx.NodeProto,
    weights: Mapping[str, TensorProto],
    total: _Affine,
    axis: int,
) -> None:
    if (total.scale == 1).all():
        return
    values = array_of(weights[node.input[1]]).astype(np.float64)
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    of_weight = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1}.get(node.op_type)
    if of_weight is None:
        of_weight = 0 if attributes.get("transB", 0) else 1
    shape = [-1 if place == of_weight else 1 for place in range(values.ndim)]
    scaled = (values * total.scale.reshape(shape)).astype(np.float32)
    name = graph.unique(body, f"{node.input[1]}_scaled")
    body.initializer.append(numpy_helper.from_array(scaled, name))
    node.input[1] = name


def _shift_bias(
    body: onnx.GraphProto,
    node: onnx.NodeProto,
    weights: Mapping[str, TensorProto],
    total: _Affine,
    channels: int,
) -> None:
    bias = np.zeros(channels)
    if len(node.input) > 2 and node.input[2]:
        bias = np.broadcast_to(array_of(weights[node.input[2]]).astype(np.float64).reshape(-1), (channels,))
    folded = (bias * total.scale + total.shift).astype(np.float32)
    name = graph.unique(body, f"{node.output[0]}_bias")
    body.initializer.append(numpy_helper.from_array(folded, name))
    if len(node.input) > 2:
        node.input[2] = name
    else:
        node.input.append(name)


# -- dense layers -----------------------------------------------------------------------------------------


def dense(proto: onnx.ModelProto) -> int:
    """Dense layers become Gemm with alpha = beta = 1 and a one-dimensional bias."""
    body = proto.graph
    weights = {tensor.name: tensor for tensor in body.initializer}
    shapes = _shapes(proto)
    users = graph.users(body)
    outputs = {value.name for value in body.output}
    removed: set[str] = set()
    changes = 0
    for node in body.node:
        if node.op_type == "MatMul" and node.input[1] in weights and len(shapes.get(node.input[0], ())) == 2:
            changes += _absorb_bias(body, node, weights, users, outputs, removed)
        elif node.op_type == "Gemm":
            changes += _plain_gemm(body, node, weights)
    if removed:
        kept = [node for node in body.node if not (node.op_type == "Add" and node.output[0] in removed)]
        graph.replace_nodes(body, kept)
    return changes


def _absorb_bias(
    body: onnx.GraphProto,
    node: onnx.NodeProto,
    weights: Mapping[str, TensorProto],
    users: Mapping[str, list[onnx.NodeProto]],
    outputs: set[str],
    removed: set[str],
) -> int:
    """``Add(MatMul(a, W), b)`` -> ``Gemm(a, W, b)``: one int8 kernel instead of two and a float detour."""
    following = users.get(node.output[0], [])
    if len(weights[node.input[1]].dims) != 2 or len(following) != 1 or following[0].op_type != "Add":
        return 0
    add = following[0]
    bias = next((name for name in add.input if name in weights), None)
    columns = weights[node.input[1]].dims[1]
    if bias is None or int(np.prod(weights[bias].dims)) != columns or weights[bias].dims[-1:] != [columns]:
        return 0
    if node.output[0] in outputs or len(weights[bias].dims) > 2:
        return 0
    flat = array_of(weights[bias]).reshape(-1)
    name = graph.unique(body, f"{bias}_1d")
    body.initializer.append(numpy_helper.from_array(flat, name))
    node.op_type = "Gemm"
    node.input.append(name)
    removed.add(add.output[0])
    node.output[0] = add.output[0]
    # The Gemm stands where the MatMul stood, before every user of the Add: the order stays topological.
    return 1


def _plain_gemm(body: onnx.GraphProto, node: onnx.NodeProto, weights: Mapping[str, TensorProto]) -> int:
    changes = 0
    attributes = {attribute.name: attribute for attribute in node.attribute}
    for factor, index in (("alpha", 1), ("beta", 2)):
        value = attributes[factor].f if factor in attributes else 1.0
        if value != 1.0 and (len(node.input) <= index or node.input[index] in weights):
            if len(node.input) > index:
                folded = array_of(weights[node.input[index]]) * np.float32(value)
                node.input[index] = graph.unique(body, f"{node.input[index]}_{factor}")
                body.initializer.append(numpy_helper.from_array(folded, node.input[index]))
            attributes[factor].f = 1.0
            changes += 1
    known = {tensor.name: tensor for tensor in body.initializer}
    bias = known.get(node.input[2]) if len(node.input) > 2 else None
    weight = known.get(node.input[1])
    if bias is not None and weight is not None and len(bias.dims) != 1:
        columns = weight.dims[0 if "transB" in attributes and attributes["transB"].i else 1]
        values = array_of(bias)
        if values.size in (1, columns) and (values.ndim == 0 or values.shape[-1] == values.size):
            node.input[2] = graph.unique(body, f"{bias.name}_1d")
            full = np.broadcast_to(values.reshape(-1), (columns,)).copy()
            body.initializer.append(numpy_helper.from_array(full, node.input[2]))
            changes += 1
    return changes


# -- what does nothing ------------------------------------------------------------------------------------


def remove_dead(proto: onnx.ModelProto) -> int:
    """Nodes that change nothing or that nobody reads; pairs of Transpose or Reshape become one or none."""
    body = proto.graph
    changes = _drop_dead_nodes(body)
    while True:
        step = _join_pairs(body) + _bypass(proto) + _drop_dead_nodes(body)
        if not step:
            return changes
        changes += step


def _drop_dead_nodes(body: onnx.GraphProto) -> int:
    count = len(body.node)
    outputs = {value.name for value in body.output}
    while True:
        needed = outputs | graph.names_read(body)
        kept = [node for node in body.node if any(name in needed for name in node.output)]
        if len(kept) == len(body.node):
            return count - len(kept)
        graph.replace_nodes(body, kept)


def _join_pairs(body: onnx.GraphProto) -> int:
    weights = {tensor.name: tensor for tensor in body.initializer}
    makers = {name: node for node in body.node for name in node.output}
    changes = 0
    for node in body.node:
        before = makers.get(node.input[0]) if node.input else None
        if before is None or before.op_type != node.op_type or before is node:
            continue
        if node.op_type == "Transpose":
            first, second = _permutation(before), _permutation(node)
            if first is None or second is None:
                continue
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("perm", [first[place] for place in second]))
        elif node.op_type == "Reshape" and node.input[1] in weights:
            if (array_of(weights[node.input[1]]) == 0).any():
                continue  # a 0 means "as before", and before would be another shape
        else:
            continue
        node.input[0] = before.input[0]
        changes += 1
    return changes


def _permutation(node: onnx.NodeProto) -> list[int] | None:
    return next((list(item.ints) for item in node.attribute if item.name == "perm"), None)


def _bypass(proto: onnx.ModelProto) -> int:
    body = proto.graph
    shapes, kinds = _shapes(proto), _elem_types(proto)
    outputs = {value.name for value in body.output}
    entries = {value.name for value in body.input}
    constants = {tensor.name for tensor in body.initializer}
    nodes = list(body.node)
    dead = [node for node in nodes if node.domain in _DEFAULT and _does_nothing(node, shapes, kinds)]
    aliases = {node.output[0]: node.input[0] for node in dead if node.output[0] not in outputs}
    gone = {node.output[0] for node in dead if node.output[0] not in outputs}
    if gone:
        graph.replace_nodes(body, [node for node in nodes if node.output[0] not in gone])
        for result in aliases:
            source = result
            while source in aliases:
                source = aliases[source]
            graph.rename_reads(body, result, source)
        return len(gone)
    for node in dead:  # those left make outputs: the output's name goes to whoever makes what they read
        source, result = node.input[0], node.output[0]
        maker = next((other for other in nodes if source in other.output), None)
        if maker is None or source in outputs or source in entries or source in constants:
            continue
        maker.output[list(maker.output).index(source)] = result
        graph.replace_nodes(body, [other for other in nodes if other is not node])
        graph.rename_reads(body, source, result)
        return 1
    return 0


def _does_nothing(
    node: onnx.NodeProto, shapes: Mapping[str, tuple[int | str | None, ...]], kinds: Mapping[str, int]
) -> bool:
    if not node.input or any(node.output[1:]):
        return False
    if node.op_type in ("Identity", "Dropout"):
        return node.op_type == "Identity" or len(node.input) < 3
    if node.op_type in ("Concat", "Sum", "Max", "Min", "Mean"):
        return len(node.input) == 1
    if node.op_type == "Cast":
        return bool(kinds.get(node.input[0]) == next(a.i for a in node.attribute if a.name == "to"))
    if node.op_type == "Transpose":
        order = _permutation(node)
        return order is not None and order == sorted(order)
    if node.op_type in ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand"):
        before, after = shapes.get(node.input[0]), shapes.get(node.output[0])
        return before is not None and before == after and None not in before
    return False
