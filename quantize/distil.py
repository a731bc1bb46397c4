"""The repaired network as a whole, brought closer to the original: gradient descent against its answers.

Invariants: no label is read, and no answer but the original network's; widths and nodes stay; the same rows
give the same weights (one seed, a fixed number of steps). It is for chains of dense layers, where a gradient
is three matrix products a layer; other graphs keep what least squares found.

Idea. Least squares repairs one layer after the other, each towards outputs it had before. But after pruning
the layers need not do what they did, only the last must. From the repaired weights some hundred steps of Adam
(Kingma, Ba 2015) follow, on rows that are mixed and swapped anew (``mixing``), so that there are none to
learn by heart. Steps are relative to the weights, so scales of inputs and layers do not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx

from quantize import runtime
from quantize.channels import Net, attributes, cut, out_axis, plain
from quantize.graph import users
from quantize.mixing import mixed, swapped

_BATCH: Final = 256
_MOST_STEPS: Final = 800
_LEAST_STEPS: Final = 32  # fewer do nothing
_ARITHMETIC: Final = 1e12  # multiplications of one descent: about half a minute of a core
_MOST_ROWS: Final = 20_480
_MOST_BYTES: Final = 200_000_000  # of those rows and their answers
_RATE: Final = 0.03  # of a layer's weights' size: the largest step
_WARM_UP: Final = 20  # steps
_DECAY: Final = (0.9, 0.999)  # of Adam's averages

_WEIGHTED: Final = frozenset((
    "Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "Attention", "Einsum",
    "If", "Loop", "Scan",
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stage:
    """A dense layer of a chain, and what follows it before the next one ("" for nothing)."""

    node: int  # position in ``graph.node``
    activation: str
    alpha: float  # of LeakyRelu


@dataclass(frozen=True, slots=True)
class Chain:
    """Dense layers that read each other and nothing else."""

    head: str  # what the first reads
    tail: str  # what the last makes
    stages: tuple[Stage, ...]


def chain_of(proto: onnx.ModelProto) -> Chain | None:
    """The chain of dense layers that the graph consists of, up to what treats values one by one; or None."""
    graph = proto.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    read_by = users(graph)
    fixed = {value.name for value in graph.output}
    layers = [position for position, node in enumerate(graph.node) if node.op_type in _WEIGHTED]
    places = {name: position for position, node in enumerate(graph.node) for name in node.output}
    stages: list[Stage] = []
    for index, position in enumerate(layers):
        node = graph.node[position]
        if node.op_type == "Conv" or not plain(node, weights):
            return None
        if index == len(layers) - 1:
            stages.append(Stage(position, "", 0.0))
            break
        tensor, activation, alpha = node.output[0], "", 0.0
        after = read_by.get(tensor, [])
        if tensor not in fixed and len(after) == 1 and after[0].op_type in _ACTIVATIONS:
            if after[0].op_type == "LeakyRelu":
                alpha = float(attributes(after[0]).get("alpha", 0.01))
            tensor, activation = after[0].output[0], after[0].op_type
            after = read_by.get(tensor, [])
        follows = graph.node[layers[index + 1]]
        if tensor in fixed or len(after) != 1 or after[0].output[0] != follows.output[0]:
            return None
        if follows.input[0] != tensor or places[follows.output[0]] <= position:
            return None
        stages.append(Stage(position, activation, alpha))
    if len(stages) < 2:
        return None
    first, last = graph.node[stages[0].node], graph.node[stages[-1].node]
    return Chain(first.input[0], last.output[0], tuple(stages))


def distilled(
    original: onnx.ModelProto,
    pruned: onnx.ModelProto,
    chain: Chain,
    inputs: Mapping[str, np.ndarray],
    batch: int,
) -> onnx.ModelProto | None:
    """``pruned`` with the weights of ``chain`` brought closer to ``original``; None if it is too large.

    Args:
        original: the FP32 reference.
        pruned: the same nodes with narrower layers.
        chain: of both.
        inputs: calibration rows.
        batch: rows to run at a time.
    """
    net = Net(pruned)
    layers = []
    for stage in chain.stages:
        node, weight = net.node(stage.node), net.get(stage.node, 1)
        bias = net.get(stage.node, 2) if len(node.input) > 2 and node.input[2] else None
        layers.append((weight.T if out_axis(node) == 0 else weight, bias))
    size = sum(weight.size for weight, _ in layers)
    steps = min(_MOST_STEPS, int(_ARITHMETIC / (3 * _BATCH * size)))
    if steps < _LEAST_STEPS or not all(values.dtype.kind == "f" for values in inputs.values()):
        return None
    values = layers[0][0].shape[0] + layers[-1][0].shape[1]
    count = min(_MOST_ROWS, steps * _BATCH, _MOST_BYTES // (4 * values))
    asked = _answers(original, chain, inputs, count, batch)
    if asked is None:
        return None
    found = descend(layers, chain.stages, *asked, steps)
    for stage, (weight, bias) in zip(chain.stages, found, strict=True):
        net.set(stage.node, 1, weight.T if out_axis(net.node(stage.node)) == 0 else weight)
        if bias is not None:
            net.set(stage.node, 2, bias)
    return net.proto()


def _answers(
    original: onnx.ModelProto, chain: Chain, inputs: Mapping[str, np.ndarray], count: int, batch: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """What the chain reads and makes, for the rows there are, rows mixed of them, and both with swaps."""
    chance = np.random.default_rng(3)
    session = runtime.open_session(cut(original, [chain.head, chain.tail]))
    known = {tensor.name for tensor in session.get_inputs()}
    rows = len(next(iter(inputs.values())))
    heads: list[np.ndarray] = []
    tails: list[np.ndarray] = []
    done = 0
    while done < count:
        size = min(rows, max(batch, 1024) // batch * batch)
        if 2 * done < count and done + size <= rows:
            feeds = {name: values[done : done + size] for name, values in inputs.items()}
        else:
            feeds = mixed(inputs, size, chance)
        if 2 * done >= count:
            feeds = {
                name: swapped(values, inputs[name], chance) if values.ndim == 2 else values
                for name, values in feeds.items()
            }
        feeds = {name: values for name, values in feeds.items() if name in known}
        for found in runtime.stream(session, feeds, batch):
            heads.append(found[chain.head])
            tails.append(found[chain.tail])
        done += size
    if heads[0].ndim != 2:
        return None
    return np.concatenate(heads), np.concatenate(tails)


Layers = Sequence[tuple[np.ndarray, np.ndarray | None]]


def descend(
    layers: Layers, stages: Sequence[Stage], inputs: np.ndarray, wanted: np.ndarray, steps: int
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Weights near ``layers`` whose outputs are closer to ``wanted``.

    Args:
        layers: weights (in, out) and biases (out,) or None.
        stages: what follows each.
        inputs: (rows, in) float32.
        wanted: (rows, out) float32.
        steps: of ``_BATCH`` rows each.
    """
    chance = np.random.default_rng(4)
    # The first layer reads values of any scale: it learns what it does to values of mean 0 and size 1.
    spread = inputs.std(axis=0, dtype=np.float64)
    spread[~(spread > 1e-6 * max(float(spread.max()), 1e-30))] = 1.0
    centred = layers[0][1] is not None
    middle = (inputs.mean(axis=0, dtype=np.float64) if centred else np.zeros(len(spread))).astype(np.float32)
    scale = spread.astype(np.float32)
    net = [_Layer(weight, bias) for weight, bias in layers]
    if net[0].bias is not None:
        net[0].bias += middle @ net[0].weight
    net[0].weight *= scale[:, None]

    order, start = chance.permutation(len(inputs)), 0
    for step in range(1, steps + 1):
        if start + _BATCH > len(order):
            order, start = chance.permutation(len(inputs)), 0
        batch = order[start : start + _BATCH]
        start += _BATCH
        rate = _RATE * min(1.0, step / _WARM_UP) * 0.5 * (1 + np.cos(np.pi * step / (steps + 1)))
        read, made = [(inputs[batch] - middle) / scale], []
        for layer, stage in zip(net, stages, strict=True):
            made.append(layer.run(read[-1]))
            read.append(_ACTIVATIONS[stage.activation](made[-1], stage.alpha)[0])
        slope = (made[-1] - wanted[batch]) * np.float32(2 / len(batch))
        for index in range(len(net) - 1, -1, -1):
            before = slope @ net[index].weight.T if index else None
            net[index].move(read[index], slope, step, rate)
            if before is not None:
                stage = stages[index - 1]
                slope = before * _ACTIVATIONS[stage.activation](made[index - 1], stage.alpha)[1]
    net[0].weight /= scale[:, None]
    if net[0].bias is not None:
        net[0].bias -= middle @ net[0].weight
    return [(layer.weight, layer.bias) for layer in net]


class _Layer:
    """Weights that Adam moves."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray | None) -> None:
        self.weight = np.array(weight, np.float32, order="C")
        self.bias = None if bias is None else np.array(bias, np.float32)
        self._averages = [
            [np.zeros_like(tensor), np.zeros_like(tensor)]
            for tensor in (self.weight, self.bias)
            if tensor is not None
        ]
        self._size = 0.0  # of the weights, when first asked

    def run(self, values: np.ndarray) -> np.ndarray:
        made: np.ndarray = values @ self.weight
        return made if self.bias is None else made + self.bias

    def move(self, values: np.ndarray, slope: np.ndarray, step: int, rate: float) -> None:
        """One step against the gradient of what ``values`` gave."""
        if not self._size:
            self._size = float(np.sqrt(np.mean(self.weight**2, dtype=np.float64)))
        rate *= self._size
        _adam(self.weight, self._averages[0], values.T @ slope, step, rate)
        if self.bias is not None:  # as the weight of an input as large as the others
            size = float(np.sqrt(np.mean(values**2, dtype=np.float64)))
            _adam(self.bias, self._averages[1], slope.sum(axis=0), step, rate * size)


def _adam(
    tensor: np.ndarray, averages: Sequence[np.ndarray], gradient: np.ndarray, step: int, rate: float
) -> None:
    first, second = averages
    first += np.float32(1 - _DECAY[0]) * (gradient - first)
    np.multiply(gradient, gradient, out=gradient)
    second += np.float32(1 - _DECAY[1]) * (gradient - second)
    np.sqrt(second, out=gradient)
    gradient += np.float32(1e-12)
    np.divide(first, gradient, out=gradient)
    gradient *= np.float32(rate * (1 - _DECAY[1] ** step) ** 0.5 / (1 - _DECAY[0] ** step))
    tensor -= gradient


def _nothing(values: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    return values, np.ones_like(values)


def _relu(values: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    return np.maximum(values, 0), (values > 0).astype(np.float32)


def _leaky_relu(values: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    slope = np.where(values > 0, np.float32(1), np.float32(alpha))
    return values * slope, slope


def _sigmoid(values: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    made = np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * values))
    return made, made * (1 - made)


def _tanh(values: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    made = np.tanh(values)
    return made, 1 - made**2


_ACTIVATIONS: Final = {  # value and derivative
    "": _nothing,
    "Relu": _relu,
    "LeakyRelu": _leaky_relu,
    "Sigmoid": _sigmoid,
    "Tanh": _tanh,
}
