"""Step 2b, on request: fewer hidden channels, and the layers after them solved again for what is left.

Invariants: inputs, outputs and the nodes of the graph stay; only widths inside it shrink, to multiples of 16
(what the int8 kernels of ARM64 take at a time). No label is read: all that is learnt is what the original
network answers. A point of the curve says what the graph of that point was judged to be.

Idea. A *group* is the hidden channels between a layer that makes them (Conv, Gemm, MatMul) and the layers
that read them (``channels``).

1. Which channels: a QR decomposition with pivots sorts a group's activations so that every prefix explains
   the outputs of the layers that read them (of convolutions: the channels themselves, weighted by what reads
   them) as well as a greedy choice can. What a prefix leaves unexplained is the group's error curve.
2. How many: the group that loses least per byte saved gives up the next channels, until the size is met.
   Each group is narrowed alone once, to see how much its curve means for the result (``widths``).
3. Repair: each layer that reads pruned channels is solved for its inputs *as the pruned network makes
   them*, its outputs *as the original made them*, by ridge regression towards the weights it had. The ridge
   is chosen on rows that the solution did not see (``repair``).
4. A dense network is then brought closer to the original as a whole (``distil``): the point that is chosen,
   and those whose repair alone is outside the budget.

A few thousand rows are few for a thousand unknowns. But the original network says what any row should give,
so rows are added that are mixed of several (``mixing``).

Sources: Chee et al., "Model Preserving Compression for Neural Networks" (NeurIPS 2022) for pivoted QR; Chen,
Billings, Luo, "Orthogonal least squares methods" (1989) for the choice by outputs; He, Zhang, Sun, "Channel
Pruning for Accelerating Very Deep Neural Networks" (ICCV 2017) for the repair; Hinton, Vinyals, Dean,
"Distilling the Knowledge in a Neural Network" (2015) for the last step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import onnx

from quantize import runtime
from quantize.channels import MULTIPLE, Consumer, Group, Net, cut, find_groups, in_axis, out_axis
from quantize.compare import Comparison
from quantize.config import Budget, ShrinkConfig
from quantize.distil import chain_of, distilled
from quantize.errors import BadModel
from quantize.load import Rows
from quantize.mixing import mixed
from quantize.prepare import PreparedModel
from quantize.repair import channels_of, patches, ridge, sample
from quantize.weights import check
from quantize.widths import Sizes, allocate, pivoted

_CURVE: Final = (
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    8.0,
    12.0,
    16.0,
    24.0,
    32.0,
)  # times smaller: the points of the curve
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
_PROBE: Final = 1 / 3  # of its width is what a group is narrowed to, to see how much its curve means
_MOST_PROBED: Final = 16  # groups; in longer chains all count the same
_MOST_SKETCHED: Final = 8e6  # weights left in a point that is only there to be looked at
_MIXED: Final = 3  # rows mixed of others, per calibration row


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One size and what it costs in accuracy, before INT8."""

    share: float  # of the weights that are left
    bytes: int  # estimate of the static INT8 file
    comparison: Comparison
    widths: tuple[int, ...]  # of the groups
    distilled: bool = False  # brought closer to the original as a whole, after the repair


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
        chosen = work.refined(work.try_share(1 - shrink.prune))
        work.sketch()
    elif shrink.prune == "auto":
        work.search(half)
        chosen = work.smallest(half)
        chosen = chosen and work.refined(chosen)
    if target is not None and (chosen is None or chosen.bytes > target):
        work.try_size(target)
        chosen = work.fitting(target)
        chosen = chosen and work.refined(chosen)
        # Who names a size is refused it for what the rows show, not for what they leave open.
        if chosen is None or not chosen.comparison.inside(budget, surely=False):
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
        self._chain = chain_of(model.proto)
        self._refined: set[tuple[int, ...]] = set()
        self._last: tuple[tuple[int, ...], onnx.ModelProto] | None = None
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
            self._last = (widths, proto)
        return self._points[widths]

    def refined(self, point: CurvePoint) -> CurvePoint:
        """The point with its network distilled, where that can be done and comes closer."""
        if self._chain is None or point.widths in self._refined or point.share == 1.0:
            return self._points[point.widths]
        self._refined.add(point.widths)
        closer = self._distilled(self._built(point.widths))
        if closer is None:
            return point
        comparison = self._judge(closer)
        if comparison.sqnr > point.comparison.sqnr:
            self._points[point.widths] = replace(point, comparison=comparison, distilled=True)
            self._last = (point.widths, closer)
        return self._points[point.widths]

    def _distilled(self, proto: onnx.ModelProto) -> onnx.ModelProto | None:
        assert self._chain is not None
        return distilled(self._model.proto, proto, self._chain, self._measured, self._model.batch)

    def search(self, budget: Budget) -> None:
        """Go down the curve until the budget is used up, then close in."""
        full = self.sizes.bytes(self._full)
        inside, outside = float(full), None
        for factor in _CURVE:
            point = self._judged(math.ceil(full / factor), budget)
            if not point.comparison.inside(budget):
                outside = float(point.bytes)
                break
            if point.bytes >= inside:
                return  # as small as it gets
            inside = float(point.bytes)
        if outside is None:
            return
        for _ in range(_BISECTIONS):
            point = self._judged(math.ceil(math.sqrt(inside * outside)), budget)
            if point.comparison.inside(budget):
                inside = float(point.bytes)
            else:
                outside = float(point.bytes)

    def _judged(self, target: int, budget: Budget) -> CurvePoint:
        """A point of this size, distilled where the repair alone is outside the budget."""
        point = self.try_size(target)
        return point if point.comparison.inside(budget) else self.refined(point)

    def sketch(self) -> None:
        """A few more points, for the report: those that cost seconds."""
        full = self.sizes.bytes(self._full)
        for factor in (2.0, 4.0, 8.0):
            if self.sizes.weights(self._full) / factor <= _MOST_SKETCHED:
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
        if self._last is not None and self._last[0] == point.widths:
            return self._last[1]
        proto = self._build(point.widths)
        return (self._distilled(proto) or proto) if point.distilled else proto

    def _built(self, widths: tuple[int, ...]) -> onnx.ModelProto:
        """As repaired."""
        if self._last is not None and self._last[0] == widths:
            return self._last[1]
        return self._build(widths)

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
                outputs += 4 * int(weights[node.input[1]].dims[out_axis(node)])
        most_of_all = min(_MOST_ROWS, max(256, _TARGET_BYTES // max(outputs, 1)))
        batch = self._model.fixed_batch or 1
        most = max(batch, min(len(rows), most_of_all) // batch * batch)
        index = np.linspace(0, len(rows) - 1, most).astype(int)
        inputs = dict(self._model.trim(rows.take(index)).inputs)
        self._measured = dict(inputs)
        more = min(_MIXED * most, most_of_all - most) // batch * batch
        if more > 0 and all(values.dtype.kind == "f" for values in inputs.values()):
            made = mixed(inputs, more, np.random.default_rng(2))
            inputs = {name: np.concatenate([values, made[name]]) for name, values in inputs.items()}
        return inputs

    def _run(self, part: onnx.ModelProto) -> Iterator[dict[str, np.ndarray]]:
        session = runtime.open_session(part)
        del part  # its weights are in the session
        names = {tensor.name for tensor in session.get_inputs()}
        feeds = {name: values for name, values in self._rows.items() if name in names}
        yield from runtime.stream(session, feeds, self._model.batch)

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
        for batch in self._run(cut(self._model.proto, [tensor, *results])):
            seen.append(channels_of(batch[tensor], group, chance, each))
            for consumer, result in zip(group.consumers, results, strict=True):
                chosen, values = sample(batch[result], graph.node[consumer.node], chance, each)
                positions[consumer.node].append(chosen)
                wanted[consumer.node].append(values)
        for consumer in group.consumers:
            self._tasks[consumer.node] = _Task(
                tuple(positions[consumer.node]), _joined(wanted[consumer.node])
            )
        columns = _centred(_joined(seen))
        outgoing = sum(self._outgoing(group, consumer) for consumer in group.consumers)
        dense = all(
            graph.node[consumer.node].op_type != "Conv" and consumer.block == 1
            for consumer in group.consumers
        )
        if dense:
            targets = [self._tasks[consumer.node].wanted for consumer in group.consumers]
            goal = _centred(_projected(np.concatenate(targets, axis=1)))
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
        net = Net(self._model.proto)
        weight = net.get(consumer.node, 1)
        moved = np.moveaxis(weight, in_axis(net.node(consumer.node)), 0)
        energy: np.ndarray = (moved.reshape(group.width, -1).astype(np.float64) ** 2).sum(axis=1)
        return energy

    # -- building

    def _build(self, widths: Sequence[int]) -> onnx.ModelProto:
        net = Net(self._model.proto)
        narrowed = [
            (group, np.sort(order[:width]))
            for group, order, width in zip(self._groups, self._orders, widths, strict=True)
            if width < group.width
        ]
        for group, kept in narrowed:
            self._narrow(net, group, kept)
        outputs = {group.producer: kept for group, kept in narrowed}
        for group, _ in narrowed:
            for consumer in group.consumers:
                self._solve(net, consumer, outputs.get(consumer.node))
        proto = net.proto()
        check(proto)
        return proto

    def _narrow(self, net: Net, group: Group, kept: np.ndarray) -> None:
        producer = net.node(group.producer)
        net.take(group.producer, 1, out_axis(producer), kept)
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
            net.take(consumer.node, 1, in_axis(net.node(consumer.node)), columns)

    def _solve(self, net: Net, consumer: Consumer, outputs: np.ndarray | None) -> None:
        """New weights for one layer: original outputs (those that are left) from the inputs that are left."""
        node, task = net.node(consumer.node), self._tasks[consumer.node]
        weight = net.get(consumer.node, 1)
        batches = self._run(net.proto([consumer.tensor]))
        inputs = _joined(
            [
                patches(batch[consumer.tensor], node, weight, chosen)
                for batch, chosen in zip(batches, task.samples, strict=True)
            ]
        )
        before = weight.T if out_axis(node) == 0 and weight.ndim == 2 else weight
        if node.op_type == "Conv":
            before = weight.reshape(len(weight), -1).T
        with_bias = node.op_type != "MatMul"
        wanted = task.wanted if outputs is None else task.wanted[:, outputs]
        after, bias = ridge(inputs, wanted, before, with_bias=with_bias)
        if node.op_type == "Conv":
            net.set(consumer.node, 1, after.T.reshape(weight.shape))
        else:
            net.set(consumer.node, 1, after.T if out_axis(node) == 0 else after)
        if with_bias:
            net.set(consumer.node, 2, bias)


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    """The pieces as one array; the list is empty afterwards, so that memory holds them once."""
    joined = np.empty((sum(len(piece) for piece in pieces), *pieces[0].shape[1:]), pieces[0].dtype)
    end = len(joined)
    while pieces:
        piece = pieces.pop()
        joined[end - len(piece) : end] = piece
        end -= len(piece)
    return joined


def _centred(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    centred: np.ndarray = np.subtract(
        values, values.mean(axis=0, dtype=np.float64).astype(np.float32), out=values
    )
    return centred


def _projected(values: np.ndarray) -> np.ndarray:
    """Random directions in place of very many outputs: inner products stay what they are, nearly."""
    if values.shape[1] <= _MOST_TARGETS:
        return values
    chance = np.random.default_rng(1)
    mixing = chance.standard_normal((values.shape[1], _MOST_TARGETS)) / math.sqrt(_MOST_TARGETS)
    projected: np.ndarray = values @ mixing.astype(np.float32)
    return projected
