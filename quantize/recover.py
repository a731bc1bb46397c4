"""Step 4b: accuracy back without training. Pure but for the runs of the FP32 graph that feed it.

Two changes to an INT8 model, each of which ``search`` keeps only where rows for choosing say so:

- *cross-layer equalization*: between two layers with nothing but positively homogeneous nodes (Relu, PRelu,
  max pooling) in between, a channel may be made smaller by one and larger by the other without changing what
  the graph computes. Channels of one tensor then have like ranges, and one scale suits all.
- *least-squares rounding*: the nearest INT8 weights are not those that give the nearest outputs. Weights are
  rounded one input after the other, and what one rounding does wrong is made good by those still to come, as
  the correlations of the calibration inputs (their Gram matrix) allow. What the rounding shifts on average
  goes into the bias.

Sources: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (ICCV 2019),
with the split of Xiao et al., "SmoothQuant" (ICML 2023); Frantar et al., "GPTQ" (ICLR 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from onnx import helper, numpy_helper

from quantize.calibrate import Channels, watch
from quantize.int8 import Recipe, Rounded, along, weight_scale
from quantize.load import Rows
from quantize.plan import Layer, Mode, Plan
from quantize.prepare import PreparedModel
from quantize.weights import array_of

_ROUNDED: Final = ("Conv", "Gemm", "MatMul")
_HOMOGENEOUS: Final = (
    "Relu",
    "LeakyRelu",
    "PRelu",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "Identity",
)
_FURTHEST: Final = 32.0  # a channel is scaled by no more, either way
WIDEST: Final = 2560  # inputs of a layer whose Gram matrix is made: 52 MB, and seconds to invert
_GRAM_BYTES: Final = 256e6  # of Gram matrices at a time; more layers take another pass
_MOST_SAMPLES: Final = 1 << 13  # rows or positions that enter one Gram matrix
_A_BATCH: Final = 1 << 10  # of them from one batch
_DAMPING: Final = 0.01  # of the mean diagonal: what calibration rows do not say about others
_BLOCK: Final = 128
_CLIPPED: Final = (1.0, 0.95, 0.9, 0.85, 0.8)  # of the largest weight: the scales that compete
_INT32_ROOM: Final = float(2**30)


# -- cross-layer equalization -----------------------------------------------------------------------------


def pairs_of(proto: onnx.ModelProto, plan: Plan) -> list[tuple[Layer, Layer]]:
    """Layers between which channels can be scaled: the first's result is read by the second alone."""
    graph = proto.graph
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    producers = {name: (position, node) for position, node in enumerate(graph.node) for name in node.output}
    outputs = {value.name for value in graph.output}
    weights = {tensor.name for tensor in graph.initializer}
    by_node = {layer.node: layer for layer in plan.layers if layer.kind in _ROUNDED}
    shared = _read_more_than_once(plan)
    found = []
    for second in by_node.values():
        tensor = second.activation
        while tensor in producers and tensor not in outputs and len(users.get(tensor, [])) == 1:
            position, node = producers[tensor]
            first = by_node.get(position)
            if first is not None:
                if not ({first.weight, second.weight, first.bias} & shared) and _chained(
                    graph, first, second
                ):
                    found.append((first, second))
                break
            slope_is_constant = node.op_type != "PRelu" or node.input[1] in weights
            if node.op_type not in _HOMOGENEOUS or not slope_is_constant:
                break
            tensor = node.input[0]
    return found


def _read_more_than_once(plan: Plan) -> set[str | None]:
    names = [name for layer in plan.layers for name in (layer.weight, layer.bias) if name is not None]
    return {name for name in names if names.count(name) > 1}


def _chained(graph: onnx.GraphProto, first: Layer, second: Layer) -> bool:
    """Whether each output channel of the first is one input channel of the second."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    channels = shapes[first.weight][first.axis]
    return (first.kind == "Conv") == (second.kind == "Conv") and channels == _inputs_of(
        second, shapes[second.weight], _groups(graph.node[second.node])
    )


def _groups(node: onnx.NodeProto) -> int:
    return next((int(item.i) for item in node.attribute if item.name == "group"), 1)


def _inputs_of(layer: Layer, shape: Sequence[int], groups: int) -> int:
    return shape[1] * groups if layer.kind == "Conv" else shape[1 - layer.axis]


def channel_axes(proto: onnx.ModelProto, plan: Plan) -> dict[str, int]:
    """The tensors whose channels ``equalize`` must know, and the axis they are on."""
    return {second.activation: 1 if second.kind == "Conv" else -1 for _, second in pairs_of(proto, plan)}


def equalize(proto: onnx.ModelProto, plan: Plan, channels: Mapping[str, Channels]) -> onnx.ModelProto | None:
    """The same function with channels of like ranges, or None where there is nothing to scale.

    Args:
        proto: the FP32 graph; left as it is.
        plan: its layers.
        channels: of the tensors of ``channel_axes``.
    """
    pairs = [pair for pair in pairs_of(proto, plan) if pair[1].activation in channels]
    if not pairs:
        return None
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    tensors = {tensor.name: tensor for tensor in result.graph.initializer}
    arrays: dict[str, np.ndarray] = {}

    def array(name: str) -> np.ndarray:
        if name not in arrays:
            arrays[name] = array_of(tensors[name]).astype(np.float64)
        return arrays[name]

    for first, second in pairs:
        groups = _groups(result.graph.node[second.node])
        largest = channels[second.activation].largest
        incoming = _largest_in(array(second.weight), second, groups)
        alive = (largest > 0) & (incoming > 0)
        safe = np.where(alive, largest, 1.0) / np.where(alive, incoming, 1.0)
        factor = np.where(alive, np.sqrt(safe), 1.0)
        factor /= np.exp(np.log(factor[alive]).mean()) if alive.any() else 1.0
        factor = np.where(alive, np.clip(factor, 1 / _FURTHEST, _FURTHEST), 1.0)
        outer = array(first.weight)
        outer /= along(factor, first.axis, outer.ndim)
        if first.bias is not None:
            array(first.bias)[:] /= factor
        _scale_inputs(array(second.weight), second, groups, factor)
    for name, values in arrays.items():
        tensors[name].CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))
    return result


def _largest_in(weight: np.ndarray, layer: Layer, groups: int) -> np.ndarray:
    """The largest weight of every input channel."""
    magnitude = np.abs(weight)
    if layer.kind != "Conv":
        return np.asarray(magnitude.max(axis=layer.axis))
    each = magnitude.reshape(groups, -1, *weight.shape[1:])  # (groups, outputs, inputs, kernel...)
    return np.asarray(each.max(axis=(1, *range(3, each.ndim))).reshape(-1))


def _scale_inputs(weight: np.ndarray, layer: Layer, groups: int, factor: np.ndarray) -> None:
    if layer.kind != "Conv":
        weight *= along(factor, 1 - layer.axis, 2)
        return
    each = weight.reshape(groups, -1, *weight.shape[1:])
    each *= factor.reshape(groups, 1, -1, *([1] * (weight.ndim - 2)))


# -- least-squares rounding -------------------------------------------------------------------------------


@dataclass(slots=True)
class _Gram:
    """Second moments of the inputs of one layer: (groups, inputs, inputs), and their sums.

    Both of differences from ``origin``, a first mean: of inputs that vary little around a large number the
    products themselves would leave nothing but float32 rounding.
    """

    origin: np.ndarray  # (groups, inputs)
    products: np.ndarray
    sums: np.ndarray
    count: int = 0

    def add(self, samples: np.ndarray) -> None:
        """(groups, samples, inputs) float32."""
        centred = samples - self.origin[:, None, :]
        self.products += centred.transpose(0, 2, 1) @ centred
        self.sums += centred.sum(axis=1, dtype=np.float64)
        self.count += samples.shape[1]

    @property
    def mean(self) -> np.ndarray:
        """Of every input: (groups, inputs)."""
        return np.asarray(self.origin + self.sums / max(self.count, 1))

    def covariance(self, *, centred: bool) -> np.ndarray:
        """The mean products, around the mean where a bias can take it up."""
        off = self.sums / max(self.count, 1)
        moments = self.products / max(self.count, 1) - off[:, :, None] * off[:, None, :]
        if not centred:
            moments = moments + self.mean[:, :, None] * self.mean[:, None, :]
        return np.asarray(moments)


def round_weights(
    model: PreparedModel,
    proto: onnx.ModelProto,
    plan: Plan,
    recipe: Recipe,
    rows: Rows,
    widest: int = WIDEST,
) -> dict[int, Rounded]:
    """INT8 weights whose outputs on ``rows`` are nearest, for the layers of ``recipe`` that are INT8.

    Args:
        model: the reference: how rows are run.
        proto: the graph that the recipe is for.
        plan: its layers.
        recipe: which of them are INT8.
        rows: for the Gram matrices; the rows that find ranges.
        widest: layers of more inputs are left out.
    """
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    wanted = []
    for layer in plan.layers:
        if layer.kind not in _ROUNDED or recipe.modes.get(layer.node, Mode.FLOAT) is Mode.FLOAT:
            continue
        shape = tuple(weights[layer.weight].dims)
        groups = _groups(proto.graph.node[layer.node]) if layer.kind == "Conv" else 1
        inputs = int(np.prod(shape[1:])) if layer.kind == "Conv" else shape[1 - layer.axis]
        if inputs <= widest:
            wanted.append((layer, groups, inputs))
    result: dict[int, Rounded] = {}
    while wanted:
        some: list[Layer] = []
        total = 0.0
        while wanted and (not some or total + _gram_bytes(*wanted[0][1:]) <= _GRAM_BYTES):
            layer, groups, inputs = wanted.pop(0)
            some.append(layer)
            total += _gram_bytes(groups, inputs)
        grams = _grams(model, proto, some, rows)
        for layer in some:
            gram = grams.get(layer.node)
            if gram is not None and gram.count:
                result[layer.node] = _round(proto, layer, gram, recipe, weights)
    return result


def _gram_bytes(groups: int, inputs: int) -> float:
    return 8.0 * groups * inputs * inputs


def _grams(
    model: PreparedModel, proto: onnx.ModelProto, layers: Sequence[Layer], rows: Rows
) -> dict[int, _Gram]:
    """One pass over ``rows``, which are run until every matrix has enough samples."""
    readers: dict[str, list[Layer]] = {}
    for layer in layers:
        readers.setdefault(layer.activation, []).append(layer)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    grams: dict[int, _Gram] = {}
    for tensor, values in watch(model, sorted(readers), rows, proto=proto):
        for layer in readers[tensor]:
            gram = grams.get(layer.node)
            if gram is not None and gram.count >= _MOST_SAMPLES:
                continue
            samples = _samples(values, proto.graph.node[layer.node], layer, shapes[layer.weight])
            if samples is None or not samples.shape[1]:
                continue
            if gram is None:
                groups, _, inputs = samples.shape
                gram = grams[layer.node] = _Gram(
                    samples.mean(axis=1), np.zeros((groups, inputs, inputs)), np.zeros((groups, inputs))
                )
            gram.add(samples)
        if len(grams) == len(layers) and all(gram.count >= _MOST_SAMPLES for gram in grams.values()):
            break
    return grams


def _samples(
    values: np.ndarray, node: onnx.NodeProto, layer: Layer, shape: Sequence[int]
) -> np.ndarray | None:
    """What a layer multiplies with its weights: (groups, samples, inputs) float32."""
    if layer.kind != "Conv":
        if values.shape[-1] != shape[1 - layer.axis]:
            return None  # a vector for a row, many of which are no longer told apart
        flat = values.reshape(-1, values.shape[-1])
        return np.ascontiguousarray(_evenly(flat))[None]
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    kernel = shape[2:]
    rank = len(kernel)
    strides = list(attributes.get("strides", [1] * rank))
    dilations = list(attributes.get("dilations", [1] * rank))
    padded = _padded(values, attributes, kernel, strides, dilations)
    if padded is None:
        return None
    reach = tuple((size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True))
    axes = tuple(range(2, 2 + rank))
    if any(padded.shape[axis] < size for axis, size in zip(axes, reach, strict=True)):
        return None
    windows = sliding_window_view(padded, reach, axis=axes)
    strided: tuple[slice, ...] = tuple(slice(None, None, step) for step in (1, 1, *strides, *dilations))
    windows = windows[strided]
    places = (windows.shape[0], *windows.shape[2 : 2 + rank])  # batch and positions
    picked = np.unravel_index(_evenly(np.arange(int(np.prod(places)))), places)
    wanted: tuple[np.ndarray | slice, ...] = (picked[0], slice(None), *picked[1:])
    chosen = windows[wanted]  # (samples, channels, kernel...)
    groups = int(attributes.get("group", 1))
    each = chosen.reshape(len(chosen), groups, -1)
    return np.ascontiguousarray(each.transpose(1, 0, 2))


def _evenly(values: np.ndarray) -> np.ndarray:
    step = -(-len(values) // _A_BATCH)
    return values[:: step if step == 1 else step | 1]


def _padded(
    values: np.ndarray,
    attributes: Mapping[str, object],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> np.ndarray | None:
    rank = len(kernel)
    auto = attributes.get("auto_pad", b"NOTSET")
    if auto in (b"SAME_UPPER", b"SAME_LOWER"):
        pads = []
        for axis in range(rank):
            size = values.shape[2 + axis]
            reach = (kernel[axis] - 1) * dilations[axis] + 1
            total = max((-(-size // strides[axis]) - 1) * strides[axis] + reach - size, 0)
            less, more = total // 2, total - total // 2
            pads.append((less, more) if auto == b"SAME_UPPER" else (more, less))
    else:
        flat = attributes.get("pads", [0] * (2 * rank))
        assert isinstance(flat, list)
        pads = [(flat[axis], flat[rank + axis]) for axis in range(rank)]
    if any(before < 0 or after < 0 for before, after in pads):
        return None
    return np.pad(values, ((0, 0), (0, 0), *pads))


def _round(
    proto: onnx.ModelProto,
    layer: Layer,
    gram: _Gram,
    recipe: Recipe,
    weights: Mapping[str, onnx.TensorProto],
) -> Rounded:
    values = array_of(weights[layer.weight]).astype(np.float64)
    has_bias = layer.kind != "MatMul"
    moments = gram.covariance(centred=has_bias)
    groups, inputs = moments.shape[:2]
    by_output = np.moveaxis(values, layer.axis, 0)
    rows = by_output.reshape(groups, -1, inputs)  # (groups, outputs, inputs)
    bias = None
    if has_bias:
        bias = array_of(weights[layer.bias]).astype(np.float64) if layer.bias else np.zeros(len(by_output))
    scale = _scales(values, rows, moments, layer, recipe, bias)
    each = np.broadcast_to(scale, (len(by_output),)).astype(np.float64).reshape(groups, -1)
    quantized = _sequentially(rows, moments, each)
    if bias is not None:
        shift = ((quantized * each[:, :, None] - rows) * gram.mean[:, None, :]).sum(axis=2)
        bias = bias - shift.reshape(-1)
    restored = quantized.astype(np.int8).reshape(by_output.shape)
    return Rounded(
        np.ascontiguousarray(np.moveaxis(restored, 0, layer.axis)),
        scale,
        None if bias is None else bias.astype(np.float32),
    )


def _scales(
    values: np.ndarray,
    rows: np.ndarray,
    moments: np.ndarray,
    layer: Layer,
    recipe: Recipe,
    bias: np.ndarray | None,
) -> np.ndarray:
    """Per output channel the scale of the least error, as if inputs were not correlated."""
    if layer.node in recipe.per_tensor:
        return weight_scale(values, None)
    largest = weight_scale(values, layer.axis)
    energy = np.einsum("gii->gi", moments)[:, None, :]
    groups, outputs, _ = rows.shape
    best = largest.copy()
    least = np.full(largest.shape, np.inf)
    for factor in _CLIPPED:
        tried = (largest * np.float32(factor)).astype(np.float32)
        each = tried.astype(np.float64).reshape(groups, outputs, 1)
        rounded = np.clip(np.rint(rows / each), -127, 127) * each
        error = (energy * (rounded - rows) ** 2).sum(axis=2).reshape(-1)
        better = error < least
        best, least = np.where(better, tried, best), np.where(better, error, least)
    found = recipe.ranges.get(layer.activation)
    if bias is not None and found is not None:
        step = max((max(found.high, 0.0) - min(found.low, 0.0)) / 255, 1e-30)
        best = np.maximum(best, np.abs(bias) / (step * _INT32_ROOM))
    return np.asarray(best, np.float32)


def _sequentially(rows: np.ndarray, moments: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """GPTQ: (groups, outputs, inputs) weights to integers, one input after the other, the strongest first.

    Args:
        rows: the weights.
        moments: (groups, inputs, inputs) of the inputs.
        scale: (groups, outputs).
    """
    inputs = rows.shape[2]
    order = np.argsort(-np.einsum("gii->i", moments), kind="stable")
    left = rows[:, :, order].copy()
    mixed = moments[:, order][:, :, order]
    mean = np.einsum("gii->g", mixed) / inputs
    damping = np.maximum(_DAMPING * mean, 1e-12)
    mixed = mixed + damping[:, None, None] * np.eye(inputs)
    # The upper Cholesky factor of the inverse: what is still to come can make good what was done wrong.
    upper = np.linalg.cholesky(np.linalg.inv(mixed)).transpose(0, 2, 1)
    result = np.empty_like(left)
    for start in range(0, inputs, _BLOCK):
        end = min(start + _BLOCK, inputs)
        errors = np.empty((*left.shape[:2], end - start))
        for index in range(start, end):
            values = left[:, :, index]
            rounded = np.clip(np.rint(values / scale), -127, 127)
            result[:, :, index] = rounded
            error = (values - rounded * scale) / upper[:, None, index, index]
            left[:, :, index + 1 : end] -= error[:, :, None] * upper[:, None, index, index + 1 : end]
            errors[:, :, index - start] = error
        left[:, :, end:] -= errors @ upper[:, start:end, end:]
    back = np.empty_like(order)
    back[order] = np.arange(inputs)
    return result[:, :, back]
