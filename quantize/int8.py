"""Step 4: write INT8 candidates, load and judge each, take the first inside the budget.

The static form is QDQ as ONNX Runtime fuses it on ARM64 (docs/quantize.md says why):

- only Conv, Gemm and MatMul with constant weights; everything else stays float;
- activations signed and asymmetric: after a Relu the zero point is -128 and the Relu disappears into it;
- weights signed and symmetric, one scale per output channel; bias int32 at (activation scale * weight scale);
- the output of the last dense layer stays float: nothing int8 reads it, and the score needs it precise.

Candidates, in order: static per channel, static per tensor, dynamic (MatMul, Gemm, LSTM), FP32. A candidate
that onnxruntime does not load, that is not smaller than FP32 or that is outside the budget is passed over,
and the report says which and why. Of the static ones, several headrooms are tried and the closest is taken.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from quantize import runtime
from quantize.calibrate import Range
from quantize.compare import Comparison
from quantize.config import Budget
from quantize.errors import BadModel
from quantize.prepare import PreparedModel, drop_unused

# The same numbers in another order: their range is the range of what they read, and no scale is needed twice.
_MOVES_DATA: Final = ("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "MaxPool", "Identity")
_ABSORBED: Final = ("Relu", "Clip")
_FEWEST_SCALES: Final = 1e-12  # a scale below this is a channel of nothing but zeros
_INT32_ROOM: Final = float(2**30)  # half of int32: the accumulator needs the other half


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a static candidate is written.

    ``headroom`` widens every range: what is beyond a range saturates, and rows outside the calibration data
    are what an anomaly model is for; too much of it costs precision in the middle. Evidence decides.
    """

    per_channel: bool
    headroom: float = 1.0
    signed_activations: bool = True

    @property
    def name(self) -> str:
        """For people and reports."""
        ranges = f", ranges x{self.headroom:g}" if self.headroom != 1.0 else ""
        return f"static int8, per {'channel' if self.per_channel else 'tensor'}{ranges}"


HEADROOMS: Final = (1.0, 1.5, 2.0, 3.0)
DYNAMIC: Final = "dynamic int8 (MatMul, Gemm, LSTM)"
FLOAT: Final = "fp32"


@dataclass(frozen=True, slots=True)
class Layer:
    """A node that can run in INT8, and the tensors around it."""

    node: int  # position in graph.node
    kind: str
    activation: str
    weight: str
    bias: str | None
    axis: int  # of the weight: its output channels
    result: str  # the tensor after an absorbed Relu or Clip


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes INT8. ``tensors`` maps every activation to quantize to the one whose range it has."""

    layers: tuple[Layer, ...]
    tensors: Mapping[str, str]

    @property
    def watched(self) -> tuple[str, ...]:
        """The tensors whose range calibration must find."""
        return tuple(sorted(set(self.tensors.values())))


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One candidate and what became of it."""

    name: str
    size: int | None = None  # bytes
    comparison: Comparison | None = None
    problem: str | None = None  # why it was passed over

    @property
    def sqnr(self) -> float:
        """How close it is, for choosing."""
        return -np.inf if self.comparison is None else self.comparison.sqnr


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Model:
    """The chosen model, written and loaded. ``precision`` is fp32 if no candidate was good enough."""

    path: Path
    name: str
    scheme: Scheme | None  # of a static one
    precision: str
    size: int  # bytes
    plan: Plan
    candidates: tuple[Candidate, ...]


def plan_of(proto: onnx.ModelProto) -> Plan:
    """Find the layers that can run in INT8 and the activations between them."""
    graph = proto.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    producers = {name: node for node in graph.node for name in node.output}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)

    layers = []
    for position, node in enumerate(graph.node):
        axis = _channel_axis(node, weights)
        if axis is None:
            continue
        result = node.output[0]
        following = users.get(result, [])
        if result not in outputs and len(following) == 1 and following[0].op_type in _ABSORBED:
            result = following[0].output[0]
        bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
        layers.append(Layer(position, node.op_type, node.input[0], node.input[1], bias, axis, result))

    tensors: dict[str, str] = {}
    for layer in layers:
        chain = [layer.activation]
        while (node := producers.get(chain[-1])) is not None and node.op_type in _MOVES_DATA:
            chain.append(node.input[0])
        tensors.update(dict.fromkeys(chain, chain[-1]))
    for layer in layers:
        if layer.kind == "Conv":  # only fuses with a quantized output
            tensors.setdefault(layer.result, layer.result)
    return Plan(tuple(layers), tensors)


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


# -- writing ----------------------------------------------------------------------------------------------


def write_static(
    proto: onnx.ModelProto, plan: Plan, ranges: Mapping[str, Range], scheme: Scheme
) -> onnx.ModelProto:
    """The QDQ form of ``proto``; ``proto`` itself is left as it is."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    writer = _Writer(result.graph, plan, ranges, scheme)
    writer.write()
    drop_unused(result.graph)
    onnx.checker.check_model(result)
    return result


class _Writer:
    """Inserts the Q/DQ pairs of one plan into one graph."""

    def __init__(
        self, graph: onnx.GraphProto, plan: Plan, ranges: Mapping[str, Range], scheme: Scheme
    ) -> None:
        self._graph, self._plan, self._scheme = graph, plan, scheme
        self._weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self._lowest = -128 if scheme.signed_activations else 0
        self._dtype = np.int8 if scheme.signed_activations else np.uint8
        self._scales = {tensor: self._scale_of(ranges[source]) for tensor, source in plan.tensors.items()}
        self._written: dict[tuple[str, int], tuple[str, np.ndarray]] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._taken = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
        self._taken.update(name for node in graph.node for name in (*node.input, *node.output))

    def write(self) -> None:
        graph = self._graph
        layers = {layer.node: layer for layer in self._plan.layers}
        int8_results = {layer.result for layer in self._plan.layers}
        produced_in_int8 = {name for name, source in self._plan.tensors.items() if source in int8_results}
        dequantized = {name: self._unique(f"{name}_dq") for name in self._plan.tensors}
        for value in graph.input:
            self._pair(value.name, dequantized)
        for position, node in enumerate(list(graph.node)):
            layer = layers.get(position)
            moves = node.op_type in _MOVES_DATA and node.output[0] in self._plan.tensors
            for index, name in enumerate(node.input):
                reads_int8 = index == 0 and (layer is not None or moves)
                # What int8 kernels made exists in int8 only; what float made, float nodes read as it was.
                if name in dequantized and (reads_int8 or name in produced_in_int8):
                    node.input[index] = dequantized[name]
            if layer is not None:
                self._layer(node, layer)
            self._nodes.append(node)
            for name in node.output:
                self._pair(name, dequantized)
        del graph.node[:]
        graph.node.extend(self._nodes)

    def _pair(self, tensor: str, dequantized: Mapping[str, str]) -> None:
        """Q and DQ of an activation, right after it is made."""
        if tensor not in dequantized:
            return
        scale, zero_point = self._scales[tensor]
        parameters = [
            self._constant(f"{tensor}_scale", np.float32(scale)),
            self._constant(f"{tensor}_zero_point", self._dtype(zero_point)),
        ]
        quantized = self._unique(f"{tensor}_q")
        self._nodes += [
            helper.make_node("QuantizeLinear", [tensor, *parameters], [quantized], quantized),
            helper.make_node(
                "DequantizeLinear", [quantized, *parameters], [dequantized[tensor]], dequantized[tensor]
            ),
        ]

    def _layer(self, node: onnx.NodeProto, layer: Layer) -> None:
        """Weight and bias of a layer as DQ of int8 and int32 constants."""
        activation_scale = float(self._scales[layer.activation][0])
        name, scale = self._weight(layer, activation_scale)
        node.input[1] = name
        if layer.bias is None:
            return
        bias_scale = (scale.astype(np.float64) * activation_scale).astype(np.float32)
        values = np.rint(self._weights[layer.bias].astype(np.float64) / bias_scale).astype(np.int32)
        per_channel = scale.ndim == 1
        node.input[2] = self._dequantize(
            f"{layer.result}_bias", values, bias_scale, None, 0 if per_channel else None
        )

    def _weight(self, layer: Layer, activation_scale: float) -> tuple[str, np.ndarray]:
        key = (layer.weight, layer.axis)
        if layer.bias is None and key in self._written:
            return self._written[key]
        values = self._weights[layer.weight].astype(np.float64)
        others = tuple(axis for axis in range(values.ndim) if axis != layer.axis)
        largest = np.abs(values).max(axis=others) if self._scheme.per_channel else np.abs(values).max()
        scale = np.maximum(largest / 127, _FEWEST_SCALES)
        if layer.bias is not None:
            # A large bias on a channel of small weights would not fit int32 at its scale.
            bias = np.abs(self._weights[layer.bias].astype(np.float64))
            bias = bias if self._scheme.per_channel else bias.max()
            scale = np.maximum(scale, bias / (activation_scale * _INT32_ROOM))
        scale = np.asarray(scale, np.float32)
        shape = [-1 if axis == layer.axis else 1 for axis in range(values.ndim)]
        spread = scale.reshape(shape) if scale.ndim else scale
        quantized = np.clip(np.rint(values / spread), -127, 127).astype(np.int8)
        zero_point = np.zeros_like(scale, np.int8)
        axis = layer.axis if scale.ndim else None
        name = self._dequantize(layer.weight, quantized, scale, zero_point, axis)
        self._written[key] = (name, scale)
        return name, scale

    def _dequantize(
        self,
        name: str,
        values: np.ndarray,
        scale: np.ndarray,
        zero_point: np.ndarray | None,
        axis: int | None,
    ) -> str:
        inputs = [self._constant(f"{name}_q", values), self._constant(f"{name}_scale", scale)]
        if zero_point is not None:  # int32 has none but 0, which need not be stored
            inputs.append(self._constant(f"{name}_zero_point", zero_point))
        output = self._unique(f"{name}_dq")
        node = helper.make_node("DequantizeLinear", inputs, [output], output)
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        self._nodes.append(node)
        return output

    def _unique(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name

    def _constant(self, name: str, values: np.ndarray | np.generic) -> str:
        name = self._unique(name)
        self._graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def _scale_of(self, found: Range) -> tuple[np.float32, int]:
        """Scale and zero point; zero is always representable, or padding and Relu would be off."""
        headroom = self._scheme.headroom
        low, high = min(found.low, 0.0) * headroom, max(found.high, 0.0) * headroom
        scale = np.float32((high - low) / 255 or 1.0)
        zero_point = round(self._lowest - low / float(scale))
        return scale, int(np.clip(zero_point, self._lowest, self._lowest + 255))


def write_dynamic(proto: onnx.ModelProto, target: Path) -> None:
    """Weights int8, activations quantized while running; no Conv: ConvInteger is slower than float."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it logs advice about pre-processing through the root logger
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantize_dynamic(
                proto, target, op_types_to_quantize=["MatMul", "Gemm", "LSTM"], weight_type=QuantType.QInt8
            )
    finally:
        root.setLevel(level)


# -- choosing ---------------------------------------------------------------------------------------------


def to_int8(
    model: PreparedModel,
    plan: Plan,
    ranges: Mapping[str, Range],
    judge: Callable[[Path], Comparison],
    budget: Budget,
    folder: Path,
) -> Int8Model:
    """Write candidates into ``folder`` until one is loaded, smaller and inside the budget.

    Args:
        model: the FP32 reference.
        plan: what can be INT8.
        ranges: of ``plan.watched``.
        judge: compares a written file with the reference on rows kept for choosing.
        budget: how far it may be off.
        folder: where candidates are written.
    """
    float_path = folder / "fp32.onnx"
    onnx.save(model.proto, float_path)
    float_size = float_path.stat().st_size
    tried: list[Candidate] = []

    def attempt(name: str, write: Callable[[Path], None], scheme: Scheme | None) -> Int8Model | None:
        path = folder / f"candidate{len(tried)}.onnx"
        try:
            write(path)
            size = path.stat().st_size
            comparison = judge(path)
        except OSError:
            raise
        except Exception as error:  # of onnx, onnxruntime or their quantizer: the next candidate is tried
            tried.append(Candidate(name=name, problem=runtime.one_line(error)))
            return None
        problem = None
        if size >= float_size:
            problem = f"not smaller than FP32 ({size} of {float_size} bytes)"
        elif not comparison.inside(budget):
            problem = f"outside the budget: {comparison.verdict()}"
        tried.append(Candidate(name=name, size=size, comparison=comparison, problem=problem))
        if problem:
            return None
        return Int8Model(
            path=path,
            name=name,
            scheme=scheme,
            precision="int8",
            size=size,
            plan=plan,
            candidates=tuple(tried),
        )

    def write(scheme: Scheme) -> Callable[[Path], None]:
        return lambda path: onnx.save(write_static(model.proto, plan, ranges, scheme), path)

    for per_channel in (True, False) if plan.layers else ():
        inside = []
        for headroom in HEADROOMS:
            scheme = Scheme(per_channel, headroom)
            if found := attempt(scheme.name, write(scheme), scheme):
                inside.append((tried[-1].sqnr, found))
        if inside:
            # The narrowest range of the closest: max() takes the first of equals.
            return replace(max(inside, key=lambda item: item[0])[1], candidates=tuple(tried))
    dense = any(node.op_type in ("MatMul", "Gemm", "LSTM") for node in model.proto.graph.node)
    if dense and (chosen := attempt(DYNAMIC, lambda path: write_dynamic(model.proto, path), None)):
        return chosen
    comparison = judge(float_path)
    if comparison.sqnr < 0:
        raise BadModel("the FP32 model itself gives outputs that are not finite on the calibration rows")
    tried.append(Candidate(name=FLOAT, size=float_size, comparison=comparison))
    return Int8Model(
        path=float_path,
        name=FLOAT,
        scheme=None,
        precision="fp32",
        size=float_size,
        plan=plan,
        candidates=tuple(tried),
    )
