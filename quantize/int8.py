"""Step 4a: the INT8 form of a graph.

The static form is QDQ as ONNX Runtime fuses it on ARM64 (docs/quantize.md says why):

- Conv, Gemm and MatMul with constant weights; what moves data or pools or adds between two INT8 neighbours
  goes along, everything else stays float;
- activations signed and asymmetric: after a Relu the zero point is -128 and the Relu disappears into it;
- weights signed and symmetric, one scale per output channel unless told otherwise; bias int32 at
  (activation scale * weight scale);
- a dense layer that nothing INT8 reads gives float: no rounding where none is needed;
- a MaxPool is INT8 behind an INT8 convolution only.

The dynamic form (MatMul, Gemm, LSTM) quantizes activations while running; weights are as in the static one.
Conv has none: ConvInteger is slower than float on every CPU that was measured.

The stored form keeps INT8 weights in the file and computes in float: Cast and Mul of constants, which
onnxruntime folds when it loads the file. (It does not fold a DequantizeLinear of constants, and would undo it
again in every run.) The device then runs what it would run in FP32, at the same speed and in the same memory.

A ``Recipe`` says which node has which form and every number that is in the file: the same recipe for the same
graph gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge_agent.contract.bundle import ROWS_APART, ROWS_KEY
from quantize.calibrate import Range
from quantize.compare import Comparison
from quantize.graph import drop_unused, share_equal
from quantize.plan import JOINS, MOVES_DATA, RECURRENT, Layer, Mode, Plan, Wiring
from quantize.weights import array_of, check

_FEWEST_SCALES: Final = 1e-12  # a scale below this is a channel of nothing but zeros
_INT32_ROOM: Final = float(2**30)  # half of int32: the accumulator needs the other half
_TAKEN_FOR_INT8: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul")
MICROSOFT: Final = "com.microsoft"


@dataclass(frozen=True, slots=True)
class Rounded:
    """The INT8 weights of one layer, where they are not simply the nearest ones."""

    values: np.ndarray  # int8, of the weight's shape
    scale: np.ndarray  # float32, () or (channels,)
    bias: np.ndarray | None  # float32, (channels,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides the bytes of an INT8 file, besides the graph it is made of."""

    modes: Mapping[int, Mode]
    ranges: Mapping[str, Range]
    per_tensor: frozenset[int] = frozenset()  # layers with one scale for all weights
    rounded: Mapping[int, Rounded] = field(default_factory=dict)
    signed: bool = True  # activations; the unsigned twin is what x86 has fast kernels for

    def count(self, mode: Mode) -> int:
        """How many layers have this form."""
        return sum(found is mode for found in self.modes.values())

    def twin(self) -> Recipe:
        """The same work with unsigned activations: for timing on x86."""
        return replace(self, signed=False)


# -- weights ----------------------------------------------------------------------------------------------


def weight_scale(values: np.ndarray, axis: int | None) -> np.ndarray:
    """The scale that holds the largest weight: (channels,) along ``axis``, or () for None; float32."""
    if axis is None:
        largest = np.abs(values).max(initial=0.0)
    else:
        others = tuple(other for other in range(values.ndim) if other != axis)
        largest = np.abs(values).max(axis=others, initial=0.0)
    return np.asarray(np.maximum(largest / 127, _FEWEST_SCALES), np.float32)


def along(scale: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """A scale in the shape that multiplies weights of ``rank`` dimensions."""
    return scale if scale.ndim == 0 else scale.reshape([-1 if other == axis else 1 for other in range(rank)])


def nearest(values: np.ndarray, scale: np.ndarray, axis: int) -> np.ndarray:
    """The nearest INT8 weights, -127 to 127."""
    spread = along(scale, axis, values.ndim).astype(np.float64)
    return np.asarray(np.clip(np.rint(values / spread), -127, 127).astype(np.int8))


def scale_of(found: Range, bound: tuple[float, float], lowest: int) -> tuple[np.float32, int]:
    """Scale and zero point of an activation; zero is always exact, or padding and Relu would be off.

    Where the range ends at a bound of the tensor the last step does not lie beyond it: only then does
    onnxruntime see that a Clip does nothing and removes it.
    """
    kept = found.within(*bound)
    low, high = min(kept.low, 0.0), max(kept.high, 0.0)
    scale = np.float32((high - low) / 255 or 1.0)
    if low == 0.0:
        while float(scale) * 255 > high > 0:
            scale = np.nextafter(scale, np.float32(0))
    scale = max(scale, np.float32(1e-30))
    zero_point = round(lowest - low / float(scale))
    return scale, int(np.clip(zero_point, lowest, lowest + 255))


# -- writing ----------------------------------------------------------------------------------------------


def write_int8(proto: onnx.ModelProto, plan: Plan, recipe: Recipe) -> onnx.ModelProto:
    """The INT8 form of ``proto``; ``proto`` itself is left as it is."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    microsoft = write_graph(result.graph, plan, recipe)
    share_equal(result.graph)
    if microsoft and not any(entry.domain == MICROSOFT for entry in result.opset_import):
        result.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    if recipe.count(Mode.DYNAMIC):
        # One scale for all rows of a run: an outlier would coarsen the answers of its neighbours.
        result.metadata_props.add(key=ROWS_KEY, value=ROWS_APART)
    check(result)
    return result


def write_graph(graph: onnx.GraphProto, plan: Plan, recipe: Recipe) -> bool:
    """Give ``graph`` its INT8 form in place; returns whether it uses operators of ``MICROSOFT``."""
    writer = _Writer(graph, plan, recipe)
    writer.write()
    drop_unused(graph)
    return writer.microsoft


class _Writer:
    """Turns the layers of one graph into the forms of one recipe."""

    def __init__(self, graph: onnx.GraphProto, plan: Plan, recipe: Recipe) -> None:
        self._graph, self._plan, self._recipe = graph, plan, recipe
        self._wiring = Wiring(graph)
        int8 = [layer for layer in plan.layers if recipe.modes.get(layer.node) is Mode.STATIC]
        self._static = {layer.node: layer for layer in int8 if layer.kind != "Gather"}
        self._tables = {layer.node: layer for layer in int8 if layer.kind == "Gather"}
        self._dynamic = {
            layer.node: layer for layer in plan.layers if recipe.modes.get(layer.node) is Mode.DYNAMIC
        }
        self._stored = {
            layer.node: layer for layer in plan.layers if recipe.modes.get(layer.node) is Mode.STORED
        }
        self._sources, self._made = self._tensors()
        self._lowest = -128 if recipe.signed else 0
        self._dtype = np.int8 if recipe.signed else np.uint8
        unbounded = (-np.inf, np.inf)
        self._scales = {
            tensor: scale_of(recipe.ranges[source], plan.bounds.get(source, unbounded), self._lowest)
            for tensor, source in self._sources.items()
        }
        self._written: dict[tuple[str, int, bool], tuple[str, np.ndarray]] = {}
        self._unfolded: dict[tuple[str, int], str] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._taken = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
        self._taken.update(name for node in graph.node for name in (*node.input, *node.output))
        self.microsoft = bool(self._dynamic)
        self._guarded = self._between_int8()

    def _between_int8(self) -> set[str]:
        """The results of float nodes that onnxruntime would make INT8 by itself.

        It quantizes the weights of any Conv or Gemm between a DQ and a Q (its WeightBiasQuantization), and a
        layer that is float for its accuracy would be so in the file only; it moves a Q to the other side of
        a MaxPool. A Max with the lowest number keeps the two apart.
        """
        found = {
            node.output[0]
            for node in self._graph.node
            if node.op_type == "MaxPool"
            and node.output[0] in self._sources
            and node.input[0] not in self._sources
        }
        for position, node in enumerate(self._graph.node):
            if (
                node.op_type in _TAKEN_FOR_INT8
                and position not in self._static
                and position not in self._dynamic
            ):
                result = node.output[0]
                while result not in self._sources and self._wiring.clipped(result) is not None:
                    result = str(self._wiring.clipped(result))
                if node.input[0] in self._made and result in self._sources:
                    found.add(result)
        return found

    # Which tensors are INT8: those that INT8 layers read, back to where data was last computed; what
    # convolutions make (they only fuse with a quantized result); and what joins make between those.

    def _tensors(self) -> tuple[dict[str, str], set[str]]:
        """Every tensor to quantize with the one whose range it has, and those that exist in INT8 only."""
        banned: set[int] = set()
        while True:
            sources = self._layer_tensors()
            joins = self._join_tensors(sources, banned)
            made = self._int8_made(sources, joins)
            late = {
                position
                for position, node in joins.items()
                if not all(name in made for name in node.input if name not in self._wiring.weights)
            }
            if not late:
                return sources, made
            banned |= late

    def _layer_tensors(self) -> dict[str, str]:
        sources: dict[str, str] = {}
        for layer in self._static.values():
            chain = [layer.activation]
            for source in self._wiring.sources(layer.activation):
                if source not in self._recipe.ranges or not self._read_by_int8_only(chain[-1]):
                    break  # a float node reads it too, and shall read what float made
                if self._wiring.producers[chain[-1]].op_type == "MaxPool" and not self._from_int8(source):
                    break
                chain.append(source)
            sources.update(dict.fromkeys(chain, chain[-1]))
        for layer in self._static.values():
            if layer.kind == "Conv":
                sources.setdefault(layer.result, layer.result)
        return sources

    def _from_int8(self, tensor: str) -> bool:
        """Whether an INT8 convolution made it, perhaps with an activation function behind.

        There MaxPool has the layout that its INT8 kernel is fast in. After float layers it has not, takes
        thirty times as long as in float, and what it makes is less to quantize than what it reads.
        """
        wiring = self._wiring
        while (node := wiring.producers.get(tensor)) is not None:
            if wiring.positions[id(node)] in self._static:
                return bool(node.op_type == "Conv")
            inputs = [name for name in node.input if name and name not in wiring.weights]
            if len(inputs) != 1:
                return bool(node.op_type in JOINS)
            tensor = inputs[0]
        return False

    def _read_by_int8_only(self, tensor: str) -> bool:
        wiring = self._wiring
        if tensor in wiring.outputs:
            return False
        for node in wiring.users.get(tensor, []):
            layer = self._static.get(wiring.positions[id(node)])
            if layer is not None and layer.activation == tensor:
                continue
            moves = node.op_type in MOVES_DATA and node.input[0] == tensor
            if not moves or not self._read_by_int8_only(node.output[0]):
                return False
        return bool(wiring.users.get(tensor))

    def _join_tensors(self, sources: dict[str, str], banned: set[int]) -> dict[int, onnx.NodeProto]:
        """Joins whose result is quantized, or is only read by such joins; the latter enter ``sources``."""
        wiring, found = self._wiring, {}
        for position in range(len(self._graph.node) - 1, -1, -1):
            node = self._graph.node[position]
            if (
                node.op_type not in JOINS
                or position in banned
                or any(n in wiring.weights for n in node.input)
            ):
                continue
            result = wiring.result(node)
            if result not in self._recipe.ranges or result in wiring.outputs:
                continue
            users = wiring.users.get(result, [])
            if result not in sources:
                if not users or not all(wiring.positions[id(user)] in found for user in users):
                    continue
                sources[result] = result
            found[position] = node
        return found

    def _int8_made(self, sources: Mapping[str, str], joins: Mapping[int, onnx.NodeProto]) -> set[str]:
        made = {layer.result for layer in self._static.values() if layer.result in sources}
        for position, node in enumerate(self._graph.node):
            moves = node.op_type in MOVES_DATA and node.output[0] in sources and node.input[0] in sources
            if moves and sources[node.output[0]] == sources[node.input[0]]:
                made.add(node.output[0])
            elif position in joins:
                result = self._wiring.result(node)
                if all(name in made for name in node.input):
                    made.add(result)
        return made

    def write(self) -> None:
        graph = self._graph
        # Whoever reads a graph output reads what INT8 gives: one number, not two that differ.
        given = self._made & self._wiring.outputs
        dequantized = {name: name if name in given else self._unique(f"{name}_dq") for name in self._sources}
        for value in graph.input:
            self._pair(value.name, value.name, dequantized)
        for position, node in enumerate(list(graph.node)):
            layer = self._static.get(position)
            moves = node.op_type in MOVES_DATA and self._sources.get(node.output[0], "") == self._sources.get(
                node.input[0], "-"
            )
            for index, name in enumerate(node.input):
                reads_int8 = index == 0 and (layer is not None or moves)
                # What INT8 kernels made exists in INT8 only; what float made, float nodes read as it was.
                if name in dequantized and (reads_int8 or name in self._made):
                    node.input[index] = dequantized[name]
            if layer is not None:
                self._layer(node, layer)
            elif position in self._tables:
                node = self._table(node, self._tables[position])  # noqa: PLW2901
            elif position in self._dynamic:
                node = self._dynamic_node(node, self._dynamic[position])  # noqa: PLW2901
            elif position in self._stored:
                self._store(node, self._stored[position])
            self._nodes.append(node)
            for index, name in enumerate(node.output):
                if dequantized.get(name) == name:
                    node.output[index] = self._unique(f"{name}_float")
                    self._pair(node.output[index], name, dequantized)
                else:
                    self._pair(name, name, dequantized)
        del graph.node[:]
        graph.node.extend(self._nodes)

    def _pair(self, given: str, tensor: str, dequantized: Mapping[str, str]) -> None:
        """Q and DQ of an activation, right after it is made."""
        if tensor not in dequantized:
            return
        if tensor in self._guarded:
            lowest = self._constant(f"{tensor}_lowest", np.float32(np.finfo(np.float32).min))
            kept = self._unique(f"{tensor}_kept")
            self._nodes.append(helper.make_node("Max", [given, lowest], [kept], kept))
            given = kept
        scale, zero_point = self._scales[tensor]
        parameters = [
            self._constant(f"{tensor}_scale", np.float32(scale)),
            self._constant(f"{tensor}_zero_point", self._dtype(zero_point)),
        ]
        quantized = self._unique(f"{tensor}_q")
        self._nodes += [
            helper.make_node("QuantizeLinear", [given, *parameters], [quantized], quantized),
            helper.make_node(
                "DequantizeLinear", [quantized, *parameters], [dequantized[tensor]], f"{tensor}_dq"
            ),
        ]

    def _array(self, name: str) -> np.ndarray:
        return np.asarray(array_of(self._wiring.weights[name]), np.float64)

    def _layer(self, node: onnx.NodeProto, layer: Layer) -> None:
        """Weight and bias of a static layer as DQ of int8 and int32 constants."""
        activation_scale = float(self._scales[layer.activation][0])
        rounded = self._recipe.rounded.get(layer.node)
        name, scale = self._weight(layer, activation_scale)
        node.input[1] = name
        bias = None if rounded is None else rounded.bias
        if bias is None and layer.bias is not None:
            bias = self._array(layer.bias)
        if bias is None or layer.kind == "MatMul":
            return
        bias_scale = (scale.astype(np.float64) * activation_scale).astype(np.float32)
        bounded = np.clip(np.rint(bias.astype(np.float64) / bias_scale), -_INT32_ROOM, _INT32_ROOM)
        axis = 0 if scale.ndim else None
        made = self._dequantize(f"{layer.result}_bias", bounded.astype(np.int32), bias_scale, None, axis)
        if len(node.input) > 2:
            node.input[2] = made
        else:
            node.input.append(made)

    def _weight(self, layer: Layer, activation_scale: float) -> tuple[str, np.ndarray]:
        rounded = self._recipe.rounded.get(layer.node)
        per_tensor = layer.node in self._recipe.per_tensor
        key = (layer.weight, layer.axis, per_tensor)
        if layer.bias is None and rounded is None and key in self._written:
            return self._written[key]
        values = self._array(layer.weight)
        if rounded is not None:
            scale, quantized = rounded.scale, rounded.values
        else:
            scale = weight_scale(values, None if per_tensor else layer.axis)
            if layer.bias is not None:
                # A large bias on a channel of small weights would not fit int32 at its scale.
                bias = np.abs(self._array(layer.bias))
                bias = bias.max(initial=0.0) if per_tensor else bias
                scale = np.asarray(np.maximum(scale, bias / (activation_scale * _INT32_ROOM)), np.float32)
            quantized = nearest(values, scale, layer.axis)
        axis = layer.axis if scale.ndim else None
        name = self._dequantize(layer.weight, quantized, scale, np.zeros_like(scale, np.int8), axis)
        if rounded is None:
            self._written[key] = (name, scale)
        return name, scale

    def _store(self, node: onnx.NodeProto, layer: Layer) -> None:
        """Weights in INT8 that are float again when the file is loaded."""
        rounded = self._recipe.rounded.get(layer.node)
        for index in (1, 2) if layer.kind in RECURRENT else (1,):
            name = node.input[index]
            if rounded is None and (name, layer.axis) in self._unfolded:
                node.input[index] = self._unfolded[name, layer.axis]
                continue
            values = self._array(name)
            if layer.kind in RECURRENT:  # (directions, gates, inputs): a scale for every row
                scale = np.maximum(np.abs(values).max(axis=2, keepdims=True) / 127, _FEWEST_SCALES)
                quantized = np.clip(np.rint(values / scale), -127, 127).astype(np.int8)
            elif rounded is not None:
                scale, quantized = along(rounded.scale, layer.axis, values.ndim), rounded.values
            else:
                scale = weight_scale(values, layer.axis)
                quantized = nearest(values, scale, layer.axis)
                scale = along(scale, layer.axis, values.ndim)
            wide = self._unique(f"{name}_wide")
            constants = [
                self._constant(f"{name}_q", quantized),
                self._constant(f"{name}_scale", scale.astype(np.float32)),
            ]
            unfolded = self._unique(f"{name}_dq")
            self._nodes += [
                helper.make_node("Cast", constants[:1], [wide], wide, to=TensorProto.FLOAT),
                helper.make_node("Mul", [wide, constants[1]], [unfolded], unfolded),
            ]
            node.input[index] = unfolded
            if rounded is None:
                self._unfolded[name, layer.axis] = unfolded
        if rounded is not None and rounded.bias is not None:
            bias = self._constant(f"{layer.result}_bias", rounded.bias.astype(np.float32))
            del node.input[2:]
            node.input.append(bias)

    def _table(self, node: onnx.NodeProto, layer: Layer) -> onnx.NodeProto:
        """Rows of INT8 with a scale each; returns the node that gives what the table gave."""
        values = self._array(layer.weight)
        scale = weight_scale(values, 0)
        parts = []
        for name, table in (("q", nearest(values, scale, 0)), ("scale", scale[:, None])):
            found = self._unique(f"{layer.result}_{name}")
            constant = self._constant(f"{layer.weight}_{name}", table)
            self._nodes.append(helper.make_node("Gather", [constant, node.input[1]], [found], found))
            parts.append(found)
        floats = self._unique(f"{layer.result}_rows")
        self._nodes.append(helper.make_node("Cast", [parts[0]], [floats], floats, to=TensorProto.FLOAT))
        return helper.make_node("Mul", [floats, parts[1]], list(node.output), node.name)

    def _dynamic_node(self, node: onnx.NodeProto, layer: Layer) -> onnx.NodeProto:
        if layer.kind == "LSTM":
            return self._dynamic_lstm(node)
        rounded = self._recipe.rounded.get(layer.node)
        values = self._array(layer.weight)
        if rounded is not None:
            scale, quantized = rounded.scale, rounded.values
        else:
            scale = weight_scale(values, layer.axis)
            quantized = nearest(values, scale, layer.axis)
        if layer.axis == 0:
            quantized = np.ascontiguousarray(quantized.T)
        bias = None if rounded is None or layer.kind == "MatMul" else rounded.bias
        name = "" if layer.bias is None else layer.bias
        if bias is not None:
            name = self._constant(f"{layer.result}_bias", bias.astype(np.float32))
        inputs = [
            node.input[0],
            self._constant(f"{layer.weight}_q", quantized),
            self._constant(f"{layer.weight}_scale", scale),
            self._constant(f"{layer.weight}_zero_point", np.zeros_like(scale, np.int8)),
            *([name] if name else []),
        ]
        return helper.make_node(
            "DynamicQuantizeMatMul", inputs, list(node.output), node.name, domain=MICROSOFT
        )

    def _dynamic_lstm(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """Weights (directions, inputs, 4 * hidden): the transpose of what ONNX's LSTM takes."""
        inputs = [*node.input, *([""] * (8 - len(node.input)))]
        scales = []
        for index in (1, 2):
            values = self._array(node.input[index])  # (directions, 4 * hidden, inputs)
            scale = np.maximum(np.abs(values).max(axis=2) / 127, _FEWEST_SCALES).astype(np.float32)
            quantized = np.clip(np.rint(values / scale[:, :, None]), -127, 127).astype(np.int8)
            name = node.input[index]
            inputs[index] = self._constant(f"{name}_q", np.ascontiguousarray(quantized.transpose(0, 2, 1)))
            scales.append(self._constant(f"{name}_scale", scale))
            scales.append(self._constant(f"{name}_zero_point", np.zeros_like(scale, np.int8)))
        made = helper.make_node(
            "DynamicQuantizeLSTM", [*inputs, *scales], list(node.output), node.name, domain=MICROSOFT
        )
        made.attribute.extend(item for item in node.attribute if item.name != "layout")
        return made

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


# -- the result -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One candidate and what became of it."""

    name: str
    size: int | None = None  # bytes
    comparison: Comparison | None = None
    predicted_seconds: float | None = None  # of one row on the target, by the cost model
    problem: str | None = None  # why it was passed over

    @property
    def sqnr(self) -> float:
        """How close it is, for choosing."""
        return -np.inf if self.comparison is None else self.comparison.sqnr


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """What became of one layer, for the report."""

    name: str
    kind: str
    mode: Mode
    parameters: int
    alone_sqnr: float | None  # dB of the outputs with only this layer INT8; None: not measured
    why: str | None  # it is not in the form that was tried first


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Model:
    """A model, written and loaded. ``precision`` is fp32 if it is the reference itself."""

    path: Path
    name: str
    precision: str
    size: int  # bytes
    plan: Plan
    candidates: tuple[Candidate, ...]
    recipe: Recipe | None  # None for FP32
    graph: onnx.ModelProto  # the graph it is for: the reference, or the equalized one
    layers: tuple[LayerFacts, ...]
    predicted_seconds: float | None  # of one row on the target, by the cost model
    predicted_seconds_fp32: float


def static_recipe(plan: Plan, ranges: Mapping[str, Range], *, per_channel: bool = True) -> Recipe:
    """Every layer in its first INT8 form with these ranges."""
    every: Sequence[int] = [layer.node for layer in plan.layers]
    return Recipe(modes=plan.all_int8(), ranges=ranges, per_tensor=frozenset(() if per_channel else every))
