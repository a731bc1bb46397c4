"""What can be pruned: hidden channels, traced from the layer that makes them to the layers that read them.

Invariant: a group is only found where every node on the way is understood; what is not ends the trace, and
those channels stay.

Idea. From a Conv, Gemm or MatMul on, the channels are followed through all that treats them one by one (Relu,
pooling, depthwise convolution, Flatten) until layers read them. Numbers are positions in ``graph.node``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from quantize.graph import names_read, reads, subgraphs, unique
from quantize.weights import array_of

MULTIPLE: Final = 16  # channels: one vector register of int8

_CHANNELWISE: Final = frozenset((
    "Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Softplus",
    "Softsign", "Erf", "Gelu", "QuickGelu", "Swish", "Mish", "Clip", "Dropout", "Identity", "Abs", "Neg",
    "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool",
))  # fmt: skip
_BINARY: Final = ("Add", "Sub", "Mul", "Div")
_LAYERS: Final = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True, slots=True)
class Consumer:
    """A layer that reads a group. ``block`` values in a row belong to one channel (after a Flatten)."""

    node: int
    tensor: str
    block: int


@dataclass(frozen=True, slots=True)
class Group:
    """Hidden channels that can be dropped together. Numbers are positions in ``graph.node``."""

    producer: int
    name: str  # of the layer that makes them
    width: int
    slices: tuple[tuple[int, int, int], ...]  # (node, input, axis) of other weights with one entry a channel
    depthwise: tuple[int, ...]
    reshapes: tuple[tuple[int, int], ...]  # (node, values a channel) with the width in a constant shape
    consumers: tuple[Consumer, ...]


def find_groups(proto: onnx.ModelProto) -> tuple[Group, ...]:
    """Every group of hidden channels in the graph, in its order."""
    graph = proto.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    users: dict[str, list[int]] = {}
    hidden: set[str] = set()  # read by subgraphs: out of our sight
    for position, node in enumerate(graph.node):
        for name in node.input:
            if position not in users.setdefault(name, []):
                users[name].append(position)
        for body in subgraphs(node):
            hidden |= names_read(body) | {value.name for value in body.output}
    found = []
    for position, node in enumerate(graph.node):
        width = _made(node, weights)
        if width is None or width <= MULTIPLE:
            continue
        group = _trace(graph, weights, users, outputs | hidden, position, width)
        if group is not None:
            found.append(group)
    return tuple(found)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def plain(node: onnx.NodeProto, weights: Mapping[str, TensorProto]) -> bool:
    """A layer with constant float weights that we know how to slice and solve."""
    if node.op_type not in _LAYERS or node.domain not in ("", "ai.onnx") or len(node.input) < 2:
        return False
    weight = weights.get(node.input[1])
    if weight is None or weight.data_type != TensorProto.FLOAT or node.input[0] in weights:
        return False
    given = attributes(node)
    if node.op_type == "Conv":
        if given.get("group", 1) != 1 or given.get("auto_pad", b"NOTSET") not in (
            b"NOTSET",
            b"VALID",
        ):
            return False
    elif len(weight.dims) != 2:
        return False
    if node.op_type == "Gemm" and (
        given.get("transA", 0) or given.get("alpha", 1.0) != 1.0 or given.get("beta", 1.0) != 1.0
    ):
        return False
    if len(node.input) > 2 and node.input[2]:
        bias = weights.get(node.input[2])
        return bias is not None and list(bias.dims) == [weight.dims[out_axis(node)]]
    return True


def out_axis(node: onnx.NodeProto) -> int:
    """The axis of a layer's weight that is its outputs."""
    if node.op_type == "Conv":
        return 0
    return 0 if node.op_type == "Gemm" and attributes(node).get("transB", 0) else 1


def in_axis(node: onnx.NodeProto) -> int:
    """The axis of a layer's weight that is its inputs."""
    return 1 - out_axis(node)


def _made(node: onnx.NodeProto, weights: Mapping[str, TensorProto]) -> int | None:
    return int(weights[node.input[1]].dims[out_axis(node)]) if plain(node, weights) else None


def _trace(
    graph: onnx.GraphProto,
    weights: Mapping[str, TensorProto],
    users: Mapping[str, Sequence[int]],
    fixed: set[str],
    producer: int,
    width: int,
) -> Group | None:
    """Follow the channels a layer makes to every layer that reads them; None if something else does."""
    start = graph.node[producer]
    # Where a tensor's channels are: "image" second axis, "flat" second of two with values a channel, "last".
    where: dict[str, str] = {start.output[0]: "image" if start.op_type == "Conv" else "last"}
    slices: list[tuple[int, int, int]] = []
    depthwise: list[int] = []
    reshapes: list[tuple[int, int]] = []
    consumers: list[Consumer] = []
    passed: set[int] = set()
    queue = [start.output[0]]
    while queue:
        tensor = queue.pop()
        if tensor in fixed:
            return None
        place = where[tensor]
        for position in users.get(tensor, ()):
            node = graph.node[position]
            if position in passed:
                continue
            others = [
                (index, name)
                for index, name in enumerate(node.input)
                if name and name not in where and index != list(node.input).index(tensor)
            ]
            if node.op_type in _LAYERS and node.input[0] == tensor and plain(node, weights):
                block, rest = divmod(int(weights[node.input[1]].dims[in_axis(node)]), width)
                alone = list(node.input).count(tensor) == 1
                if rest or not alone or (node.op_type == "Conv") != (place == "image") or block < 1:
                    return None
                if block > 1 and place != "flat":
                    return None
                consumers.append(Consumer(position, tensor, block))
                passed.add(position)
                continue
            becomes: str | None = place
            if node.op_type in _CHANNELWISE:
                if any(name not in weights for _, name in others) or node.input[0] != tensor:
                    return None
            elif node.op_type in _BINARY:
                if any(name not in weights for _, name in others):
                    continue  # the other side may still be reached; what is not is found below
                for index, name in others:
                    axis = _channel_axis(list(weights[name].dims), place, width)
                    if axis is None:
                        return None
                    if axis >= 0:
                        slices.append((position, index, axis))
            elif node.op_type == "BatchNormalization" and place == "image" and node.input[0] == tensor:
                slices += [(position, index, 0) for index in range(1, 5)]
            elif node.op_type == "Conv" and place == "image" and node.input[0] == tensor:
                weight = weights.get(node.input[1])
                if (
                    weight is None
                    or attributes(node).get("group", 1) != width
                    or weight.dims[0] != width
                    or any(name not in weights for _, name in others)
                ):
                    return None
                slices += [(position, index, 0) for index in range(1, len(node.input)) if node.input[index]]
                depthwise.append(position)
            elif node.op_type == "Flatten" and place == "image" and attributes(node).get("axis", 1) == 1:
                becomes = "flat"
            elif node.op_type == "Reshape" and place == "image" and len(others) == 1:
                shape = weights.get(others[0][1])
                values = None if shape is None else array_of(shape).ravel()
                if values is None or len(values) != 2 or values[0] not in (-1, 0, 1):
                    return None
                if values[1] > 0:
                    if values[1] % width:
                        return None
                    reshapes.append((position, int(values[1]) // width))
                becomes = "flat"
            elif node.op_type == "ReduceMean" and place == "image":
                axes = _axes(node, weights)
                if axes is None or not axes or not axes <= {2, 3, -1, -2}:
                    return None
                becomes = (
                    "image" if attributes(node).get("keepdims", 1) else "flat" if len(axes) == 2 else None
                )
            else:
                return None
            if becomes is None:
                return None
            passed.add(position)
            where[node.output[0]] = becomes
            queue.append(node.output[0])
    for tensor in where:  # both sides of every Add and Mul have been reached
        if any(position not in passed for position in users.get(tensor, ())):
            return None
    if not consumers:
        return None
    return Group(
        producer=producer,
        name=start.name or start.output[0],
        width=width,
        slices=tuple(slices),
        depthwise=tuple(depthwise),
        reshapes=tuple(reshapes),
        consumers=tuple(consumers),
    )


def _channel_axis(dims: list[int], place: str, width: int) -> int | None:
    """The axis of a constant that has an entry per channel, -1 if it has none, None if unclear."""
    if math.prod(dims) == 1:
        return -1
    if place == "last" and dims[-1] == width:
        return len(dims) - 1
    if place == "image" and len(dims) >= 3:
        axis = len(dims) - 3  # of [.., C, H, W]
        if dims[axis] == width and math.prod(dims) == width:
            return axis
    return None


def _axes(node: onnx.NodeProto, weights: Mapping[str, TensorProto]) -> set[int] | None:
    if len(node.input) > 1 and node.input[1]:
        tensor = weights.get(node.input[1])
        return None if tensor is None else {int(axis) for axis in array_of(tensor).ravel()}
    found = attributes(node).get("axes")
    return None if found is None else {int(axis) for axis in found}


class Net:
    """A graph whose weights are replaced. Weights that were not are those of the original, not copies."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self._original = proto
        self._nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in proto.graph.node]
        self._weights = {tensor.name: tensor for tensor in proto.graph.initializer}
        self._readers: dict[str, int] = {}
        for node in self._nodes:
            for name in reads(node):
                self._readers[name] = self._readers.get(name, 0) + 1

    def node(self, position: int) -> onnx.NodeProto:
        """A node, to look at or to change."""
        found: onnx.NodeProto = self._nodes[position]
        return found

    def get(self, position: int, index: int) -> np.ndarray:
        """The constant that a node reads as its input ``index``."""
        values: np.ndarray = array_of(self._weights[self.node(position).input[index]])
        return values

    def take(self, position: int, index: int, axis: int, kept: np.ndarray) -> None:
        """Keep some entries of a constant."""
        self.set(position, index, np.take(self.get(position, index), kept, axis=axis))

    def set(self, position: int, index: int, values: np.ndarray) -> None:
        """Another constant for this node; other nodes that read the same keep what they had."""
        node = self.node(position)
        if index == len(node.input):
            node.input.append("")
        name = node.input[index]
        if not name or self._readers[name] > 1:
            if name:
                self._readers[name] -= 1
            name = unique(self._original.graph, f"{name or node.output[0]}_pruned")
            while name in self._weights:
                name += "_"
            self._readers[name] = 1
            node.input[index] = name
        self._weights[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)

    def proto(self, tensors: Sequence[str] | None = None) -> onnx.ModelProto:
        """The graph as it is now, or the part of it that makes ``tensors``."""
        graph = self._original.graph
        if tensors is not None:
            return _part(self._original, self._nodes, self._weights, tensors)
        used = set().union(*(reads(node) for node in self._nodes), (value.name for value in graph.output))
        whole = helper.make_graph(
            self._nodes,
            graph.name,
            graph.input,
            graph.output,
            [tensor for name, tensor in self._weights.items() if name in used],
            graph.doc_string,
            sparse_initializer=graph.sparse_initializer,
        )
        return _model(self._original, whole)


def cut(proto: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """The part of a graph that makes ``tensors``."""
    return _part(
        proto, proto.graph.node, {tensor.name: tensor for tensor in proto.graph.initializer}, tensors
    )


def _part(
    proto: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, TensorProto],
    tensors: Sequence[str],
) -> onnx.ModelProto:
    makers = {name: position for position, node in enumerate(nodes) for name in node.output}
    wanted, needed = list(tensors), set()
    names: set[str] = set(tensors)
    while wanted:
        position = makers.get(wanted.pop())
        if position is None or position in needed:
            continue
        needed.add(position)
        node = nodes[position]
        read = reads(node) | {value.name for body in subgraphs(node) for value in body.output}
        wanted += sorted(read)
        names |= read
    graph = proto.graph
    part = helper.make_graph(
        [nodes[position] for position in sorted(needed)],
        graph.name or "part",
        [value for value in graph.input if value.name in names],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in dict.fromkeys(tensors)],
        [tensor for name, tensor in weights.items() if name in names],
    )
    return _model(proto, part)


def _model(proto: onnx.ModelProto, graph: onnx.GraphProto) -> onnx.ModelProto:
    model = helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    model.functions.extend(proto.functions)
    model.producer_name, model.producer_version = proto.producer_name, proto.producer_version
    model.metadata_props.extend(proto.metadata_props)
    return model
