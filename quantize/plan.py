"""Which nodes of a graph can have INT8 weights, in which forms, and who makes and reads their tensors.

Invariant: a layer of a ``Plan`` has at least one form besides float, and its weights are constant float32.

Four forms (``Mode``); ``int8`` writes them. What can compute in INT8 is Conv, Gemm and MatMul (static), and
MatMul, Gemm and LSTM (dynamic). Weights of all of them, and of ConvTranspose, GRU and RNN, can be *stored* as
INT8 and computed with in float: a quarter of the file at the speed of FP32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper

from edge_agent.contract.bundle import FOLDED_AT_MOST
from quantize.calibrate import Range
from quantize.weights import array_of

# The same numbers in another order: their range is the range of what they read, and no scale is needed twice.
MOVES_DATA: Final = (
    "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "MaxPool", "Identity", "Slice", "Expand",
)  # fmt: skip
# INT8 kernels exist for these; they are used where all inputs are INT8 anyway and the result becomes it.
JOINS: Final = ("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool")
RECURRENT: Final = ("LSTM", "GRU", "RNN")
_SMALLEST_TABLE: Final = 1 << 14  # numbers; smaller ones are not worth two more nodes
_SMALLEST_STORED: Final = 1 << 8  # numbers: two nodes, their names and scales take some hundred bytes


class Mode(StrEnum):
    """The form of a layer."""

    FLOAT = "fp32"
    STATIC = "static"
    DYNAMIC = "dynamic"
    STORED = "stored"  # INT8 in the file, float when it runs


@dataclass(frozen=True, slots=True)
class Layer:
    """A node that can run in INT8, and the tensors around it."""

    node: int  # position in graph.node
    name: str
    kind: str
    activation: str
    weight: str
    bias: str | None
    axis: int  # of the weight: its output channels
    result: str  # the tensor after an absorbed Relu or Clip
    modes: tuple[Mode, ...]  # the forms it can have besides float, the one to try first in front
    parameters: int  # weights, without bias


@dataclass(frozen=True, slots=True)
class Plan:
    """What can become INT8. ``bounds`` are values that a tensor cannot leave, by what makes it."""

    layers: tuple[Layer, ...]
    watched: tuple[str, ...]  # the tensors whose range calibration must find
    bounds: Mapping[str, tuple[float, float]]

    def all_int8(self) -> dict[int, Mode]:
        """Every layer in the form to try first."""
        return {layer.node: layer.modes[0] for layer in self.layers}

    def limited_to(self, ranges: Mapping[str, Range]) -> Plan:
        """The plan without static forms that lack a range: tensors of integers, or never of any size."""
        kept = []
        for layer in self.layers:
            known = layer.activation in ranges and (layer.kind != "Conv" or layer.result in ranges)
            known = known or layer.kind == "Gather"
            modes = tuple(mode for mode in layer.modes if mode is not Mode.STATIC or known)
            if modes:
                kept.append(replace(layer, modes=modes))
        return replace(self, layers=tuple(kept))

    def dynamic(self, other: Mode = Mode.STORED) -> dict[int, Mode]:
        """Every layer that has a dynamic form in it, tables in INT8, the rest stored or in float."""
        rest = self.resting(other)
        return {
            layer.node: Mode.DYNAMIC if Mode.DYNAMIC in layer.modes else rest[layer.node]
            for layer in self.layers
        }

    def resting(self, wanted: Mode = Mode.STORED) -> dict[int, Mode]:
        """Nothing computed in INT8: every layer stored if that is wanted and it can be, tables in INT8."""
        return {
            layer.node: Mode.STATIC
            if layer.kind == "Gather"
            else wanted
            if wanted in layer.modes
            else Mode.FLOAT
            for layer in self.layers
        }


def plan_of(proto: onnx.ModelProto) -> Plan:
    """Find the layers that can run in INT8 and the tensors whose range that may take."""
    wiring = Wiring(proto.graph)
    layers = tuple(
        layer
        for position, node in enumerate(proto.graph.node)
        if (layer := _layer_of(position, node, wiring)) is not None
    )
    # Which of them are needed depends on the forms chosen later: all that may be are watched in one pass.
    watched: set[str] = set()
    for layer in layers:
        if Mode.STATIC not in layer.modes or layer.kind == "Gather":
            continue
        watched.add(layer.activation)
        watched.update(wiring.sources(layer.activation))
        watched.add(layer.result)
    for node in proto.graph.node:
        if node.op_type in JOINS:
            watched.add(wiring.result(node))
    return Plan(layers, tuple(sorted(watched - set(wiring.weights))), wiring.bounds())


class Wiring:
    """Who makes and who reads the tensors of one graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        self.inputs = {value.name for value in graph.input}
        self.producers = {name: node for node in graph.node for name in node.output if name}
        self.users: dict[str, list[onnx.NodeProto]] = {}
        self.positions = {id(node): position for position, node in enumerate(graph.node)}
        for node in graph.node:
            for name in {*node.input, *_read_inside(node)}:
                if name:
                    self.users.setdefault(name, []).append(node)

    def result(self, node: onnx.NodeProto) -> str:
        """The tensor after this node, or after the Relu or Clip that its INT8 form absorbs."""
        name: str = node.output[0]
        following = self.users.get(name, [])
        if name in self.outputs or len(following) != 1:
            return name
        after = following[0]
        if after.op_type == "Relu" or (after.op_type == "Clip" and self._clip(after)[0] == 0.0):
            return str(after.output[0])
        return name

    def clipped(self, name: str) -> str | None:
        """What a Relu or Clip makes of this tensor, if nothing else reads it: a Q after it may replace it."""
        following = self.users.get(name, [])
        if name in self.outputs or len(following) != 1 or following[0].op_type not in ("Relu", "Clip"):
            return None
        return str(following[0].output[0])

    def _clip(self, node: onnx.NodeProto) -> tuple[float, float]:
        ends = [-np.inf, np.inf]
        for index in (1, 2):
            if len(node.input) > index and node.input[index]:
                tensor = self.weights.get(node.input[index])
                if tensor is not None:
                    ends[index - 1] = float(array_of(tensor).reshape(-1)[0])
        return ends[0], ends[1]

    def sources(self, tensor: str) -> list[str]:
        """What ``tensor`` was before data was moved, nearest first."""
        found = []
        while (node := self.producers.get(tensor)) is not None and node.op_type in MOVES_DATA:
            if len([name for name in node.output if name]) > 1 or node.input[0] in self.weights:
                break
            tensor = node.input[0]
            found.append(tensor)
        return found

    def bounds(self) -> dict[str, tuple[float, float]]:
        """The values that activation functions cannot leave."""
        found = {}
        for node in self.graph.node:
            if node.op_type in ("Relu", "Sqrt", "Abs", "Exp"):
                found[node.output[0]] = (0.0, np.inf)
            elif node.op_type in ("Sigmoid", "HardSigmoid", "Softmax"):
                found[node.output[0]] = (0.0, 1.0)
            elif node.op_type == "Tanh":
                found[node.output[0]] = (-1.0, 1.0)
            elif node.op_type == "Clip":
                found[node.output[0]] = self._clip(node)
        return found


def _read_inside(node: onnx.NodeProto) -> set[str]:
    names: set[str] = set()
    for attribute in node.attribute:
        for subgraph in (attribute.g, *attribute.graphs):
            for inner in subgraph.node:
                names.update(inner.input)
                names |= _read_inside(inner)
            names.update(value.name for value in subgraph.output)
    return names


def _layer_of(position: int, node: onnx.NodeProto, wiring: Wiring) -> Layer | None:
    weights = wiring.weights
    modes: tuple[Mode, ...]
    if node.op_type == "Gather":
        if not _is_table(node, weights):
            return None
        name = node.output[0]
        table = node.input[0]
        size = int(np.prod(weights[table].dims))
        modes = (Mode.STATIC,)
        return Layer(position, node.name or name, "Gather", node.input[1], table, None, 0, name, modes, size)
    if node.op_type in RECURRENT:
        if not _has_constant_weights(node, weights):
            return None
        axis, result = 1, node.output[0]
        parameters = sum(int(np.prod(weights[node.input[index]].dims)) for index in (1, 2))
        modes = (Mode.DYNAMIC,) if _can_be_dynamic(node) else ()
    elif node.op_type == "ConvTranspose":
        weight = weights.get(node.input[1])
        if weight is None or weight.data_type != TensorProto.FLOAT or node.domain not in ("", "ai.onnx"):
            return None
        axis, result, modes = 1, node.output[0], ()
        parameters = int(np.prod(weight.dims))
    else:
        found = _channel_axis(node, weights)
        if found is None:
            return None
        axis, result = found, wiring.result(node)
        parameters = int(np.prod(weights[node.input[1]].dims))
        modes = (Mode.STATIC,) if node.op_type == "Conv" else (Mode.STATIC, Mode.DYNAMIC)
    # A device would compute larger ones anew for every row.
    if _SMALLEST_STORED <= parameters <= FOLDED_AT_MOST // 4:
        modes = (*modes, Mode.STORED)
    if not modes:
        return None
    bias = None
    if node.op_type not in RECURRENT and len(node.input) > 2 and node.input[2]:
        bias = node.input[2]
    return Layer(
        position,
        node.name or node.output[0] or f"{node.op_type} {position}",
        node.op_type,
        node.input[0],
        node.input[1],
        bias,
        axis,
        result,
        modes,
        parameters,
    )


def _is_table(node: onnx.NodeProto, weights: Mapping[str, TensorProto]) -> bool:
    """An embedding: rows of a table of floats, picked by numbers that are not constant."""
    table = weights.get(node.input[0])
    if table is None or table.data_type != TensorProto.FLOAT or node.input[1] in weights:
        return False
    first = all(item.name != "axis" or item.i == 0 for item in node.attribute)
    return first and len(table.dims) == 2 and int(np.prod(table.dims)) >= _SMALLEST_TABLE


def _has_constant_weights(node: onnx.NodeProto, weights: Mapping[str, TensorProto]) -> bool:
    return node.domain in ("", "ai.onnx") and all(
        name in weights and weights[name].data_type == TensorProto.FLOAT for name in node.input[1:3]
    )


def _can_be_dynamic(node: onnx.NodeProto) -> bool:
    """Only the LSTM has a dynamic kernel, and that takes the sequence in front."""
    return node.op_type == "LSTM" and not any(
        item.name == "layout" and item.i != 0 for item in node.attribute
    )


def _channel_axis(node: onnx.NodeProto, weights: Mapping[str, TensorProto]) -> int | None:
    """The axis of the output channels if this node can run in INT8, else None."""
    if node.op_type not in ("Conv", "Gemm", "MatMul") or node.domain not in ("", "ai.onnx"):
        return None
    weight = weights.get(node.input[1])
    if weight is None or weight.data_type != TensorProto.FLOAT or node.input[0] in weights:
        return None
    if len(node.input) > 2 and node.input[2]:
        bias = weights.get(node.input[2])
        if bias is None or len(bias.dims) != 1:
            return None
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    if node.op_type == "Conv":
        return 0
    if node.op_type == "MatMul":
        return 1 if len(weight.dims) == 2 else None
    if (
        attributes.get("transA", 0)
        or attributes.get("alpha", 1.0) != 1.0
        or attributes.get("beta", 1.0) != 1.0
    ):
        return None
    columns = weight.dims[0 if attributes.get("transB", 0) else 1]
    if len(node.input) > 2 and node.input[2] and weights[node.input[2]].dims[0] != columns:
        return None
    return 0 if attributes.get("transB", 0) else 1
