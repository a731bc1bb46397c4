"""Step 2b, on request: fewer hidden channels, and the layer after them solved again for what is left.

Invariants: inputs, outputs and the nodes of the graph stay; only widths inside it shrink, to multiples of 16
(what the int8 kernels of ARM64 take at a time). Nothing is trained and no label is read.

Idea. A *group* is the hidden channels between a layer that makes them (Conv, Gemm, MatMul) and the layers
that read them, through all that treats channels one by one (Relu, pooling, depthwise convolution, Flatten).

1. Which channels: a QR decomposition with pivots sorts a group's activations so that every prefix explains
   the outputs of the layers that read them (of convolutions: the channels themselves, weighted by what reads
   them) as well as a greedy choice can. What a prefix leaves unexplained is the group's error curve.
2. How many: the group that loses least per byte saved gives up the next channels, until the size is met.
   Each group is narrowed alone once, to see how much its curve means for the result.
3. Repair: each layer that reads pruned channels is solved for its inputs *as the pruned network makes
   them*, its outputs *as the original made them*, by ridge regression towards the weights it had. The ridge
   is chosen on rows that the solution did not see.

A few thousand rows are few for a thousand unknowns. But the original network says what any row should give,
so rows are added that are mixed of two: ``m + cos(t)(a - m) + sin(t)(b - m)`` keeps mean and covariance.

Sources: Chee et al., "Model Preserving Compression for Neural Networks" (NeurIPS 2022) for pivoted QR; Chen,
Billings, Luo, "Orthogonal least squares methods" (1989) for the choice by outputs; He, Zhang, Sun, "Channel
Pruning for Accelerating Very Deep Neural Networks" (ICCV 2017) for the repair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from quantize import runtime
from quantize.compare import Comparison
from quantize.config import Budget, ShrinkConfig
from quantize.errors import BadModel
from quantize.load import Rows
from quantize.prepare import PreparedModel, drop_unused, unique

MULTIPLE: Final = 16  # channels: one vector register of int8
_STEP: Final = 1 / 24  # of a group's width: what it gives up at a time
_CURVE: Final = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)  # times smaller: the points of the curve
_BISECTIONS: Final = 2
_HALF: Final = 0.5  # of the budget is for pruning, the other half for INT8
_HALF_IN_DB: Final = 3.0
_MOST_ROWS: Final = 8192
_TARGET_BYTES: Final = 300_000_000  # of what the layers should give: bounds rows and memory
_MOST_SAMPLES: Final = 16_384  # of positions in images
_MOST_COMPARED: Final = (
    4096  # channels that are sorted with care; more are cut to this by activation x weight norm first
)
_MOST_TARGETS: Final = 256  # outputs that sorting looks at; more are projected to this many
_BLOCK: Final = 64
_PROBE: Final = 1 / 3  # of its width is what a group is narrowed to for that
_MOST_PROBED: Final = 16  # groups; in longer chains all count the same
_MIXED: Final = 3  # rows mixed of pairs, per calibration row
_RIDGES: Final = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)  # times the mean energy of a channel
_HELD_OUT: Final = 5  # every fifth sample chooses the ridge
_RIDGE_OUTPUTS: Final = 256  # outputs that are enough to choose it
_CHANNEL_BYTES: Final = 13  # of a static INT8 layer: int32 bias, its scale, the weights' scale and zero point
_LAYER_BYTES: Final = 900  # names, nodes and parameters of the Q/DQ pairs around it

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


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One size and what it costs in accuracy, before INT8."""

    share: float  # of the weights that are left
    bytes: int  # estimate of the static INT8 file
    comparison: Comparison
    widths: tuple[int, ...]  # of the groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """The model to quantize, and what was tried on the way."""

    model: PreparedModel
    curve: tuple[CurvePoint, ...]  # from large to small; empty where nothing was asked for
    widths: tuple[tuple[str, int, int], ...]  # layer, channels before and after, where they differ
    chosen: CurvePoint | None


def unpruned(model: PreparedModel) -> Pruned:
    """Nothing was asked for."""
    return Pruned(model=model, curve=(), widths=(), chosen=None)


def prune(
    model: PreparedModel,
    rows: Rows,
    judge: Callable[[onnx.ModelProto], Comparison],
    budget: Budget,
    shrink: ShrinkConfig,
) -> Pruned:
    """Make ``model`` smaller.

    Args:
        model: the FP32 reference.
        rows: calibration rows that may be learnt from.
        judge: compares a graph with the reference on rows kept for choosing.
        budget: of accuracy. ``auto`` uses half of it, a target size all of it.
        shrink: what is wanted.

    Raises:
        BadModel: nothing in the graph can be pruned, or the target size cannot be reached inside the budget;
            names the closest.
    """
    groups = find_groups(model.proto)
    sizes = Sizes(model.proto, groups)
    full = [group.width for group in groups]
    target = shrink.target_size
    if target is not None and shrink.prune is None and sizes.bytes(full) <= target:
        return unpruned(model)
    if not groups:
        raise BadModel(
            "nothing in this model can be pruned: no chain of Conv, Gemm or MatMul with constant weights"
        )
    work = _Work(model, groups, rows, judge, sizes)
    half = _half(budget)
    chosen: CurvePoint | None = None
    if isinstance(shrink.prune, float):
        chosen = work.try_share(1 - shrink.prune)
        work.sketch()
    elif shrink.prune == "auto":
        work.search(half)
        chosen = work.smallest(half)
    if target is not None and (chosen is None or chosen.bytes > target):
        work.try_size(target)
        chosen = work.fitting(target)
        if chosen is None or not chosen.comparison.inside(budget):
            work.search(budget)
            closest = work.smallest(budget)
            raise BadModel(_out_of_reach(target, sizes.bytes(full) if closest is None else closest.bytes))
        work.sketch()
    if chosen is None:
        return Pruned(model=model, curve=work.curve, widths=(), chosen=None)
    proto = work.proto_of(chosen)
    return Pruned(
        model=replace(model, proto=proto),
        curve=work.curve,
        widths=tuple(
            (group.name, group.width, width)
            for group, width in zip(groups, chosen.widths, strict=True)
            if width != group.width
        ),
        chosen=chosen,
    )


def check_target_size(shrink: ShrinkConfig, size: int, pruned: Pruned) -> None:
    """The written file is as small as was asked for.

    Raises:
        BadModel: it is not; says how small it is.
    """
    if shrink.target_size is not None and size > shrink.target_size:
        smallest = min((point.bytes for point in pruned.curve), default=size)
        raise BadModel(_out_of_reach(shrink.target_size, max(size, smallest)))


def _out_of_reach(target: int, closest: int) -> str:
    return (
        f"target size {target / 1e6:.3g} MB cannot be reached inside the accuracy budget, the closest is "
        f"{closest / 1e6:.3g} MB: allow more loss with --max-drop or --min-sqnr, or a larger --target-size"
    )


def _half(budget: Budget) -> Budget:
    """Half of a budget: INT8 needs the rest."""
    return replace(
        budget,
        min_sqnr=budget.min_sqnr + _HALF_IN_DB,
        min_agreement=1 - (1 - budget.min_agreement) * _HALF,
        max_auc_drop=budget.max_auc_drop * _HALF,
    )


# -- what can be pruned -----------------------------------------------------------------------------------


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
        hidden |= _read_inside(node)
    found = []
    for position, node in enumerate(graph.node):
        width = _made(node, weights)
        if width is None or width <= MULTIPLE:
            continue
        group = _trace(graph, weights, users, outputs | hidden, position, width)
        if group is not None:
            found.append(group)
    return tuple(found)


def _read_inside(node: onnx.NodeProto) -> set[str]:
    names: set[str] = set()
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                names.update(inner.input)
                names |= _read_inside(inner)
    return names


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _plain(node: onnx.NodeProto, weights: Mapping[str, TensorProto]) -> bool:
    """A layer with constant float weights that we know how to slice and solve."""
    if node.op_type not in _LAYERS or node.domain not in ("", "ai.onnx") or len(node.input) < 2:
        return False
    weight = weights.get(node.input[1])
    if weight is None or weight.data_type != TensorProto.FLOAT or node.input[0] in weights:
        return False
    attributes = _attributes(node)
    if node.op_type == "Conv":
        if attributes.get("group", 1) != 1 or attributes.get("auto_pad", b"NOTSET") not in (
            b"NOTSET",
            b"VALID",
        ):
            return False
    elif len(weight.dims) != 2:
        return False
    if node.op_type == "Gemm" and (
        attributes.get("transA", 0)
        or attributes.get("alpha", 1.0) != 1.0
        or attributes.get("beta", 1.0) != 1.0
    ):
        return False
    if len(node.input) > 2 and node.input[2]:
        bias = weights.get(node.input[2])
        return bias is not None and list(bias.dims) == [weight.dims[_out_axis(node)]]
    return True


def _out_axis(node: onnx.NodeProto) -> int:
    if node.op_type == "Conv":
        return 0
    return 0 if node.op_type == "Gemm" and _attributes(node).get("transB", 0) else 1


def _in_axis(node: onnx.NodeProto) -> int:
    return 1 - _out_axis(node)


def _made(node: onnx.NodeProto, weights: Mapping[str, TensorProto]) -> int | None:
    return int(weights[node.input[1]].dims[_out_axis(node)]) if _plain(node, weights) else None


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
            if node.op_type in _LAYERS and node.input[0] == tensor and _plain(node, weights):
                block, rest = divmod(int(weights[node.input[1]].dims[_in_axis(node)]), width)
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
                    or _attributes(node).get("group", 1) != width
                    or weight.dims[0] != width
                    or any(name not in weights for _, name in others)
                ):
                    return None
                slices += [(position, index, 0) for index in range(1, len(node.input)) if node.input[index]]
                depthwise.append(position)
            elif node.op_type == "Flatten" and place == "image" and _attributes(node).get("axis", 1) == 1:
                becomes = "flat"
            elif node.op_type == "Reshape" and place == "image" and len(others) == 1:
                shape = weights.get(others[0][1])
                values = None if shape is None else numpy_helper.to_array(shape).ravel()
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
                    "image" if _attributes(node).get("keepdims", 1) else "flat" if len(axes) == 2 else None
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
        return None if tensor is None else {int(axis) for axis in numpy_helper.to_array(tensor).ravel()}
    found = _attributes(node).get("axes")
    return None if found is None else {int(axis) for axis in found}


# -- how many ---------------------------------------------------------------------------------------------


class Sizes:
    """What a choice of widths weighs: weights, and bytes of the static INT8 file (an estimate, 2 % high)."""

    def __init__(self, proto: onnx.ModelProto, groups: Sequence[Group]) -> None:
        graph = proto.graph
        weights = {tensor.name: tensor for tensor in graph.initializer}
        self._full = [group.width for group in groups]
        made = {group.producer: index for index, group in enumerate(groups)}
        read = {consumer.node: index for index, group in enumerate(groups) for consumer in group.consumers}
        # (values of the weight, its outputs, group that narrows its outputs, group that narrows its inputs)
        self._layers: list[tuple[int, int, int | None, int | None]] = []
        counted: set[str] = set()
        for position, node in enumerate(graph.node):
            if _plain(node, weights) and node.input[1] not in counted:
                dims = weights[node.input[1]].dims
                counted.update(node.input[1:])
                outputs = int(dims[_out_axis(node)])
                self._layers.append((math.prod(dims), outputs, made.get(position), read.get(position)))
        other = sum(tensor.ByteSize() for tensor in graph.initializer if tensor.name not in counted)
        skeleton = sum(node.ByteSize() for node in graph.node) + 2000
        self._rest: int = other + skeleton + _LAYER_BYTES * len(self._layers)

    def weights(self, widths: Sequence[float]) -> float:
        """Weights of Conv, Gemm and MatMul."""
        return sum(size for size, _ in self._scaled(widths))

    def bytes(self, widths: Sequence[float]) -> int:
        """Of the INT8 file."""
        scaled = self._scaled(widths)
        return math.ceil(self._rest + sum(size + _CHANNEL_BYTES * outputs for size, outputs in scaled))

    def _scaled(self, widths: Sequence[float]) -> Iterator[tuple[float, float]]:
        for size, outputs, made, read in self._layers:
            left = 1.0 if made is None else widths[made] / self._full[made]
            kept = 1.0 if read is None else widths[read] / self._full[read]
            yield size * left * kept, outputs * left


def allocate(
    groups: Sequence[Group],
    errors: Sequence[np.ndarray],
    measure: Callable[[Sequence[float]], float],
    target: float,
) -> list[int]:
    """Widths that fit the target, or the smallest there are: least error per byte saved goes first.

    Args:
        groups: what can be narrowed.
        errors: per group (width + 1,): share of its energy that the first k channels leave unexplained.
        measure: what widths weigh, as ``Sizes.bytes`` or ``Sizes.weights``.
        target: the same.
    """
    widths = [group.width for group in groups]
    steps = [max(MULTIPLE, round(group.width * _STEP / MULTIPLE) * MULTIPLE) for group in groups]
    size = measure(widths)
    while size > target:
        best: tuple[float, int, int, float] | None = None
        for index, width in enumerate(widths):
            narrower = max(MULTIPLE, (width - 1) // MULTIPLE * MULTIPLE - steps[index] + MULTIPLE)
            if narrower >= width:
                continue
            tried = measure([*widths[:index], narrower, *widths[index + 1 :]])
            loss = float(errors[index][narrower] - errors[index][width])
            if tried < size:
                price = max(loss, 1e-12) / (size - tried)
                best = min(best, (price, index, narrower, tried)) if best else (price, index, narrower, tried)
        if best is None:
            break
        _, index, widths[index], size = best
    return widths


# -- which ------------------------------------------------------------------------------------------------


def pivoted(gram: np.ndarray, cross: np.ndarray, total: float) -> tuple[np.ndarray, np.ndarray]:
    """Sort columns so that every prefix explains the targets as well as a greedy choice can.

    Orthogonal least squares as a Cholesky decomposition with pivots: each next column is the one that, after
    what the earlier ones explain, explains most of what is left of the targets. With the columns themselves
    as targets this is close to QR with column pivoting.

    Args:
        gram: (m, m) X^T X of the columns to sort.
        cross: (m, t) X^T T with the targets.
        total: energy of the targets, the sum of T^2.

    Returns:
        order (m,): the columns, best first; error (m + 1,): share of the targets' energy that the first k
        columns leave unexplained.
    """
    left, cross = np.array(gram, np.float32), np.array(cross, np.float32)
    size = len(left)
    energy = gram.diagonal().astype(np.float64).copy()
    floor = 1e-5 * energy + 1e-9 * max(float(energy.max(initial=0.0)), 1e-30)
    alive = np.ones(size, bool)
    order: list[int] = []
    error = [1.0]
    exhausted = False
    while not exhausted and len(order) < size:
        block = np.zeros((size, min(_BLOCK, size - len(order))), np.float32)
        for column in range(block.shape[1]):
            gains = np.einsum("ij,ij->i", cross, cross) / np.maximum(energy, 1e-30)
            gains[~alive | (energy <= floor)] = -1.0
            pivot = int(np.argmax(gains))
            if gains[pivot] < 0:
                exhausted = True
                break
            root = np.float32(math.sqrt(energy[pivot]))
            block[:, column] = (left[:, pivot] - block[:, :column] @ block[pivot, :column]) / root
            explained = cross[pivot] / root
            cross -= np.outer(block[:, column], explained)
            energy -= block[:, column].astype(np.float64) ** 2
            alive[pivot] = False
            order.append(pivot)
            error.append(max(0.0, error[-1] - float(explained @ explained) / total))
        left -= block @ block.T
    rest = np.flatnonzero(alive)  # nothing new in them
    rest = rest[np.argsort(-gram.diagonal()[rest], kind="stable")]
    error += [error[-1]] * (size - len(order))
    curve = np.array(error) - error[-1]  # what all channels together leave is not the group's loss
    return np.concatenate([np.array(order, int), rest]), np.maximum(curve, 0.0)


# -- the work ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Task:
    """What one consumer should give: sampled positions of its original outputs."""

    samples: tuple[np.ndarray, ...]  # per batch: (rows, k) places in the grid of outputs
    wanted: np.ndarray  # (samples, outputs) float32


class _Work:
    """The curve of one model, point by point."""

    def __init__(
        self,
        model: PreparedModel,
        groups: tuple[Group, ...],
        rows: Rows,
        judge: Callable[[onnx.ModelProto], Comparison],
        sizes: Sizes,
    ) -> None:
        self._model, self._groups, self._judge, self.sizes = model, groups, judge, sizes
        self._full = [group.width for group in groups]
        self._rows = self._sampled(rows)
        self._tasks: dict[int, _Task] = {}
        self._orders: list[np.ndarray] = []
        self._errors: list[np.ndarray] = []
        for group in groups:
            order, error = self._sort(group)
            self._orders.append(order)
            self._errors.append(error)
        if 1 < len(groups) <= _MOST_PROBED:
            for index in range(len(groups)):
                self._errors[index] = self._errors[index] * self._weight(index)
        self._last: tuple[CurvePoint, onnx.ModelProto] | None = None
        self._points: dict[tuple[int, ...], CurvePoint] = {}

    # -- points

    @property
    def curve(self) -> tuple[CurvePoint, ...]:
        """All points, from large to small."""
        return tuple(sorted(self._points.values(), key=lambda point: -point.bytes))

    def try_share(self, share: float) -> CurvePoint:
        """Prune to a share of the weights or as far as it goes, and judge."""
        target = share * self.sizes.weights(self._full)
        return self._try(allocate(self._groups, self._errors, self.sizes.weights, target))

    def try_size(self, target: int) -> CurvePoint:
        """Prune to ``target`` bytes or as far as it goes, and judge."""
        return self._try(allocate(self._groups, self._errors, self.sizes.bytes, target))

    def _try(self, wanted: Sequence[int]) -> CurvePoint:
        widths = tuple(wanted)
        if widths not in self._points:
            proto = self._build(widths)
            point = CurvePoint(
                share=self.sizes.weights(widths) / self.sizes.weights(self._full),
                bytes=self.sizes.bytes(widths),
                comparison=self._judge(proto),
                widths=widths,
            )
            self._points[widths] = point
            self._last = (point, proto)
        return self._points[widths]

    def search(self, budget: Budget) -> None:
        """Go down the curve until the budget is used up, then close in."""
        full = self.sizes.bytes(self._full)
        inside, outside = float(full), None
        for factor in _CURVE:
            point = self.try_size(math.ceil(full / factor))
            if not point.comparison.inside(budget):
                outside = float(point.bytes)
                break
            if point.bytes >= inside:
                return  # as small as it gets
            inside = float(point.bytes)
        if outside is None:
            return
        for _ in range(_BISECTIONS):
            point = self.try_size(math.ceil(math.sqrt(inside * outside)))
            if point.comparison.inside(budget):
                inside = float(point.bytes)
            else:
                outside = float(point.bytes)

    def sketch(self) -> None:
        """A few more points, for the report."""
        full = self.sizes.bytes(self._full)
        for factor in (2.0, 4.0, 8.0):
            self.try_size(math.ceil(full / factor))

    def smallest(self, budget: Budget) -> CurvePoint | None:
        """The smallest point inside the budget."""
        inside = [point for point in self.curve if point.comparison.inside(budget)]
        return inside[-1] if inside else None

    def fitting(self, target: int) -> CurvePoint | None:
        """The largest point of at most ``target`` bytes."""
        return next((point for point in self.curve if point.bytes <= target), None)

    def proto_of(self, point: CurvePoint) -> onnx.ModelProto:
        """The graph of a point."""
        if self._last is not None and self._last[0] is point:
            return self._last[1]
        return self._build(point.widths)

    def _weight(self, index: int) -> float:
        """How much the result changes for a unit of a group's error curve."""
        width = max(MULTIPLE, round(self._full[index] * _PROBE / MULTIPLE) * MULTIPLE)
        found = self._judge(self._build([*self._full[:index], width, *self._full[index + 1 :]]))
        # The score is a mean of squares: its change grows as the error's energy, not as its square.
        noise = 10 ** (-found.sqnr / (10 if found.mean_score is None else 20))
        return noise / max(float(self._errors[index][width]), 1e-6)

    # -- activations

    def _sampled(self, rows: Rows) -> Mapping[str, np.ndarray]:
        """As many rows as the layers' outputs leave room for, evenly from all."""
        rows = self._model.trim(rows)
        weights = {tensor.name: tensor for tensor in self._model.proto.graph.initializer}
        outputs = 0
        for group in self._groups:
            for consumer in group.consumers:
                node = self._model.proto.graph.node[consumer.node]
                outputs += 4 * int(weights[node.input[1]].dims[_out_axis(node)])
        most_of_all = min(_MOST_ROWS, max(256, _TARGET_BYTES // max(outputs, 1)))
        batch = self._model.fixed_batch or 1
        most = max(batch, min(len(rows), most_of_all) // batch * batch)
        index = np.linspace(0, len(rows) - 1, most).astype(int)
        inputs = dict(self._model.trim(rows.take(index)).inputs)
        more = min(_MIXED * most, most_of_all - most) // batch * batch
        if more > 0 and all(values.dtype.kind == "f" for values in inputs.values()):
            chance = np.random.default_rng(2)
            first, second = chance.integers(0, most, (2, more))
            angle = chance.uniform(0, np.pi / 2, more)
            for name, values in inputs.items():
                inputs[name] = np.concatenate([values, _mixed(values, first, second, angle)])
        return inputs

    def _run(self, proto: onnx.ModelProto, tensors: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        part = _cut(proto, tensors)
        names = {value.name for value in part.graph.input}
        feeds = {name: values for name, values in self._rows.items() if name in names}
        yield from runtime.stream(runtime.open_session(part), feeds, self._model.batch)

    def _sort(self, group: Group) -> tuple[np.ndarray, np.ndarray]:
        """Channels of a group from most to least needed, and its error curve; keeps what consumers gave."""
        graph = self._model.proto.graph
        results = [graph.node[consumer.node].output[0] for consumer in group.consumers]
        tensor = group.consumers[0].tensor
        count = len(next(iter(self._rows.values())))
        wanted: dict[int, list[np.ndarray]] = {consumer.node: [] for consumer in group.consumers}
        positions: dict[int, list[np.ndarray]] = {consumer.node: [] for consumer in group.consumers}
        chance = np.random.default_rng(0)
        seen = []
        each = max(1, _MOST_SAMPLES // count)
        for batch in self._run(self._model.proto, [tensor, *results]):
            seen.append(_channels(batch[tensor], group, chance, each))
            for consumer, result in zip(group.consumers, results, strict=True):
                chosen, values = _sample(batch[result], graph.node[consumer.node], chance, each)
                positions[consumer.node].append(chosen)
                wanted[consumer.node].append(values)
        for consumer in group.consumers:
            self._tasks[consumer.node] = _Task(
                tuple(positions[consumer.node]), np.concatenate(wanted[consumer.node])
            )
        columns = _centred(np.concatenate(seen))
        outgoing = sum(self._outgoing(group, consumer) for consumer in group.consumers)
        dense = all(
            graph.node[consumer.node].op_type != "Conv" and consumer.block == 1
            for consumer in group.consumers
        )
        if dense:
            targets = [self._tasks[consumer.node].wanted for consumer in group.consumers]
            goal = _projected(_centred(np.concatenate(targets, axis=1)))
        else:  # a kernel reads several places at once: the channels stand for what is made of them
            columns = columns * np.sqrt(outgoing).astype(np.float32)
            goal = columns
        worth = np.einsum("ij,ij->j", columns, columns, dtype=np.float64) * (outgoing if dense else 1.0)
        ranked = np.argsort(-worth, kind="stable")
        first, others = np.sort(ranked[:_MOST_COMPARED]), ranked[_MOST_COMPARED:]
        part = columns[:, first]
        total = max(float((goal.astype(np.float64) ** 2).sum()), 1e-30)
        order, error = pivoted(part.T @ part, part.T @ goal, total)
        return np.concatenate([first[order], others]), np.concatenate([error, np.zeros(len(others))])

    def _outgoing(self, group: Group, consumer: Consumer) -> np.ndarray:
        """Squared norm of the weights that read each channel: (width,)."""
        net = _Net(self._model.proto)
        weight = net.get(consumer.node, 1)
        moved = np.moveaxis(weight, _in_axis(net.node(consumer.node)), 0)
        energy: np.ndarray = (moved.reshape(group.width, -1).astype(np.float64) ** 2).sum(axis=1)
        return energy

    # -- building

    def _build(self, widths: Sequence[int]) -> onnx.ModelProto:
        proto = onnx.ModelProto()
        proto.CopyFrom(self._model.proto)
        del proto.graph.value_info[:]
        net = _Net(proto)
        for group, order, width in zip(self._groups, self._orders, widths, strict=True):
            if width < group.width:
                self._narrow(net, group, np.sort(order[:width]))
                for consumer in group.consumers:
                    self._solve(net, consumer)
        drop_unused(proto.graph)
        onnx.checker.check_model(proto)
        return proto

    def _narrow(self, net: _Net, group: Group, kept: np.ndarray) -> None:
        producer = net.node(group.producer)
        net.take(group.producer, 1, _out_axis(producer), kept)
        if len(producer.input) > 2 and producer.input[2]:
            net.take(group.producer, 2, 0, kept)
        for position, index, axis in group.slices:
            net.take(position, index, axis, kept)
        for position in group.depthwise:
            for attribute in net.node(position).attribute:
                if attribute.name == "group":
                    attribute.i = len(kept)
        for position, block in group.reshapes:
            shape = net.get(position, 1).copy()
            shape[1] = len(kept) * block
            net.set(position, 1, shape)
        for consumer in group.consumers:
            columns = (kept[:, None] * consumer.block + np.arange(consumer.block)).ravel()
            net.take(consumer.node, 1, _in_axis(net.node(consumer.node)), columns)

    def _solve(self, net: _Net, consumer: Consumer) -> None:
        """New weights for one layer: original outputs from the inputs that are left."""
        node, task = net.node(consumer.node), self._tasks[consumer.node]
        weight = net.get(consumer.node, 1)
        batches = self._run(net.proto, [consumer.tensor])
        inputs = np.concatenate(
            [
                _patches(batch[consumer.tensor], node, weight, chosen)
                for batch, chosen in zip(batches, task.samples, strict=True)
            ]
        )
        before = weight.T if _out_axis(node) == 0 and weight.ndim == 2 else weight
        if node.op_type == "Conv":
            before = weight.reshape(len(weight), -1).T
        with_bias = node.op_type != "MatMul"
        after, bias = ridge(inputs, task.wanted, before, with_bias=with_bias)
        if node.op_type == "Conv":
            net.set(consumer.node, 1, after.T.reshape(weight.shape))
        else:
            net.set(consumer.node, 1, after.T if _out_axis(node) == 0 else after)
        if with_bias:
            net.set(consumer.node, 2, bias)


def ridge(
    inputs: np.ndarray, wanted: np.ndarray, before: np.ndarray, *, with_bias: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Weights near ``before`` that turn ``inputs`` into ``wanted``.

    Minimises ``|inputs W + b - wanted|^2 + r |W - before|^2``; r is chosen on every fifth sample.

    Args:
        inputs: (samples, in) float32.
        wanted: (samples, out) float32.
        before: (in, out).
        with_bias: whether b may be other than zero.

    Returns:
        W (in, out) and b (out,), float32.
    """
    held = np.arange(len(inputs)) % _HELD_OUT == 0
    outputs = np.linspace(0, wanted.shape[1] - 1, min(_RIDGE_OUTPUTS, wanted.shape[1])).astype(int)
    best, lowest = _RIDGES[-1], math.inf
    if 0 < held.sum() < len(inputs):
        part = wanted[:, outputs]
        for strength, weights, bias in _solutions(
            inputs[~held], part[~held], before[:, outputs], _RIDGES, with_bias=with_bias
        ):
            error = float(((inputs[held] @ weights + bias - part[held]).astype(np.float64) ** 2).sum())
            if error < lowest:
                best, lowest = strength, error
    _, weights, bias = next(_solutions(inputs, wanted, before, (best,), with_bias=with_bias))
    return weights, bias


def _solutions(
    inputs: np.ndarray, wanted: np.ndarray, before: np.ndarray, strengths: Sequence[float], *, with_bias: bool
) -> Iterator[tuple[float, np.ndarray, np.ndarray]]:
    middle_in = inputs.mean(axis=0, dtype=np.float64) if with_bias else np.zeros(inputs.shape[1])
    middle_out = wanted.mean(axis=0, dtype=np.float64) if with_bias else np.zeros(wanted.shape[1])
    x = inputs - middle_in
    missing = (wanted - middle_out) - x @ before.astype(np.float64)
    samples, width = x.shape
    dual = width > samples
    gram = x @ x.T if dual else x.T @ x
    right = missing if dual else x.T @ missing
    mean = max(float(np.trace(gram)) / width, 1e-12)
    for strength in strengths:
        regular = gram + strength * mean * np.eye(len(gram))
        change = np.linalg.solve(regular, right)
        weights = before + (x.T @ change if dual else change)
        bias = middle_out - middle_in @ weights
        yield strength, weights.astype(np.float32), bias.astype(np.float32)


class _Net:
    """A graph whose weights are replaced in place."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self._weights = {tensor.name: tensor for tensor in proto.graph.initializer}
        self._readers: dict[str, int] = {}
        for node in proto.graph.node:
            for name in node.input:
                self._readers[name] = self._readers.get(name, 0) + 1

    def node(self, position: int) -> onnx.NodeProto:
        found: onnx.NodeProto = self.proto.graph.node[position]
        return found

    def get(self, position: int, index: int) -> np.ndarray:
        values: np.ndarray = numpy_helper.to_array(self._weights[self.node(position).input[index]])
        return values

    def take(self, position: int, index: int, axis: int, kept: np.ndarray) -> None:
        self.set(position, index, np.take(self.get(position, index), kept, axis=axis))

    def set(self, position: int, index: int, values: np.ndarray) -> None:
        node = self.node(position)
        if index == len(node.input):
            node.input.append("")
        name = node.input[index]
        if name and self._readers[name] == 1:
            self._weights[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))
            return
        if name:
            self._readers[name] -= 1
        new = unique(self.proto.graph, f"{name or node.output[0]}_pruned")
        self.proto.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), new))
        self._weights[new] = self.proto.graph.initializer[-1]
        self._readers[new] = 1
        node.input[index] = new


def _cut(proto: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """The part of a graph that makes ``tensors``."""
    graph = proto.graph
    makers = {name: position for position, node in enumerate(graph.node) for name in node.output}
    wanted, needed = list(tensors), set()
    names: set[str] = set(tensors)
    while wanted:
        position = makers.get(wanted.pop())
        if position is None or position in needed:
            continue
        needed.add(position)
        node = graph.node[position]
        reads = {*node.input, *_read_inside(node)} - {""}
        wanted += sorted(reads)
        names |= reads
    part = helper.make_graph(
        [graph.node[position] for position in sorted(needed)],
        graph.name or "part",
        [value for value in graph.input if value.name in names],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in dict.fromkeys(tensors)],
        [tensor for tensor in graph.initializer if tensor.name in names],
    )
    model = helper.make_model(part, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    model.functions.extend(proto.functions)
    return model


def _mixed(values: np.ndarray, first: np.ndarray, second: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Rows between pairs of rows, as far from their mean as they are."""
    middle = np.nan_to_num(np.nanmean(values, axis=0, dtype=np.float64))
    shape = (-1, *[1] * (values.ndim - 1))
    one, other = np.cos(angle).reshape(shape), np.sin(angle).reshape(shape)
    mixed: np.ndarray = (values[first] - middle) * one + (values[second] - middle) * other + middle
    return mixed.astype(values.dtype)


def _centred(values: np.ndarray) -> np.ndarray:
    centred: np.ndarray = values - values.mean(axis=0, dtype=np.float64).astype(np.float32)
    return centred


def _projected(values: np.ndarray) -> np.ndarray:
    """Random directions in place of very many outputs: inner products stay what they are, nearly."""
    if values.shape[1] <= _MOST_TARGETS:
        return values
    chance = np.random.default_rng(1)
    mixing = chance.standard_normal((values.shape[1], _MOST_TARGETS)) / math.sqrt(_MOST_TARGETS)
    projected: np.ndarray = values @ mixing.astype(np.float32)
    return projected


def _channels(values: np.ndarray, group: Group, chance: np.random.Generator, each: int) -> np.ndarray:
    """Samples of a group's channels: (samples, width)."""
    if values.ndim == 2:
        block = values.shape[1] // group.width
        if block == 1:
            return values
        values = values.reshape(len(values), group.width, block)
    elif values.shape[-1] == group.width and values.shape[1] != group.width:
        values = np.moveaxis(values, -1, 1)
    flat = np.moveaxis(values.reshape(len(values), group.width, -1), 1, 2)  # (rows, positions, width)
    picked = _pick(chance, len(flat), flat.shape[1], each)
    return np.take_along_axis(flat, picked[:, :, None], axis=1).reshape(-1, group.width)


def _pick(chance: np.random.Generator, rows: int, positions: int, each: int) -> np.ndarray:
    """Which positions to look at in each row: (rows, at most each)."""
    if positions <= each:
        return np.broadcast_to(np.arange(positions), (rows, positions))
    return chance.integers(0, positions, (rows, each))


def _sample(
    values: np.ndarray, node: onnx.NodeProto, chance: np.random.Generator, each: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and outputs there of a layer: (rows, k), (rows * k, outputs)."""
    if values.ndim == 2:
        return np.empty((len(values), 0), int), values
    if node.op_type == "Conv":
        values = np.moveaxis(values, 1, -1)
    flat = values.reshape(len(values), -1, values.shape[-1])
    picked = _pick(chance, len(flat), flat.shape[1], each)
    return picked, np.take_along_axis(flat, picked[:, :, None], axis=1).reshape(-1, flat.shape[2])


def _patches(values: np.ndarray, node: onnx.NodeProto, weight: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """What a layer reads at the chosen positions: (samples, in)."""
    if node.op_type != "Conv":
        if values.ndim == 2:
            return values
        flat = values.reshape(len(values), -1, values.shape[-1])
        return np.take_along_axis(flat, chosen[:, :, None], axis=1).reshape(-1, flat.shape[2])
    attributes = _attributes(node)
    kernel = weight.shape[2:]
    rank = len(kernel)
    pads = list(attributes.get("pads", [0] * (2 * rank)))
    strides = list(attributes.get("strides", [1] * rank))
    dilations = list(attributes.get("dilations", [1] * rank))
    around = [(0, 0), (0, 0), *((pads[axis], pads[axis + rank]) for axis in range(rank))]
    padded = np.pad(values, around)
    reach = tuple((size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + rank)))
    every = (slice(None), slice(None), *(slice(None, None, step) for step in strides))
    windows = windows[(*every, *(slice(None, None, step) for step in dilations))]
    grid = windows.shape[2 : 2 + rank]
    place = np.unravel_index(chosen, grid)
    row = np.arange(len(values))[:, None]
    picked = np.moveaxis(windows, 1, 1 + rank)[(row, *place)]  # (rows, k, C, *kernel)
    return np.ascontiguousarray(picked).reshape(-1, weight.shape[1] * math.prod(kernel))
