"""What a graph costs on a board: bytes, multiplications and a stated time. Pure: a graph and shapes in.

The clock of a workstation says little about a board and something else every time, so what goes into a bundle
is never decided by it (docs/adr/0020). It is decided by this: the graph as ONNX Runtime fuses it for ARM64,
every node at the stated rates of the target. The rates are round figures for one core and good for comparing
two forms of one model; they promise no latency.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx

from quantize import runtime
from quantize.load import Rows
from quantize.prepare import PreparedModel


@dataclass(frozen=True, slots=True)
class Target:
    """One core of a board. Rates per second."""

    name: str
    float_macs: float  # multiply-accumulates, FP32 GEMM
    int8_macs: float
    memory_bytes: float
    elements: float  # of simple float arithmetic, one node
    node_seconds: float  # calling one kernel
    # x86 alone: float convolutions have a blocked layout, int8 ones are fast with unsigned activations, and
    # both take their time for every number that they give.
    blocked: bool = False


# int8/fp32: 1.3-1.5 with plain NEON (A53, A72), 3-4 with the dot product instructions (A55, A75 and later).
TARGETS: Final[Mapping[str, Target]] = {
    target.name: target
    for target in (
        Target("cortex-a53", 3e9, 4e9, 2e9, 0.3e9, 5e-6),
        Target("cortex-a72", 6e9, 9e9, 4e9, 0.7e9, 3e-6),
        Target("cortex-a76", 16e9, 50e9, 9e9, 1.5e9, 1.5e-6),
        Target("neoverse-n1", 20e9, 64e9, 15e9, 2e9, 1e-6),
        Target("generic-arm64", 6e9, 12e9, 4e9, 0.7e9, 3e-6),
        Target("x86-64", 50e9, 150e9, 12e9, 4e9, 0.7e-6, blocked=True),
    )
}
GENERIC: Final = "generic-arm64"

_BATCH_BYTES: Final = 64e6  # of all activations of a batch

_FREE: Final = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Constant", "Shape")
_FLOAT_KERNELS: Final = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "ConvTranspose")
_INT8_KERNELS: Final = (
    "QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger",
    "ConvInteger",
)  # fmt: skip
_SLOW: Final = (
    "Erf", "Exp", "Log", "Tanh", "Sigmoid", "Softmax", "LogSoftmax", "Gelu", "QuickGelu", "BiasGelu",
    "FastGelu", "Pow", "LayerNormalization", "SkipLayerNormalization", "QLinearSoftmax",
)  # fmt: skip
_SLOW_FACTOR: Final = 4.0
_ROUNDING_FACTOR: Final = 0.3  # Q or DQ: one vectorized pass, most of it over bytes
# Measured with onnxruntime's profiler on an AVX512-VNNI processor: five CNNs, float and U8S8.
_BLOCKED_ROUNDING_FACTOR: Final = 1.0
_BLOCKED_FLOAT_OUTPUTS: Final = 2e9  # a second: the result of a convolution and the way to its layout
_BLOCKED_INT8_OUTPUTS: Final = 1e9  # a second: rounding the result of a convolution
_CONV_INTEGER_FACTOR: Final = 3.0  # slower than float, and its result is still to be scaled
_NARROW_FACTOR: Final = 0.5
_DEPTHWISE_FACTOR: Final = 4.0  # such kernels wait for memory, not for multipliers
_SUFFIXES: Final = ("_quantized", "_dq", "_q", "_float")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the tensors of the FP32 graph are with one row (or one fixed batch)."""

    elements: Mapping[str, int]
    macs: float  # multiply-accumulates

    @property
    def bytes(self) -> int:
        """Of all float activations together."""
        return 4 * sum(self.elements.values())

    def batch(self, most: int) -> int:
        """As many rows at a time as memory allows, at most ``most``, at least one."""
        return int(np.clip(_BATCH_BYTES / max(self.bytes, 1), 1, most))


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run of a graph takes on a target."""

    seconds: float
    kernels: Mapping[str, int]


def sizes_of(model: PreparedModel, rows: Rows) -> Sizes:
    """Run one row and look."""
    count = model.fixed_batch or 1
    return sizes_of_feeds(model.proto, next(runtime.batches(rows.take(np.arange(count)).inputs, count)))


def sizes_of_feeds(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> Sizes:
    """Run these feeds and look."""
    watched = onnx.ModelProto()
    watched.CopyFrom(proto)
    known = {value.name for value in watched.graph.output}
    for node in watched.graph.node:
        for name in node.output:
            if name and name not in known:
                known.add(name)
                watched.graph.output.append(onnx.ValueInfoProto(name=name))
    session = runtime.open_session(watched, level=runtime.OptimizationLevel.ORT_DISABLE_ALL)
    elements = {name: int(np.size(values)) for name, values in runtime.run(session, feeds).items()}
    elements |= {name: int(values.size) for name, values in feeds.items()}
    weights = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    macs = sum(_macs(node, elements, weights)[0] for node in proto.graph.node)
    return Sizes(elements, macs)


def arm_graph(model: Path | onnx.ModelProto, scratch: Path) -> onnx.ModelProto:
    """The graph that onnxruntime runs on ARM64, as it would be there: no x86 layouts.

    Args:
        model: a file or a graph.
        scratch: a path for a file, removed again.
    """
    return _fused(model, scratch, runtime.ARM_GRAPH)


def fused_for(target: Target, model: Path | onnx.ModelProto, scratch: Path) -> onnx.ModelProto:
    """The graph that onnxruntime runs on ``target``: on x86 signed activations do not fuse."""
    return _fused(model, scratch, {} if target.blocked else runtime.ARM_GRAPH)


def _fused(model: Path | onnx.ModelProto, scratch: Path, settings: Mapping[str, str]) -> onnx.ModelProto:
    level = runtime.OptimizationLevel.ORT_ENABLE_EXTENDED
    runtime.open_session(model, settings=settings, level=level, optimized=scratch)
    graph = onnx.load(scratch, load_external_data=False)
    scratch.unlink()
    return graph


def cost_of(fused: onnx.ModelProto, sizes: Sizes, target: Target) -> Cost:
    """What a fused graph takes."""
    weights = {tensor.name: tuple(tensor.dims) for tensor in fused.graph.initializer}
    known = dict(sizes.elements)
    seconds = 0.0
    for node in fused.graph.node:
        out = sum(_size(name, known) for name in node.output if name)
        if not out:
            out = max((_size(name, known) for name in node.input if name not in weights), default=0)
        for name in node.output:
            known.setdefault(name, out)
        seconds += _seconds(node, known, weights, target)
    return Cost(seconds, dict(sorted(Counter(node.op_type for node in fused.graph.node).items())))


def saving_of(
    node: onnx.NodeProto, sizes: Sizes, weights: Mapping[str, onnx.TensorProto], target: Target
) -> tuple[float, int]:
    """What a layer saves as INT8 with Q and DQ around it: seconds of one row (perhaps none), and bytes."""
    shapes = {name: tuple(tensor.dims) for name, tensor in weights.items()}
    macs, elements, depthwise = _macs(node, sizes.elements, shapes)
    if node.op_type == "Gather":  # reads the rows that are asked for: nothing to gain but bytes
        return 0.0, 3 * int(np.prod(shapes[node.input[0]]))
    around = sum(_size(name, sizes.elements) for name in (node.input[0], *node.output) if name)
    int8_macs = target.float_macs if depthwise else target.int8_macs
    before = max(macs / target.float_macs, 4 * elements / target.memory_bytes)
    after = max(macs / int8_macs, elements / target.memory_bytes)
    before += 4 * around / target.memory_bytes
    after += around / target.memory_bytes + around / target.elements / 4  # Q and DQ at every other border
    return max(before - after, 0.0), 3 * elements


def _size(name: str, known: Mapping[str, int]) -> int:
    if name in known:
        return known[name]
    for suffix in _SUFFIXES:
        if name.endswith(suffix) and name.removesuffix(suffix) in known:
            return known[name.removesuffix(suffix)]
    return 0


def _macs(
    node: onnx.NodeProto, known: Mapping[str, int], weights: Mapping[str, tuple[int, ...]]
) -> tuple[float, int, bool]:
    """Multiply-accumulates, elements of the weight, and whether each channel is by itself."""
    out = _size(node.output[0], known) if node.output else 0
    kind = node.op_type
    if kind.endswith("LSTM"):
        sizes = [int(np.prod(weights.get(name, (0,)))) for name in node.input[1:3]]
        hidden = next((item.i for item in node.attribute if item.name == "hidden_size"), 1)
        steps = max(out, _size(node.output[-1], known), hidden) / hidden
        return steps * sum(sizes), sum(sizes), False
    if kind not in (*_FLOAT_KERNELS, *_INT8_KERNELS, "DynamicQuantizeMatMul"):
        return 0.0, 0, False
    shape: tuple[int, ...] = max(
        (weights[name] for name in node.input if name in weights),
        key=lambda dims: int(np.prod(dims)),
        default=(),
    )
    elements = int(np.prod(shape)) if shape else 0
    if not shape:  # two activations, as in attention: as if square
        inner = max((_size(name, known) for name in node.input), default=0)
        return float(out) * max(inner, 1) ** 0.5, 0, False
    if "Conv" in kind:
        depthwise = len(shape) > 1 and shape[1] == 1 and kind != "ConvTranspose"
        if kind == "ConvTranspose":
            return float(_size(node.input[0], known)) * elements / shape[0], elements, False
        return float(out) * elements / shape[0], elements, depthwise
    transposed = any(item.name == "transB" and item.i for item in node.attribute)
    columns = shape[0] if transposed else shape[-1]
    return float(out) * elements / max(columns, 1), elements, False


def _kernel(node: onnx.NodeProto, weights: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    return next((weights[name] for name in node.input[1:] if name in weights), ())


def _reach(node: onnx.NodeProto, weights: Mapping[str, tuple[int, ...]]) -> int:
    return int(np.prod(_kernel(node, weights)[2:]))


def _channels(node: onnx.NodeProto, weights: Mapping[str, tuple[int, ...]]) -> int:
    return int((_kernel(node, weights) or (1,))[0])


def _seconds(
    node: onnx.NodeProto, known: Mapping[str, int], weights: Mapping[str, tuple[int, ...]], target: Target
) -> float:
    kind = node.op_type
    if kind in _FREE:
        return target.node_seconds / 3
    macs, elements, depthwise = _macs(node, known, weights)
    inputs = sum(_size(name, known) for name in node.input if name and name not in weights)
    outputs = sum(_size(name, known) for name in node.output if name)
    int8 = kind in _INT8_KERNELS or kind.startswith("DynamicQuantize")
    if macs:
        width = 1 if int8 else 4
        rate = target.int8_macs if int8 else target.float_macs
        if depthwise:
            rate = target.float_macs / _DEPTHWISE_FACTOR
        if kind == "ConvInteger":
            rate = target.float_macs / _CONV_INTEGER_FACTOR
        seconds = max(macs / rate, width * elements / target.memory_bytes)
        if not int8 and not target.blocked and "Conv" in kind and not depthwise and _reach(node, weights) > 1:
            # ARM64 has no blocked float layout: the windows are written out first. INT8 reads them in place.
            seconds += macs / max(_channels(node, weights), 1) / target.elements / 2
        if target.blocked and "Conv" in kind:
            seconds += outputs / (_BLOCKED_INT8_OUTPUTS if int8 else _BLOCKED_FLOAT_OUTPUTS)
        if kind.startswith("DynamicQuantize"):
            seconds += inputs / target.elements  # finding the range and rounding, in float
        seconds += width * (inputs + outputs) / target.memory_bytes
        return seconds + target.node_seconds
    factor = _SLOW_FACTOR if kind in _SLOW else 1.0
    if kind in ("DequantizeLinear", "QuantizeLinear"):
        factor = _BLOCKED_ROUNDING_FACTOR if target.blocked else _ROUNDING_FACTOR
    elif kind.startswith(("QLinear", "Nhwc")):
        factor = _NARROW_FACTOR
    return factor * max(inputs, outputs) / target.elements + target.node_seconds
