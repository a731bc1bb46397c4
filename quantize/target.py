"""What the written file will be on its target: the fused graph, its int8 kernels, bytes and arithmetic.

There is no ARM hardware in this: a workstation shows the graph that ARM64 runs (``session.qdqisint8allowed``)
and counts, it does not promise a speed-up. What it states is a *bound*: an inference that must read so many
bytes cannot be faster than memory delivers them.

Invariants: every layer is counted once, from shapes of a real run; every Q and DQ left beside int8 kernels
has a reason, or it is called unexplained.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper

from quantize import cost, runtime
from quantize.config import Target


@dataclass(frozen=True, slots=True)
class Processor:
    """What is there on a target. Caches vary with the board; rates of one core are in ``cost.TARGETS``."""

    board: str  # that has it
    kernels: str  # which int8 kernels onnxruntime's MLAS has for it
    cache: int | None  # bytes of the last level; None: not known


_NEON: Final = "NEON: SMULL/SMLAL GEMM (S8S8, U8S8), symmetric and depthwise convolution"
_DOT: Final = "dot product: SDOT/UDOT GEMM, symmetric convolution"
_VNNI: Final = "AVX2, AVX512-VNNI: U8S8; S8S8 has no fast kernel and mostly stays unfused"
PROCESSORS: Final[Mapping[Target, Processor]] = {
    Target.CORTEX_A53: Processor("Raspberry Pi 3", _NEON, 512 << 10),
    Target.CORTEX_A72: Processor("Raspberry Pi 4", _NEON, 1 << 20),
    Target.CORTEX_A76: Processor("Raspberry Pi 5", _DOT, 2 << 20),
    Target.NEOVERSE_N1: Processor("Graviton 2", _DOT, 32 << 20),
    Target.GENERIC_ARM64: Processor("any ARM64 board", _NEON, None),
    Target.X86_64: Processor("a workstation", _VNNI, 32 << 20),
}

_INT8_KERNELS: Final = frozenset((
    "QGemm", "QLinearMatMul", "QLinearConv", "QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu",
    "QLinearSoftmax", "QLinearConcat", "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearWhere",
    "NhwcMaxPool",
    "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "MatMulInteger", "ConvInteger",
    "MatMulNBits", "QAttention", "QEmbedLayerNormalization",
))  # fmt: skip
_FLOAT_LAYERS: Final = (
    "Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "LSTM", "GRU", "RNN",
)  # fmt: skip
# Exact in every implementation: one rounding an element, no sum whose order could differ.
_EXACT: Final = frozenset((
    "QuantizeLinear", "DequantizeLinear", "QGemm", "QLinearConv", "QLinearMatMul", "MaxPool", "NhwcMaxPool",
    "Relu", "Clip", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "IsNaN", "Where",
    "Sub", "Mul",
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One layer of the fused graph."""

    name: str
    kernel: str
    int8: bool
    weight_bytes: int
    activation_bytes: int  # read and written for one row
    macs: int  # multiply-accumulates for one row

    @property
    def intensity(self) -> float:
        """Multiply-accumulates a byte: below a processor's own ratio, memory is what limits."""
        return self.macs / max(1, self.weight_bytes + self.activation_bytes)


@dataclass(frozen=True, slots=True)
class LeftOver:
    """A Q or DQ node that stays in the fused graph, and why."""

    node: str  # QuantizeLinear or DequantizeLinear
    tensor: str
    reason: str
    explained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmGraph:
    """A file as onnxruntime runs it on ARM64."""

    kernels: Mapping[str, int]
    layers: tuple[LayerCost, ...]
    left_over: tuple[LeftOver, ...]
    pure: bool  # nothing but int8 kernels and exact element operations: the same bits on every CPU

    @property
    def int8_kernels(self) -> int:
        """How many nodes run in int8."""
        return sum(count for kind, count in self.kernels.items() if kind in _INT8_KERNELS)

    @property
    def unexplained(self) -> int:
        """Q/DQ nodes that nothing asks for."""
        return sum(not found.explained for found in self.left_over)

    @property
    def float_layers(self) -> tuple[LayerCost, ...]:
        """Dense, convolution and recurrent layers that run in float."""
        return tuple(layer for layer in self.layers if not layer.int8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What one inference cannot be faster than on a processor."""

    target: Target
    bytes: int  # of weights and activations, one row
    macs: int
    from_memory: float  # seconds: every byte from memory at its rate
    arithmetic: float  # seconds at the rate of one core
    cached: bool | None  # whether the weights fit the last cache level and need not come from memory again

    @property
    def seconds(self) -> float:
        """The larger of what applies."""
        return self.arithmetic if self.cached else max(self.from_memory, self.arithmetic)


def arm_graph(model: Path, feeds: Mapping[str, np.ndarray], optimized: Path) -> ArmGraph:
    """Fuse ``model`` as ARM64 does and look at the result.

    Args:
        model: the file.
        feeds: one row (or one fixed batch) for its inputs, for the shapes.
        optimized: a path that may be written and is removed again.

    Raises:
        BadModel: onnxruntime cannot load or run it.
    """
    proto = cost.arm_graph(model, optimized)
    graph = proto.graph
    kernels = Counter(node.op_type for node in graph.node)
    return ArmGraph(
        kernels=dict(sorted(kernels.items())),
        layers=_layers(proto, feeds),
        left_over=_left_over(graph),
        pure=set(kernels) <= _EXACT and any(kind in _INT8_KERNELS for kind in kernels),
    )


def bound(layers: Sequence[LayerCost], target: Target) -> Bound:
    """The least time of one inference on one core of ``target``."""
    rates, cache = cost.TARGETS[target.value], PROCESSORS[target].cache
    weights = sum(layer.weight_bytes for layer in layers)
    touched = weights + sum(layer.activation_bytes for layer in layers)
    macs = sum(layer.macs for layer in layers)
    return Bound(
        target=target,
        bytes=touched,
        macs=macs,
        from_memory=touched / rates.memory_bytes,
        arithmetic=sum(
            layer.macs / (rates.int8_macs if layer.int8 else rates.float_macs) for layer in layers
        ),
        cached=None if cache is None else weights <= cache,
    )


def _layers(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> tuple[LayerCost, ...]:
    graph = proto.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    found = [node for node in graph.node if node.op_type in _FLOAT_LAYERS or _is_layer(node, weights)]
    sizes = _sizes(proto, [name for node in found for name in (node.input[0], node.output[0])], feeds)
    layers = []
    for node in found:
        constants = [weights[name] for name in node.input[1:] if name in weights]
        matrix = max(constants, key=lambda tensor: math.prod(tensor.dims), default=None)
        elements = 0 if matrix is None else math.prod(int(dim) for dim in matrix.dims)
        read, _ = sizes.get(node.input[0], (0, 0))
        written, count = sizes.get(node.output[0], (0, 0))
        layers.append(
            LayerCost(
                name=node.name or node.output[0],
                kernel=node.op_type,
                int8=node.op_type in _INT8_KERNELS,
                weight_bytes=sum(_bytes(tensor) for tensor in constants),
                activation_bytes=read + written,
                macs=_macs(node, elements, matrix, count, read),
            )
        )
    return tuple(layers)


def _is_layer(node: onnx.NodeProto, weights: Mapping[str, TensorProto]) -> bool:
    return node.op_type in _INT8_KERNELS and any(
        name in weights and len(weights[name].dims) >= 2 for name in node.input[1:]
    )


def _macs(node: onnx.NodeProto, elements: int, matrix: TensorProto | None, count: int, read: int) -> int:
    """Multiply-accumulates: outputs times the weights that make one output."""
    if matrix is None or not elements:
        return 0
    if "Conv" in node.op_type:
        return count * elements // max(1, int(matrix.dims[0]))
    if node.op_type in ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"):
        return elements  # for one step of the sequence
    columns = int(matrix.dims[0] if _transposed(node) else matrix.dims[-1])
    return count * elements // max(1, columns)


def _transposed(node: onnx.NodeProto) -> bool:
    return any(attribute.name == "transB" and attribute.i for attribute in node.attribute)


def _sizes(
    proto: onnx.ModelProto, tensors: Sequence[str], feeds: Mapping[str, np.ndarray]
) -> dict[str, tuple[int, int]]:
    """Bytes and elements of tensors in a run."""
    watched = onnx.ModelProto()
    watched.CopyFrom(proto)
    there = {value.name for value in watched.graph.output}
    inputs = {value.name for value in watched.graph.input}
    made = {name for node in watched.graph.node for name in node.output if name}  # '' is left out
    for name in dict.fromkeys(tensors):
        if name in made and name not in there:
            watched.graph.output.append(onnx.ValueInfoProto(name=name))
    session = runtime.open_session(watched, level=runtime.OptimizationLevel.ORT_DISABLE_ALL)
    wanted = {entry.name for entry in session.get_inputs()}
    found = runtime.run(session, {name: values for name, values in feeds.items() if name in wanted})
    sizes = {name: (values.nbytes, values.size) for name, values in found.items()}
    sizes |= {name: (feeds[name].nbytes, feeds[name].size) for name in inputs & set(feeds)}
    return sizes


def _bytes(tensor: TensorProto) -> int:
    size = int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    return size * math.prod(int(dim) for dim in tensor.dims)


def _left_over(graph: onnx.GraphProto) -> tuple[LeftOver, ...]:
    """Every Q and DQ of the fused graph with its reason."""
    weights = {tensor.name for tensor in graph.initializer}
    inputs = {value.name for value in graph.input}
    outputs = {value.name for value in graph.output}
    makers = {name: node for node in graph.node for name in node.output}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    found = []
    for node in graph.node:
        source, result = node.input[0] if node.input else "", node.output[0]
        if node.op_type == "QuantizeLinear":
            maker = makers.get(source)
            if source in inputs:
                reason = "the input becomes int8"
            elif maker is None:
                reason = ""
            elif maker.op_type == "DequantizeLinear":
                reason = _rescaled(maker, node)
            else:
                reason = f"{maker.op_type} gives float"
        elif node.op_type == "DequantizeLinear":
            readers = sorted({user.op_type for user in users.get(result, ())})
            if result in outputs:
                reason = "the output is float"
            elif source in weights:
                reason = f"int8 weight, {', '.join(readers)} in float"
            elif readers and readers != ["QuantizeLinear"]:
                reason = f"{', '.join(kind for kind in readers if kind != 'QuantizeLinear')} in float"
            elif readers:
                reason = _rescaled(node, users[result][0])
            else:
                reason = ""
        else:
            continue
        found.append(
            LeftOver(node.op_type, source, reason or "nothing between Q and DQ asks for it", bool(reason))
        )
    return tuple(found)


def _rescaled(first: onnx.NodeProto, second: onnx.NodeProto) -> str:
    """A DQ straight into a Q changes the scale, or does nothing."""
    return "" if list(first.input[1:]) == list(second.input[1:]) else "two readers want two scales"
