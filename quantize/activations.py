"""Activation functions in one piece: what exporters spell out in five nodes becomes one or two.

A tensor that a hard-swish or a Gelu reads twice is dequantized twice, and onnxruntime's own fusions no longer
see the pattern behind two DQ nodes. So it is put together before quantization; ``normalise`` proves it.

::

    x * clip(x + 3, 0, 6) / 6            Mul(x, HardSigmoid(x, 1/6, 1/2))
    x * (1 + erf(x / sqrt(2))) / 2       com.microsoft.Gelu(x)
    x * sigmoid(x)                       com.microsoft.QuickGelu(x, 1)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx
from onnx import helper

from quantize.graph import replace_nodes, unique
from quantize.weights import array_of

_MICROSOFT: Final = "com.microsoft"
_CLOSE: Final = 1e-4  # constants as exporters round them: 1.41421, 0.16667


def fuse(proto: onnx.ModelProto) -> int:
    """Put activation functions together; returns how many."""
    return _Fusion(proto.graph).run(proto)


class _Fusion:
    """One pass over one graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._nodes = list(graph.node)
        self._positions = {id(node): position for position, node in enumerate(self._nodes)}
        self._gone: dict[int, list[onnx.NodeProto]] = {}  # replaced nodes, and by what
        self._outputs = {value.name for value in graph.output}
        self._constants: Mapping[str, float] = {
            tensor.name: float(array_of(tensor).reshape(-1)[0])
            for tensor in graph.initializer
            if tensor.data_type == onnx.TensorProto.FLOAT and int(np.prod(tensor.dims)) == 1
        }
        self._producers = {name: node for node in self._nodes for name in node.output}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in self._nodes:
            for name in {*node.input}:
                self._users.setdefault(name, []).append(node)
            for attribute in node.attribute:  # what a subgraph reads is not touched
                for subgraph in (attribute.g, *attribute.graphs):
                    self._outputs.update(name for inner in subgraph.node for name in inner.input)

    def run(self, proto: onnx.ModelProto) -> int:
        patterns = {"Clip": self._hard_swish, "Erf": self._gelu, "Sigmoid": self._swish}
        changes = sum(patterns[node.op_type](node) for node in self._nodes if node.op_type in patterns)
        if not changes:
            return 0
        nodes = [new for node in self._nodes for new in self._gone.get(id(node), [node])]
        replace_nodes(self._graph, nodes)
        microsoft = any(node.domain == _MICROSOFT for node in nodes)
        if microsoft and not any(entry.domain == _MICROSOFT for entry in proto.opset_import):
            proto.opset_import.append(helper.make_opsetid(_MICROSOFT, 1))
        return changes

    def _hard_swish(self, clip: onnx.NodeProto) -> int:
        ends = [self._constants.get(name) for name in clip.input[1:3]]
        add = self._producers.get(clip.input[0])
        if ends != [0.0, 6.0] or add is None or add.op_type != "Add":
            return 0
        x = self._other(add, 3.0)
        if x is None or not self._only(add.output[0], clip):
            return 0
        product = self._next(clip, "Mul")
        if product is None or set(product.input) != {x, clip.output[0]}:
            return 0
        last = self._sixth(product)
        if last is None:
            return 0
        gate = unique(self._graph, f"{last.output[0]}_gate")
        made = [
            helper.make_node("HardSigmoid", [x], [gate], gate, alpha=1 / 6, beta=0.5),
            helper.make_node("Mul", [x, gate], list(last.output), last.name),
        ]
        return self._replace([add, clip, product, last], made)

    def _sixth(self, product: onnx.NodeProto) -> onnx.NodeProto | None:
        """The node that divides by six."""
        divided = self._next(product, "Div")
        if divided is not None:
            by = self._constants.get(divided.input[1], math.nan)
            return divided if math.isclose(by, 6.0, rel_tol=_CLOSE) else None
        scaled = self._next(product, "Mul")
        return scaled if scaled is not None and self._other(scaled, 1 / 6) == product.output[0] else None

    def _gelu(self, erf: onnx.NodeProto) -> int:
        scaled = self._producers.get(erf.input[0])
        if scaled is None or not self._only(scaled.output[0], erf):
            return 0
        if scaled.op_type == "Div" and math.isclose(
            self._constants.get(scaled.input[1], math.nan), math.sqrt(2), rel_tol=_CLOSE
        ):
            x: str | None = scaled.input[0]
        else:
            x = self._other(scaled, math.sqrt(0.5)) if scaled.op_type == "Mul" else None
        plus = self._next(erf, "Add")
        if x is None or plus is None or self._other(plus, 1.0) != erf.output[0]:
            return 0
        product = self._next(plus, "Mul")
        if product is None:
            return 0
        factor = next((name for name in product.input if name != plus.output[0]), None)
        halved = self._producers.get(factor or "")
        if factor == x:  # x * (1 + erf) * 0.5
            last = self._next(product, "Mul")
            if last is None or self._other(last, 0.5) != product.output[0]:
                return 0
            old = [scaled, erf, plus, product, last]
        elif halved is not None and halved.op_type == "Mul" and self._other(halved, 0.5) == x:
            if not self._only(halved.output[0], product):
                return 0
            last, old = product, [scaled, erf, plus, halved, product]  # (0.5 * x) * (1 + erf)
        else:
            return 0
        made = helper.make_node("Gelu", [x], list(last.output), last.name, domain=_MICROSOFT)
        return self._replace(old, [made])

    def _swish(self, sigmoid: onnx.NodeProto) -> int:
        x = sigmoid.input[0]
        product = self._next(sigmoid, "Mul")
        if product is None or set(product.input) != {x, sigmoid.output[0]}:
            return 0
        made = helper.make_node(
            "QuickGelu", [x], list(product.output), product.name, domain=_MICROSOFT, alpha=1.0
        )
        return self._replace([sigmoid, product], [made])

    def _other(self, node: onnx.NodeProto, constant: float) -> str | None:
        """The operand beside ``constant``, in any order."""
        for index in (0, 1):
            value = self._constants.get(node.input[index])
            if value is not None and math.isclose(value, constant, rel_tol=_CLOSE):
                return str(node.input[1 - index])
        return None

    def _only(self, name: str, reader: onnx.NodeProto) -> bool:
        users = self._users.get(name, [])
        return name not in self._outputs and len(users) == 1 and users[0] is reader

    def _next(self, node: onnx.NodeProto, kind: str) -> onnx.NodeProto | None:
        """The node of this kind that alone reads the result."""
        users = self._users.get(node.output[0], [])
        alone = node.output[0] not in self._outputs and len(users) == 1 and users[0].op_type == kind
        return users[0] if alone else None

    def _replace(self, old: list[onnx.NodeProto], made: list[onnx.NodeProto]) -> int:
        """Note that ``made`` stand where the last of ``old`` stood, where everything they read is there."""
        if any(id(node) in self._gone for node in old):
            return 0
        last = max(old, key=lambda node: self._positions[id(node)])
        self._gone.update({id(node): made if node is last else [] for node in old})
        return 1
