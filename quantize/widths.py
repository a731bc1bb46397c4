"""Which channels of a group are needed most, and how many of each group a size leaves.

Pure: matrices and sizes in, orders and widths out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import onnx

from quantize.channels import MULTIPLE, Group, out_axis, plain
from quantize.weights import file_size

_STEP: Final = 1 / 24  # of a group's width: what it gives up at a time
_BLOCK: Final = 64
_CHANNEL_BYTES: Final = 13  # of a static INT8 layer: int32 bias, its scale, the weights' scale and zero point
_LAYER_BYTES: Final = 900  # names, nodes and parameters of the Q/DQ pairs around it


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
            if plain(node, weights) and node.input[1] not in counted:
                dims = weights[node.input[1]].dims
                counted.update(node.input[1:])
                outputs = int(dims[out_axis(node)])
                self._layers.append((math.prod(dims), outputs, made.get(position), read.get(position)))
        other = sum(file_size(tensor) for tensor in graph.initializer if tensor.name not in counted)
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
    return _filled(groups, widths, errors, measure, target)


def _filled(
    groups: Sequence[Group],
    widths: list[int],
    errors: Sequence[np.ndarray],
    measure: Callable[[Sequence[float]], float],
    target: float,
) -> list[int]:
    """Steps are coarse: what the last one freed beyond the target goes to the groups that gain most by it."""
    size = measure(widths)
    while True:
        best: tuple[float, int, int, float] | None = None
        for index, width in enumerate(widths):
            wider = min(groups[index].width, (width // MULTIPLE + 1) * MULTIPLE)
            tried = measure([*widths[:index], wider, *widths[index + 1 :]])
            if wider > width and size < tried <= target:
                gain = float(errors[index][width] - errors[index][wider]) / (tried - size)
                best = max(best, (gain, index, wider, tried)) if best else (gain, index, wider, tried)
        if best is None or best[0] <= 0:
            return widths
        _, index, widths[index], size = best


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
